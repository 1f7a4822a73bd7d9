"""A committed release whose worker keeps dying: counted, and after too many in too short a time rolled back for good.

Single crashes are the line's business (`agent.daemon.lines` starts the worker again, with back-off); a candidate in its
probation is the updater's. Invariant: one release is given up once, and told once.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from agent.daemon.rejections import rejection
from agent.daemon.telemetry import Telemetry
from agent.errors import Reason
from ota.client.ports import Candidate, UpdateEvent
from ota.errors import OtaError
from ota.errors import Reason as OtaReason

log = logging.getLogger(__name__)

_NOTHING_THERE = (OtaReason.NOT_FOUND, OtaReason.PAYLOAD_CORRUPT)


class Updates(Protocol):
    """Who can put the previous release back: `ota.client.updater.Updater.unfit`."""

    async def unfit(self, line: str, release_sha256: str, error: OtaError) -> UpdateEvent | None:
        """Serve the previous release again."""
        ...


class CrashLoops:
    """Watches the crashes of every line.

    Args:
        limit: so many crashes of one release …
        window_s: … within so many seconds are a loop.
        clock: monotonic seconds.
        spawn: runs work that nobody waits for, under a name.
        look: looks for releases: a newer one may be what helps.
        excused: whether something else than the release is the likelier cause: settings on trial.
    """

    def __init__(
        self,
        updates: Updates,
        telemetry: Telemetry,
        *,
        limit: int,
        window_s: float,
        clock: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
        look: Callable[[], None],
        excused: Callable[[], bool] = lambda: False,
    ) -> None:
        self._updates = updates
        self._telemetry = telemetry
        self._limit = limit
        self._window_s = window_s
        self._clock = clock
        self._spawn = spawn
        self._look = look
        self._excused = excused
        self._times: dict[str, collections.deque[float]] = {}
        self._release: dict[str, str] = {}
        self._given_up: dict[str, str] = {}

    def crashed(self, line: str, candidate: Candidate, reason: Reason) -> None:
        """The worker that served `candidate` died, or did not come back, by its own fault."""
        if self._excused():
            return
        release, now = candidate.release.sha256, self._clock()
        if self._release.get(line) != release:
            self._release[line] = release
            self._times[line] = collections.deque(maxlen=self._limit)
        times = self._times[line]
        times.append(now)
        if len(times) < self._limit or now - times[0] > self._window_s or self._given_up.get(line) == release:
            return
        times.clear()
        self._spawn(self._give_up(candidate, reason), f"crash loop {line}")

    async def _give_up(self, candidate: Candidate, reason: Reason) -> None:
        line, version, release = candidate.line, candidate.version, candidate.release.sha256
        message = f"{line} {version} crashed {self._limit} times within {self._window_s:g} s"
        error = OtaError(rejection(reason, OtaReason.WORKER_CRASHED), message)
        try:
            event = await self._updates.unfit(line, release, error)
        except OtaError as e:
            # the line goes on trying, and a person has to know; with nothing to go back to there is nothing to add
            if e.reason in _NOTHING_THERE:
                self._given_up[line] = release
            hint = f"publish a newer release of {line}"
            log.error("%s; %s", message, e.message, extra={"reason": error.reason.value, "hint": hint})
            facts = {"line": line, "version": version, "reason": error.reason.value, "hint": hint}
            self._telemetry.event("crash_loop", facts | {"message": f"{message}; {e.message}"}, alarm=True)
            return
        if event is not None:
            self._given_up[line] = release
            self._look()
