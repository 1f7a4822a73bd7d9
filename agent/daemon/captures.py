"""Pictures that a rule keeps: sealed to the operator's key the moment they arrive, within budgets of bytes and count.

Nothing on the device opens them again. It is not the upload: `edge-agent capture` lists and copies the sealed files.
Invariants: no picture touches the disk in clear; the oldest make room for the newest; without an operator's key
nothing is kept.
"""

from __future__ import annotations

import collections
import datetime
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from agent import memfd
from agent.ruleconfig import CaptureConfig
from ota.client.fsops import Fs
from ota.errors import OtaError, StoreError
from ota.errors import Reason as OtaReason

log = logging.getLogger(__name__)

FOLDER = "captures"
_HOUR_S = 3600.0


class Captures:
    """The captures of one device.

    Args:
        clock: monotonic seconds.
        now: wall clock, UTC.
        reserve_bytes: disk that stays free for what matters more.
        random: `count` random bytes.
    """

    def __init__(
        self,
        fs: Fs,
        config: CaptureConfig,
        device: str,
        *,
        clock: Callable[[], float],
        now: Callable[[], datetime.datetime],
        reserve_bytes: int = 0,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._fs, self._config, self._device = fs, config, device
        self._clock, self._now, self._random = clock, now, random
        self._reserve_bytes = reserve_bytes
        self._most_bytes = round(config.max_mb * 1e6)
        self._recent: collections.deque[float] = collections.deque()
        self.kept = 0
        self.refused = 0

    def keep(self, picture: int, facts: Mapping[str, Any]) -> str:
        """Seal the JPEG in the sealed memfd `picture` (which stays the caller's) and keep it.

        Returns its name, or nothing where it was not kept: no key, no picture, over a budget, or no space.
        """
        if not self._config.operator_key:
            return ""
        moment = self._clock()
        while self._recent and moment - self._recent[0] > _HOUR_S:
            self._recent.popleft()
        if len(self._recent) >= self._config.max_per_hour:
            self.refused += 1
            return ""
        # imported here: few devices keep pictures, and every daemon would pay for it
        from ota import capture

        data = _read(picture, capture.MAX_PICTURE_BYTES)
        if not data:
            self.refused += 1
            return ""
        self._recent.append(moment)
        name = f"{self._now():%Y%m%dT%H%M%SZ}-{self._random(4).hex()}"
        sealed = capture.seal(data, self._config.operator_key, {**facts, "device": self._device, "name": name})
        try:
            self._fs.make_dirs(FOLDER)
            self._make_room(len(sealed))
            self._fs.write_atomic(f"{FOLDER}/{name}{capture.SUFFIX}", sealed)
        except OtaError as e:
            self.refused += 1
            log.warning("a capture is not kept: %s", e.message, extra={"reason": e.reason.value})
            return ""
        self.kept += 1
        return name

    def _make_room(self, length: int) -> None:
        """Remove the oldest until `length` bytes more are within the budget; names sort by time.

        Raises:
            StoreError: `no_space`: they never will be, or the disk is full of other things; nothing was removed.
        """
        if length > self._most_bytes:
            raise StoreError(OtaReason.NO_SPACE, f"{length} bytes are more than max_mb", hint="raise it in [capture]")
        names = sorted(self._fs.names(FOLDER))
        sizes = {name: self._fs.size(f"{FOLDER}/{name}") or 0 for name in names}
        left = self._most_bytes - length - sum(sizes.values())
        if self._fs.free_bytes() < min(left, 0) + length + self._reserve_bytes:
            raise StoreError(OtaReason.NO_SPACE, "the disk is full of other things", hint="free some of it")
        for name in names:
            if left >= 0:
                return
            self._fs.remove(f"{FOLDER}/{name}")
            left += sizes[name]


def _read(picture: int, most_bytes: int) -> bytes:
    """What is in a memfd that cannot change any more; nothing where it is no such, or larger."""
    # a worker sends what it likes: a directory, a descriptor without rights, one that it cuts while it is read
    if not memfd.is_sealed(picture) or os.fstat(picture).st_size > most_bytes:
        return b""
    try:
        return os.pread(picture, most_bytes, 0)
    except OSError:
        return b""
