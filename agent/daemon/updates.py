"""When to look for a release: on a hint, after connecting, every `poll_s`, and sooner after a failure worth repeating.

What a look does is the updater's (`ota.client.updater`); this loop only decides the moments, and keeps the last word on
each line for `status`. A look lasts as long as the updates that it began; the next one does not wait for that, so that
an update that takes hours on one line keeps no other line from its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Sequence

from agent.config import UpdateConfig
from agent.errors import AgentError
from ota.client.limits import Limits
from ota.client.ports import UpdateEvent
from ota.client.rest import DEVICE
from ota.errors import OtaError, Reason

log = logging.getLogger(__name__)

RETRY_S = (5.0, 600.0)
MAX_LOOKS = 32
# what a person or the settings want is no failure to be mended by looking again soon
FOR_GOOD = frozenset({Reason.NO_DELEGATE, Reason.INCOMPATIBLE})
"""Why a line stays without its committed release until the settings are others."""
_NOT_MENDED = frozenset({Reason.OPERATOR, Reason.DEVICE_REVOKED, Reason.METERED, Reason.OUTSIDE_WINDOW})


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
        """Look, wait, look again, until cancelled; then every look is cancelled."""
        loop = asyncio.get_running_loop()
        looks: set[asyncio.Task[bool]] = set()
        due = loop.time() + self._poll_s
        waking = loop.create_task(self._wake.wait())
        try:
            while True:
                wait_s = max(0.0, due - loop.time()) if len(looks) < MAX_LOOKS else None
                waits = {waking, *looks} if len(looks) < MAX_LOOKS else looks
                done, _ = await asyncio.wait(waits, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                ended = looks & done
                looks -= ended
                for look in ended:
                    due = loop.time() + self._next(look.result())
                if waking.done():
                    self._wake.clear()
                    waking = loop.create_task(self._wake.wait())
                elif loop.time() < due:
                    continue
                due = loop.time() + self._poll_s
                if self._online():
                    looks.add(loop.create_task(self._look()))
        finally:
            for task in (waking, *looks):
                task.cancel()
            await asyncio.gather(waking, *looks, return_exceptions=True)

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


async def serve_later(serve: Callable[[], Awaitable[None]], rng: random.Random) -> None:
    """Call `serve` with back-off until it succeeds, or fails for a reason that only other settings end: a committed
    release ran here before, so whatever else keeps it from serving may pass."""
    wait_s = RETRY_S[0]
    while True:
        await asyncio.sleep(rng.uniform(wait_s / 2, wait_s))
        wait_s = min(2 * wait_s, RETRY_S[1])
        try:
            return await serve()
        except OtaError as e:
            log.error("a line is not served: %s", e.message, extra={"reason": e.reason.value, "hint": e.hint})
            if for_good(e):
                return


def for_good(error: AgentError | OtaError) -> bool:
    """Whether a committed release that `error` kept from serving stays so until the settings are others."""
    return isinstance(error, OtaError) and error.reason in FOR_GOOD and not error.retry


def worth_repeating(events: Sequence[UpdateEvent]) -> bool:
    """Whether something in a look failed that may pass by itself."""
    return any(event.outcome == "failed" and event.reason not in _NOT_MENDED for event in events)


def limits_of(config: UpdateConfig) -> Limits:
    """The updater's limits, where agent.toml has a say: a probation ends by itself before it is ended."""
    seconds = config.probation_s * config.probation_scale
    return Limits(probation_timeout_s=10 * seconds + 10 * config.run_timeout_s + 60)


class LastWords:
    """The last update event of each line, and the last one that ended an update.

    Args:
        lines: names of the lines of this device. Whoever assigns releases may make up others, as many as he likes;
            of those nothing is kept.
    """

    def __init__(self, lines: Collection[str]) -> None:
        self._known = frozenset((DEVICE, *lines))
        self.now: dict[str, UpdateEvent] = {}
        self.ended: dict[str, UpdateEvent] = {}

    def put_back(self, line: str, event: UpdateEvent | None) -> None:
        """Make `event` the last one of `line` again; None forgets that there was any."""
        if event is None:
            self.now.pop(line, None)
        else:
            self.now[line] = event

    def add(self, event: UpdateEvent) -> None:
        """Remember `event` of a known line; a look that found nothing new does not hide how the last update ended."""
        if event.line not in self._known:
            return
        self.now[event.line] = event
        if event.outcome is not None and event.outcome != "up_to_date":
            self.ended[event.line] = event
