"""Installing from a stick, on behalf of a person: who may, what it is judged by, what is told, and a record of it.

What is on a stick and whether to believe it is the updater's (`ota.client.updater`).
Invariants: one stick at a time; nothing begins before its record is durable.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.daemon.askers import Asker
from agent.daemon.audit import Audit, Deed
from agent.daemon.telemetry import Telemetry
from agent.daemon.updates import LastWords
from agent.errors import AgentError, ControlError, Reason
from ota.client.ports import UpdateEvent
from ota.client.rest import DEVICE
from ota.client.transports.stick import check_names, reach
from ota.client.updater import Updater
from ota.errors import OtaError
from ota.errors import Reason as OtaReason

log = logging.getLogger(__name__)

_DONE = {"up_to_date": "is installed already"}


def parse_request(fields: Mapping[str, Any]) -> tuple[Path, bool]:
    """Path, and whether dates are to be set aside, of a `POST /sideload`.

    Raises:
        ControlError: `bad_usage`.
    """
    path, allow_expired = fields.get("path"), fields.get("allow_expired", False)
    if not isinstance(path, str) or not path.startswith("/"):
        raise ControlError(Reason.BAD_USAGE, "path is not an absolute path")
    if not isinstance(allow_expired, bool):
        raise ControlError(Reason.BAD_USAGE, "allow_expired is neither true nor false")
    return Path(path), allow_expired


class Sideloads:
    """Installs from sticks.

    Args:
        device: id of this device.
        root: the root that sticks are signed by; None for the fleet's own.
        clock: wall clock, UTC, for the record.
        on_trial: whether settings are on trial, whose failure would interrupt what is installed.
    """

    def __init__(
        self,
        updater: Updater,
        words: LastWords,
        device: str,
        root: bytes | None,
        audit: Audit,
        telemetry: Telemetry,
        clock: Callable[[], datetime.datetime],
        on_trial: Callable[[], bool] = lambda: False,
    ) -> None:
        self._updater = updater
        self._words = words
        self._device = device
        self._root = root
        self._audit = audit
        self._telemetry = telemetry
        self._clock = clock
        self._on_trial = on_trial
        self._lock = asyncio.Lock()

    async def install(self, path: Path, asker: Asker, *, allow_expired: bool = False) -> dict[str, str]:
        """Install from the directory or stored zip `path`; returns what became of each line.

        Raises:
            ControlError: `not_permitted` when dates are to be set aside by somebody who may not.
            OtaError: `busy` while another stick is read, or settings are on trial; `not_for_this_device` when nothing
                there is for this device; else why the first line was not installed.
        """
        if allow_expired:
            asker.require_operator("install from a stick that has expired")
        if self._lock.locked():
            raise OtaError(OtaReason.BUSY, "another stick is being read", hint="wait until that is over", retry=True)
        if self._on_trial():
            hint = "edge-agent config show tells when it ends; then again"
            raise OtaError(OtaReason.BUSY, "settings are on trial", hint=hint, retry=True)
        async with self._lock:
            named = {"path": os.fspath(path), "allow_expired": allow_expired}
            deed = self._audit.begin(self._clock().isoformat(timespec="seconds"), "sideload", asker, named)
            outcome = "interrupted"
            try:
                told = await self._install(path, allow_expired)
                outcome = "; ".join(f"{line} {text}" for line, text in told.items())
                return told
            except (OtaError, AgentError) as e:
                outcome = e.reason.value
                raise
            finally:
                self._end(deed, outcome)
                facts = {**deed.facts, "user": asker.name, "outcome": outcome}
                self._telemetry.event("sideload", facts, alarm=allow_expired)

    def _end(self, deed: Deed, outcome: str) -> None:
        """What was done is done: a disk that cannot note its end must not hide it."""
        try:
            self._audit.end(deed, outcome)
        except OtaError as e:
            log.error("audit: %s: %s", outcome, e.message, extra={"reason": e.reason.value, "hint": e.hint})

    async def _install(self, path: Path, allow_expired: bool) -> dict[str, str]:
        await check_names(await reach(path, self._device), self._device)
        known = self._words.now.get(DEVICE)
        try:
            events = await self._updater.sideload(path, self._root, allow_expired=allow_expired)
        finally:
            # what a stick's metadata is like says nothing of the device's own source
            self._words.put_back(DEVICE, known)
        if not events:
            # it named something for this device a moment ago
            raise OtaError(
                OtaReason.NOT_FOR_THIS_DEVICE,
                f"nothing on it is for {self._device}",
                hint=f"is it still mounted? edge-ota bundle REPO {self._device} OUT writes it anew",
            )
        return _told(events, f"edge-ota bundle REPO {self._device} OUT writes it anew")


def _told(events: Sequence[UpdateEvent], anew: str) -> dict[str, str]:
    """What became of each line; the first failure is raised, and says what was installed all the same."""
    told = {
        event.line: f"{event.version} {_DONE.get(event.outcome or '', event.outcome)}"
        for event in events
        if event.reason is None
    }
    for event in events:
        if event.reason is not None:
            others = "".join(f"; {line} {text}" for line, text in told.items())
            raise OtaError(event.reason, event.message + others, hint=event.hint or anew)
    return told
