"""What the updates of one device share and must not use at once: exclusive accelerators, lines, and free disk.

A resource has owners and every claim a time-out. Claims wait in order of arrival; one that waits too long is
told `busy`, one that is held too long is taken away and its update ends with `state_timeout`, so that a stuck update
blocks nothing else. Everything lies in memory: a restart ends every update, so there is nothing to recover.
Not here: which of two updates of a line goes on (`rivals`), how long one state may last (`limits`).
Invariants: nobody overtakes an earlier claim on the same resource; a claim that ended, however it ended, is released.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ota.errors import OtaError, Reason, Rejected, StoreError

DISK = "disk"


@dataclass(frozen=True, slots=True)
class LockView:
    """One claim that is held, as `status` shows it.

    Attributes:
        since_s: seconds it has been held; it is taken away after `timeout_s`.
        waiting: owners that wait for the same resource, first come first.
    """

    name: str
    owner: str
    since_s: float
    timeout_s: float
    waiting: tuple[str, ...]


@dataclass(eq=False)
class _Claim:
    """`fits` says whether it may join those who hold the resource; `left_bytes` is what it will still write."""

    owner: str
    timeout_s: float
    fits: Callable[[Sequence[_Claim]], bool]
    left_bytes: Callable[[], int]
    granted: asyncio.Future[None]
    since_s: float = 0.0


@dataclass
class _Resource:
    held: list[_Claim] = field(default_factory=list)
    waiting: list[_Claim] = field(default_factory=list)


class Locks:
    """The shared resources of one device, by name. Used from one event loop."""

    def __init__(self) -> None:
        self._resources: dict[str, _Resource] = {}

    @asynccontextmanager
    async def exclusive(self, name: str, owner: str, *, wait_s: float, timeout_s: float) -> AsyncIterator[None]:
        """Hold the resource `name` alone.

        Raises:
            Rejected: `busy`: it did not become free within `wait_s`.
            OtaError: `state_timeout`: it was held for `timeout_s`; the body was cancelled and others have it by now.
        """
        claim = _Claim(owner, timeout_s, lambda held: not held, lambda: 0, _future())
        async with self._hold(name, claim, wait_s):
            yield

    @asynccontextmanager
    async def disk(
        self,
        owner: str,
        left_bytes: Callable[[], int],
        admit: Callable[[int], None],
        *,
        wait_s: float,
        timeout_s: float,
    ) -> AsyncIterator[None]:
        """Reserve the free bytes that `owner` is going to use.

        Args:
            left_bytes: how many it will still write; asked again whenever somebody else wants to reserve.
            admit: raises StoreError `no_space` when the disk is too small for this claim beside so many bytes that
                others have reserved.

        Raises:
            StoreError: `no_space`: too small even if nobody else had reserved anything.
            Rejected: `busy`: others kept their reservations for `wait_s`.
            OtaError: `state_timeout`: as `exclusive`.
        """
        admit(0)

        def fits(held: Sequence[_Claim]) -> bool:
            reserved = sum(claim.left_bytes() for claim in held)
            try:
                admit(reserved)
            except StoreError as e:
                if not reserved or e.reason is not Reason.NO_SPACE:
                    raise
                return False
            return True

        async with self._hold(DISK, _Claim(owner, timeout_s, fits, left_bytes, _future()), wait_s):
            yield

    def reserved_bytes(self, *, but: str) -> int:
        """What everybody but this owner has reserved on the disk and not written yet."""
        resource = self._resources.get(DISK)
        return sum(claim.left_bytes() for claim in resource.held if claim.owner != but) if resource else 0

    def view(self) -> list[LockView]:
        """Every claim that is held."""
        now = asyncio.get_running_loop().time() if self._resources else 0.0
        return [
            LockView(
                name,
                claim.owner,
                round(now - claim.since_s, 1),
                claim.timeout_s,
                tuple(waiting.owner for waiting in resource.waiting),
            )
            for name, resource in sorted(self._resources.items())
            for claim in resource.held
        ]

    @asynccontextmanager
    async def _hold(self, name: str, claim: _Claim, wait_s: float) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        try:
            await self._grant(name, claim, wait_s)
            async with asyncio.timeout(None) as scope:

                def expire() -> None:
                    # first the resource, then its holder: one that does not end must not keep it
                    self._release(name, claim)
                    scope.reschedule(loop.time())

                timer = loop.call_later(claim.timeout_s, expire)
                try:
                    yield
                finally:
                    timer.cancel()
        except TimeoutError as e:
            if not claim.granted.done() or not scope.expired():
                raise
            raise OtaError(
                Reason.STATE_TIMEOUT,
                f"{claim.owner} held {name} for more than {claim.timeout_s:g} s; it was taken away",
                hint="the next look tries again; see the log for what hangs",
                retry=True,
            ) from e
        finally:
            self._release(name, claim)

    async def _grant(self, name: str, claim: _Claim, wait_s: float) -> None:
        resource = self._resources.setdefault(name, _Resource())
        resource.waiting.append(claim)
        self._serve(name)
        try:
            async with asyncio.timeout(wait_s):
                await claim.granted
        except TimeoutError as e:
            holders = ", ".join(other.owner for other in resource.held)
            raise Rejected(
                Reason.BUSY,
                f"{name} is in use by {holders or 'nobody who lets go'}; {claim.owner} waited {wait_s:g} s for it",
                hint="it is tried again by itself; edge-agent status shows who holds it",
                retry=True,
            ) from e

    def _release(self, name: str, claim: _Claim) -> None:
        resource = self._resources.get(name)
        if resource is None:
            return
        for claims in (resource.held, resource.waiting):
            if claim in claims:
                claims.remove(claim)
        self._serve(name)

    def _serve(self, name: str) -> None:
        """Give the resource to those who waited longest, as long as they fit."""
        resource = self._resources[name]
        while resource.waiting:
            claim = resource.waiting[0]
            try:
                if not claim.fits(resource.held):
                    break
            except StoreError as e:
                resource.waiting.pop(0)
                if not claim.granted.done():
                    claim.granted.set_exception(e)
                continue
            resource.waiting.pop(0)
            if claim.granted.done():
                continue  # it was cancelled this very moment
            resource.held.append(claim)
            claim.since_s = asyncio.get_running_loop().time()
            claim.granted.set_result(None)
        if not resource.held and not resource.waiting:
            del self._resources[name]


def _future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()
