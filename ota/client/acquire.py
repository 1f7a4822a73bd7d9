"""From an assignment to sealed files in the store: release.json, payloads, plaintext, each checked as it was signed.

The part of an update that needs the network and the disk and runs nothing of the candidate. Not here: whether the
release may run (`guard`), trying it (`update`).
Invariants: what will be written is reserved on the disk before anything is fetched; a delta that fails in any way is
replaced by its full payload, once; nothing is staged but what the release signs.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from ota import release as releases
from ota.client import machine, payloads
from ota.client.desired import Assignment, Grant
from ota.client.ledger import Ledger, Parts
from ota.client.payloads import Plan
from ota.client.ports import Transport
from ota.client.store import sealed_size
from ota.errors import OtaError, PayloadError, Reason, Rejected, StoreError, TransferError
from ota.release import Component, Payload, Release

# a delta that is not there, or whose blocks are wrong wherever they come from, is no reason not to update
_NO_DELTA = (Reason.NOT_FOUND, Reason.TRANSFER_CORRUPT)
_T = TypeVar("_T")


class Acquisition:
    """Gets the files of one release of one line.

    Attributes:
        holds: plaintext hashes staged by it, which no record names yet; they must not be collected.
    """

    def __init__(
        self, parts: Parts, ledger: Ledger, grants: Mapping[str, Grant], transports: Sequence[Transport]
    ) -> None:
        self._parts = parts
        self._ledger = ledger
        self._grants = grants
        self._transports = transports
        self.holds: set[str] = set()

    async def release(self, assignment: Assignment) -> Release:
        """The assigned release, from the store or the first transport that has what was signed.

        Raises:
            OtaError: `metadata_mismatch`: one has something else, and no other has it; `bad_release`.
            TransferError: no transport has it.
        """
        kept = self._parts.store.release(assignment.sha256)
        data = kept.raw if kept is not None else await self._fetch_release(assignment)
        _check_signed(assignment, data)
        release = releases.parse(data)
        if (release.line, release.version) != (assignment.line, assignment.version):
            raise OtaError(Reason.BAD_RELEASE, f"{assignment.path} describes {release.line} {release.version}")
        return release

    def check_key(self, release: Release, wanted: Payload) -> bytes:
        """The content key of a payload.

        Raises:
            PayloadError: `no_grant`, `not_for_this_device`.
        """
        parts = self._parts
        return payloads.content_key(release, wanted, self._grants, parts.keys, parts.identity.device)

    async def files(self, release: Release, components: Sequence[Component]) -> None:
        """FETCHING until everything but the trial is done: the components and the golden vectors, sealed in the store.

        Raises:
            OtaError: they cannot be had, or are not what the release signs.
        """
        parts, limits = self._parts, self._parts.limits
        files = (*components, release.golden)
        for component in components:
            self.check_key(release, component.full)
        waiting = [self._plan(file) for file in files if not await self.stored(file)]
        self.holds |= {file.plain_sha256 for file in files}
        what = f"{release.line} {release.version}"
        async with parts.locks.disk(
            release.line,
            lambda: self._needed(waiting),
            lambda reserved: self._admit(waiting, reserved, what),
            wait_s=limits.lock_wait_s,
            timeout_s=limits.disk_timeout_s,
        ):
            ledger = self._ledger
            ledger.traffic = replace(
                ledger.traffic,
                full_bytes=ledger.traffic.full_bytes + sum(p.component.full.length for p in waiting),
                delta_bytes=ledger.traffic.delta_bytes + sum(p.payload.length for p in waiting if p.is_delta),
            )
            await self._fetch(release, waiting)
            while waiting:
                await self._stage(release, waiting)

    async def _stage(self, release: Release, waiting: list[Plan]) -> None:
        """Verify and seal the first of the fetched files; a delta that fails is fetched anew in full."""
        parts, chosen = self._parts, waiting[0]
        try:
            fd = await self._open(release, chosen)
        except (PayloadError, Rejected, StoreError) as e:
            if not chosen.is_delta:
                raise
            await self._fall_back(release, waiting, e)
            return
        try:
            self._ledger.say(machine.FileVerified(), release.version)
            keeping = parts.store.keep(fd, chosen.component.plain_sha256, chosen.component.plain_length)
            what = f"staging {chosen.component.name} of {release.line} {release.version}"
            await within(parts.limits.staging_timeout_s, what, keeping)
        finally:
            os.close(fd)
        parts.inbox.discard(chosen.payload)
        del waiting[0]
        if waiting:
            self._ledger.say(machine.FileStaged(), release.version)

    async def _fetch_release(self, assignment: Assignment) -> bytes:
        failure: OtaError | None = None
        lie: OtaError | None = None
        for transport in self._transports:
            try:
                async with asyncio.timeout(self._parts.limits.metadata_timeout_s):
                    data = await transport.target(assignment.path, assignment.sha256, assignment.length)
                _check_signed(assignment, data)
            except TimeoutError:
                failure = failure or TransferError(
                    Reason.TRANSFER_TIMEOUT, f"{transport.name} did not answer", retry=True
                )
            except TransferError as e:
                failure = failure or e
            except OtaError as e:
                lie = lie or OtaError(e.reason, f"{transport.name}: {e.message}", hint=e.hint, retry=True)
            else:
                traffic = self._ledger.traffic
                self._ledger.traffic = replace(traffic, metadata_bytes=traffic.metadata_bytes + len(data))
                if lie is not None:
                    self._ledger.tell(assignment.version, lie.reason, f"passed over: {lie.message}")
                return data
        none = TransferError(Reason.SOURCE_UNREACHABLE, "there is no transport to fetch from", retry=True)
        raise lie or failure or none

    async def _fetch(self, release: Release, waiting: list[Plan]) -> None:
        inbox, counts = self._parts.inbox, self._ledger.counts
        # a release whose models all come as deltas costs little, whatever its golden vectors come as
        small = all(plan.is_delta for plan in waiting if plan.component is not release.golden)
        for position, chosen in enumerate(waiting):
            try:
                await inbox.fetch(chosen.payload, self._transports, counts, delta=small or chosen.is_delta)
            except TransferError as e:
                if not chosen.is_delta or e.reason not in _NO_DELTA:
                    raise
                inbox.discard(chosen.payload)
                waiting[position] = chosen.full()
                self._ledger.tell(release.version, e.reason, f"{e.message}; the full payload is fetched instead")
                await inbox.fetch(chosen.component.full, self._transports, counts)
        self._ledger.say(machine.PayloadsFetched(), release.version)

    async def _open(self, release: Release, chosen: Plan) -> int:
        parts = self._parts
        key = self.check_key(release, chosen.payload)
        sealed = parts.inbox.chunks(chosen.payload)
        opening = payloads.open_payload(release, chosen, sealed, key, parts.store, parts.host)
        what = f"verifying {chosen.component.name} of {release.line} {release.version}"
        return await within(parts.limits.verifying_timeout_s, what, opening)

    async def _fall_back(self, release: Release, waiting: list[Plan], error: OtaError) -> None:
        """The first waiting delta failed: its full payload, once."""
        delta = waiting[0]
        waiting[0] = delta.full()
        self._ledger.say(
            machine.DeltaRefused(),
            release.version,
            reason=error.reason,
            message=f"the delta of {delta.component.name} failed ({error.message}); the full payload is fetched",
        )
        self._parts.inbox.discard(delta.payload)
        reserved = self._parts.locks.reserved_bytes(but=release.line)
        self._admit(waiting, reserved, f"{release.line} {release.version}")
        await self._fetch(release, waiting)

    def _admit(self, waiting: Sequence[Plan], reserved: int, what: str) -> None:
        """Refuse what the disk is too small for even without the rest of releases that are not wanted any more.

        Raises:
            StoreError: `no_space`, `sealed_key_unavailable`.
        """
        needed = self._needed(waiting) + reserved
        try:
            self._parts.store.admit(needed, what)
        except StoreError as e:
            if e.reason is not Reason.NO_SPACE:
                raise
            self._parts.collect()
            self._parts.store.admit(needed, what)

    def _needed(self, waiting: Sequence[Plan]) -> int:
        """Bytes still to be written for `waiting`: what is missing in the inbox, and the sealed files."""
        missing = self._parts.inbox.missing_bytes
        return sum(missing(plan.payload) + sealed_size(plan.component.plain_length) for plan in waiting)

    def _plan(self, component: Component) -> Plan:
        bases = set()
        for installed in (self._ledger.record.active, self._ledger.record.previous):
            if installed is not None:
                bases |= {installed.plain_sha256, installed.golden_sha256}
        return payloads.plan(component, {sha256 for sha256 in bases if self._parts.store.has(sha256)})

    async def stored(self, component: Component) -> bool:
        """Whether the store has the file whole; a damaged one is removed.

        Raises:
            StoreError: it cannot be read now.
        """
        store = self._parts.store
        if not store.has(component.plain_sha256):
            return False
        try:
            os.close(await store.read(component.plain_sha256))
        except StoreError as e:
            if e.reason is not Reason.PAYLOAD_CORRUPT:
                raise
            store.discard(component.plain_sha256)
            return False
        return True


def _check_signed(assignment: Assignment, data: bytes) -> None:
    """Before anybody reads it: what is wrong with it is not the publisher's then."""
    if hashlib.sha256(data).hexdigest() != assignment.sha256 or len(data) != assignment.length:
        raise OtaError(Reason.METADATA_MISMATCH, f"{assignment.path} is not the file that was signed", retry=True)


async def within(limit_s: float, what: str, work: Awaitable[_T]) -> _T:
    """The answer of `work`, which is cancelled after `limit_s`.

    Raises:
        OtaError: `state_timeout`.
    """
    scope = asyncio.timeout(limit_s)
    try:
        async with scope:
            return await work
    except TimeoutError as e:
        if not scope.expired():
            raise
        raise OtaError(
            Reason.STATE_TIMEOUT,
            f"{what} took more than {limit_s:g} s",
            hint="it is tried again by itself; see the log for what hangs",
            retry=True,
        ) from e
