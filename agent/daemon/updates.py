"""When to look for a release: on a hint, after connecting, every `poll_s`, and sooner after a failure worth repeating.

What a look does is the updater's (`ota.client.updater`); this loop only decides the moments, one look at a time, and
keeps the last word on each line for `status`. A look at a stick is one that a person waits for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ota.client.ports import UpdateEvent
from ota.client.updater import DEVICE, Updater
from ota.errors import OtaError, Reason

log = logging.getLogger(__name__)

RETRY_S = (5.0, 600.0)


class UpdateLoop:
    """Runs `check` at the right moments.

    Args:
        check: one look for new releases; its events go elsewhere. True when something failed that may pass by itself.
        online: whether a look can succeed at all.
        poll_s: longest time between two looks.
    """

    def __init__(
        self, check: Callable[[], Awaitable[bool]], online: Callable[[], bool], *, poll_s: float, rng: random.Random
    ) -> None:
        self._check = check
        self._online = online
        self._poll_s = poll_s
        self._rng = rng
        self._wake = asyncio.Event()
        self._delayed: asyncio.TimerHandle | None = None
        self._retry_s = RETRY_S[0]

    def poke(self, delay_s: float = 0.0) -> None:
        """Look after `delay_s`; of two wishes the earlier one serves both."""
        loop = asyncio.get_running_loop()
        if self._delayed is not None:
            if self._delayed.when() <= loop.time() + delay_s:
                return
            self._delayed.cancel()
        self._delayed = loop.call_later(delay_s, self._due)

    def _due(self) -> None:
        self._delayed = None
        self._wake.set()

    async def run(self) -> None:
        """Look, wait, look again, until cancelled."""
        wait_s = self._poll_s
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if not self._online():
                wait_s = self._poll_s
                continue
            wait_s = self._next(await self._look())

    async def _look(self) -> bool:
        try:
            return await self._check()
        except OtaError as e:
            log.warning("looking for updates: %s", e.message, extra={"reason": e.reason.value, "hint": e.hint})
            return True
        except Exception:  # one line's accident must not end all updates of this device
            log.exception("looking for updates failed")
            return True

    def _next(self, failed: bool) -> float:
        """Seconds to the next look: full jitter between failures, a tenth of spread between polls."""
        if not failed:
            self._retry_s = RETRY_S[0]
            return self._poll_s * self._rng.uniform(0.9, 1.0)
        wait_s = self._rng.uniform(self._retry_s / 2, self._retry_s)
        self._retry_s = min(2 * self._retry_s, RETRY_S[1])
        return min(wait_s, self._poll_s)


class LastWords:
    """The last update event of each line, and the last one that ended an update."""

    def __init__(self) -> None:
        self.now: dict[str, UpdateEvent] = {}
        self.ended: dict[str, UpdateEvent] = {}

    def put_back(self, line: str, event: UpdateEvent | None) -> None:
        """Make `event` the last one of `line` again; None forgets that there was any."""
        if event is None:
            self.now.pop(line, None)
        else:
            self.now[line] = event

    def add(self, event: UpdateEvent) -> None:
        """Remember `event`; a look that found nothing new does not hide how the last update ended."""
        self.now[event.line] = event
        if event.outcome is not None and event.outcome != "up_to_date":
            self.ended[event.line] = event


async def sideload(updater: Updater, words: LastWords, path: Path, device: str) -> dict[str, Any]:
    """Install from the directory `path` and say what became of each line.

    Raises:
        OtaError: `not_for_this_device` when nothing there is for `device`; else why the first line was not installed.
    """
    anew = f"edge-ota bundle REPO {device} DIRECTORY writes it anew"
    if not os.path.lexists(path / "devices" / device / "desired.json"):
        raise OtaError(Reason.NOT_FOR_THIS_DEVICE, f"{path} holds nothing for {device}", hint=anew)
    known = words.now.get(DEVICE)
    try:
        events = await updater.sideload(path)
    finally:
        # what a stick's metadata is like says nothing of the device's own source
        words.put_back(DEVICE, known)
    for event in events:
        if event.reason is not None:
            raise OtaError(event.reason, event.message, hint=event.hint or anew)
    said = {"up_to_date": "is installed already"}
    return {event.line: f"{event.version} {said.get(event.outcome or '', event.outcome)}" for event in events}
