"""What the fleet wants of this device, as verified metadata says it: releases, settings, or that it is expelled.

Not here: how metadata is verified (`repository`, `workflow`), what is done about it (`updater`).
Invariants: a repository is refreshed by one task at a time; once the device is expelled nothing is wanted any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from ota.client.desired import Desired
from ota.client.ledger import Parts
from ota.client.machine import State
from ota.client.ports import Clock, Traffic, Transport, UpdateEvent
from ota.client.repository import ELSEWHERE, Repository
from ota.client.rest import DEVICE
from ota.client.rivals import expelled
from ota.errors import OtaError, Reason, TransferError, TrustError


class Wishes:
    """Asks repositories.

    Args:
        on_revoked: called once, when a verified document says that this device is expelled.

    Attributes:
        revoked: whether one said so.
    """

    def __init__(self, parts: Parts, clock: Clock, on_revoked: Callable[[], None]) -> None:
        self._parts = parts
        self._clock = clock
        self._on_revoked = on_revoked
        self._refreshing: dict[str, asyncio.Lock] = {}
        self.revoked = False

    async def ask(self, repository: Repository, transports: Sequence[Transport], *, allow_expired: bool) -> Desired:
        """What verified metadata wants of this device.

        Raises:
            OtaError: it cannot be had or verified; `device_revoked`.
        """
        if self.revoked:
            raise expelled()
        async with self._refreshing.setdefault(repository.name, asyncio.Lock()):
            refreshed = await repository.refresh(
                transports, self._parts.identity.device, self._clock(), allow_expired=allow_expired
            )
        event = UpdateEvent(DEVICE, "", State.CHECKING.value, traffic=Traffic(refreshed.metadata_bytes))
        if (wrong := refreshed.passed_over) is not None:
            event = replace(event, reason=wrong.reason, message=wrong.message, hint=wrong.hint)
        self._parts.emit(event)
        desired = refreshed.desired
        if desired.revoked and not self.revoked:
            if desired.revoked_keys and not desired.revoked_keys & self._parts.keys.hpke.keys():
                raise TrustError(
                    Reason.NOT_FOR_THIS_DEVICE,
                    "desired.json revokes the board that had this id before",
                    hint="an old document is being replayed, or the operator has granted nothing to this board yet",
                    retry=True,
                )
            self.revoked = True
            self._on_revoked()
        if self.revoked:
            raise expelled()
        return desired

    def recheck(
        self, repository: Repository, transports: Sequence[Transport], line: str
    ) -> Callable[[str], Awaitable[None]]:
        """What asks later on whether a release, by the hash of its release.json, is still the one wanted on `line`.

        It asks nobody within `Limits.recheck_s` from now, and one that cannot be reached takes nothing back. It raises
        TransferError: `superseded`, or why the assignment does not verify any more; that is no verdict on the release.
        """
        asked_s = asyncio.get_running_loop().time()

        async def still_wanted(release_sha256: str) -> None:
            if asyncio.get_running_loop().time() - asked_s < self._parts.limits.recheck_s:
                return
            try:
                desired = await self.ask(repository, transports, allow_expired=False)
                if line in desired.refused:
                    raise desired.refused[line]
            except OtaError as e:
                if e.reason in ELSEWHERE:
                    return
                raise TransferError(e.reason, e.message, hint=e.hint, retry=True) from e
            wanted = desired.assignments.get(line)
            if wanted is None or wanted.sha256 != release_sha256:
                message = f"what was fetched for {line} is not assigned to this device any more"
                raise TransferError(Reason.SUPERSEDED, message, retry=True)

        return still_wanted
