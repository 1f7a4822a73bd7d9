"""One update of one line, from its assignment to `committed` or back: the pipeline, step by step in one place.

Every step is journalled through `machine.step` before its act. Not here: what a failure means (`machine`), where the
assignment comes from (`repository`), which lines there are (`updater`).
Invariants: until `activate` the serving release is not touched; from `activate` on every way out but `committed` ends
in `Host.revert`; nothing of the candidate runs before the attempt was counted on disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

from ota import release as releases
from ota.client import guard, machine, payloads
from ota.client.desired import Assignment, Grant
from ota.client.fetch import Inbox
from ota.client.journal import Journal
from ota.client.limits import Limits
from ota.client.machine import LIVE, LineRecord, Outcome, State
from ota.client.payloads import Plan
from ota.client.ports import (
    Candidate,
    DeviceKeys,
    Host,
    Identity,
    Installed,
    Probation,
    Tested,
    Traffic,
    Transport,
    UpdateEvent,
)
from ota.client.repository import raised_floor
from ota.client.store import Store, sealed_size
from ota.client.transfer import Counts
from ota.errors import OtaError, PayloadError, Reason, Rejected, StoreError, TransferError
from ota.release import Component, Release


class Details(TypedDict, total=False):
    """Optional fields of an `UpdateEvent`."""

    reason: Reason
    message: str
    hint: str
    attempt: int
    tested: Tested
    probation: Probation


# a delta that is not there, or whose blocks are wrong wherever they come from, is no reason not to update
_NO_DELTA = (Reason.NOT_FOUND, Reason.TRANSFER_CORRUPT)


@dataclass(frozen=True, slots=True)
class Parts:
    """What every update of this device works with."""

    identity: Identity
    keys: DeviceKeys
    journal: Journal
    store: Store
    inbox: Inbox
    host: Host
    limits: Limits
    emit: Callable[[UpdateEvent], None]
    collect: Callable[[], None]


class Update:
    """One run for one line. Use it once.

    Attributes:
        holds: plaintext hashes staged by this run, which no record names yet; they must not be collected.
    """

    def __init__(self, parts: Parts, line: str, metadata_bytes: int = 0) -> None:
        self._parts = parts
        self._line = line
        self._counts = Counts()
        self._traffic = Traffic(metadata_bytes=metadata_bytes)
        self._assignment: Assignment | None = None
        self._grants: Mapping[str, Grant] = {}
        self._transports: Sequence[Transport] = ()
        self._component_rejected = False
        self.holds: set[str] = set()

    async def run(
        self, assignment: Assignment, grants: Mapping[str, Grant], transports: Sequence[Transport]
    ) -> UpdateEvent:
        """Bring the line to the assigned release; the event tells how it ended.

        Raises:
            StoreError: the journal cannot be written.
        """
        self._assignment, self._grants, self._transports = assignment, grants, transports
        version = assignment.version
        self._say(machine.CheckStarted(), version)
        try:
            record = self._record
            if record.active is not None and record.active.release_sha256 == assignment.sha256:
                return self._say(machine.NothingNew(), version, message=f"{self._line} {version} is installed")
            guard.check_quarantine(record, assignment.sha256, version)
            release = await self._release(assignment)
            guard.check_release(release, record, self._parts.identity)
            choice = await self._parts.host.choose(release)
            components = [release.component(name) for name in dict.fromkeys(choice.order)]
            # refused before anything is downloaded, and before a delta makes the line depend on a key it lacks
            for component in (*components[:1], release.golden):
                self._key(release, component.full)
            self._parts.store.put_release(release.raw, release.sha256)
            self._say(machine.ReleaseAssigned(version, release.sha256), version)
            rounds = [components] if choice.together and components else [[component] for component in components]
            return await self._try_rounds(release, rounds)
        except OtaError as e:
            return await self._end(e)

    async def refuse(self, error: OtaError) -> UpdateEvent:
        """Record that the line's assignment did not verify."""
        self._say(machine.CheckStarted())
        return await self._end(error)

    async def resume(self) -> UpdateEvent:
        """Try the waiting candidate again; needs no network.

        Raises:
            StoreError: the journal cannot be written.
        """
        record = self._record
        installed = record.candidate
        if installed is None:
            raise machine.IllegalTransitionError(f"{self._line}: no candidate waits")
        release = self._parts.store.release(installed.release_sha256)
        if release is None:
            return self._say(machine.CandidateWithdrawn(), message="the files of the waiting candidate are gone")
        if record.attempts >= self._parts.limits.trial_attempts:
            return self._say(
                machine.AttemptsExhausted(),
                release.version,
                reason=Reason.INTERRUPTED,
                message=f"{record.attempts} trials of {self._line} {release.version} were interrupted; quarantined",
                hint="publish a newer release",
            )
        candidate = self._candidate(release, [release.component(installed.component)])
        self._say(machine.TrialResumed(), release.version)
        try:
            return await self._trial(candidate)
        except OtaError as e:
            return await self._end(e)

    # -- getting the bytes ---------------------------------------------------------------------------------------------

    async def _release(self, assignment: Assignment) -> Release:
        kept = self._parts.store.release(assignment.sha256)
        data = kept.raw if kept is not None else await self._fetch_release(assignment)
        release = releases.parse(data)
        if release.sha256 != assignment.sha256 or len(data) != assignment.length:
            raise OtaError(Reason.METADATA_MISMATCH, f"{assignment.path} is not the file that was signed", retry=True)
        if (release.line, release.version) != (assignment.line, assignment.version):
            raise OtaError(Reason.BAD_RELEASE, f"{assignment.path} describes {release.line} {release.version}")
        return release

    async def _fetch_release(self, assignment: Assignment) -> bytes:
        failure: TransferError | None = None
        for transport in self._transports:
            try:
                async with asyncio.timeout(self._parts.limits.metadata_timeout_s):
                    data = await transport.target(assignment.path, assignment.sha256, assignment.length)
            except TimeoutError:
                failure = TransferError(Reason.TRANSFER_TIMEOUT, f"{transport.name} did not answer", retry=True)
            except TransferError as e:
                failure = failure or e
            else:
                self._traffic = replace(self._traffic, metadata_bytes=self._traffic.metadata_bytes + len(data))
                return data
        raise failure or TransferError(Reason.SOURCE_UNREACHABLE, "there is no transport to fetch from", retry=True)

    async def _try_rounds(self, release: Release, rounds: Sequence[Sequence[Component]]) -> UpdateEvent:
        """Fetch and try the components of one round after the other until one is taken."""
        for components, following in zip(rounds, [*rounds[1:], None], strict=True):
            await self._acquire(release, components)
            candidate = self._candidate(release, components)
            self._say(machine.CandidateStaged(_installed(candidate)), release.version)
            try:
                return await self._trial(candidate)
            except Rejected as e:
                if following is None or e.reason is Reason.BUSY or self._record.state is not State.TESTING:
                    raise
                self._component_rejected = True
                message = f"component {components[0].name}: {e.message}; {following[0].name} is tried instead"
                self._say(machine.ComponentRejected(), release.version, reason=e.reason, message=message)
        raise Rejected(Reason.NO_DELEGATE, f"no component of {release.line} {release.version} can run here")

    async def _acquire(self, release: Release, components: Sequence[Component]) -> None:
        """FETCHING until everything but the trial is done: payloads of the components and the golden vectors."""
        parts = self._parts
        files = (*components, release.golden)
        for component in components:
            self._key(release, component.full)
        waiting = [self._plan(file) for file in files if not self._stored(file)]
        self.holds |= {file.plain_sha256 for file in files}
        needed = sum(parts.inbox.missing_bytes(p.payload) + sealed_size(p.component.plain_length) for p in waiting)
        parts.store.admit(needed, f"{release.line} {release.version}")
        self._traffic = replace(
            self._traffic,
            full_bytes=self._traffic.full_bytes + sum(p.component.full.length for p in waiting),
            delta_bytes=self._traffic.delta_bytes + sum(p.payload.length for p in waiting if p.is_delta),
        )
        await self._fetch(release, waiting)
        while waiting:
            chosen = waiting[0]
            try:
                fd = await self._open(release, chosen)
            except (PayloadError, Rejected, StoreError) as e:
                if not chosen.is_delta:
                    raise
                await self._fall_back(release, waiting, e)
                continue
            try:
                self._say(machine.FileVerified(), release.version)
                parts.store.put(fd, chosen.component.plain_sha256, chosen.component.plain_length)
            finally:
                os.close(fd)
            parts.inbox.discard(chosen.payload)
            del waiting[0]
            if waiting:
                self._say(machine.FileStaged(), release.version)

    async def _fetch(self, release: Release, waiting: list[Plan]) -> None:
        for position, chosen in enumerate(waiting):
            try:
                await self._parts.inbox.fetch(chosen.payload, self._transports, self._counts)
            except TransferError as e:
                if not chosen.is_delta or e.reason not in _NO_DELTA:
                    raise
                self._parts.inbox.discard(chosen.payload)
                waiting[position] = chosen.full()
                self._tell(release.version, e.reason, f"{e.message}; the full payload is fetched instead")
                await self._parts.inbox.fetch(chosen.component.full, self._transports, self._counts)
        self._say(machine.PayloadsFetched(), release.version)

    async def _open(self, release: Release, chosen: Plan) -> int:
        key = self._key(release, chosen.payload)
        await asyncio.sleep(0)  # decryption does not yield: let the daemon's other tasks run between two files
        sealed = self._parts.inbox.chunks(chosen.payload)
        return await payloads.open_payload(release, chosen, sealed, key, self._parts.store, self._parts.host)

    async def _fall_back(self, release: Release, waiting: list[Plan], error: OtaError) -> None:
        """The first waiting delta failed: its full payload, once."""
        delta = waiting[0]
        waiting[0] = delta.full()
        self._say(
            machine.DeltaRefused(),
            release.version,
            reason=error.reason,
            message=f"the delta of {delta.component.name} failed ({error.message}); the full payload is fetched",
        )
        self._parts.inbox.discard(delta.payload)
        self._parts.store.admit(
            self._parts.inbox.missing_bytes(waiting[0].payload), f"{release.line} {release.version}"
        )
        await self._fetch(release, waiting)

    def _plan(self, component: Component) -> Plan:
        bases = set()
        for installed in (self._record.active, self._record.previous):
            if installed is not None:
                bases |= {installed.plain_sha256, installed.golden_sha256}
        return payloads.plan(component, {sha256 for sha256 in bases if self._parts.store.has(sha256)})

    def _stored(self, component: Component) -> bool:
        """Whether the store has the file whole; a damaged one is removed."""
        store = self._parts.store
        if not store.has(component.plain_sha256):
            return False
        try:
            os.close(store.open(component.plain_sha256))
        except StoreError as e:
            if e.reason is not Reason.PAYLOAD_CORRUPT:
                raise
            store.discard(component.plain_sha256)
            return False
        return True

    def _key(self, release: Release, wanted: releases.Payload) -> bytes:
        parts = self._parts
        return payloads.content_key(release, wanted, self._grants, parts.keys, parts.identity.device)

    # -- trying it -----------------------------------------------------------------------------------------------------

    async def _trial(self, candidate: Candidate) -> UpdateEvent:
        """From TESTING to the end."""
        host = self._parts.host
        version = candidate.version
        tested = await host.self_test(candidate)
        chosen = next(c for c in candidate.components if c.name == tested.component)
        candidate = self._candidate(candidate.release, [chosen])
        self.holds &= {chosen.plain_sha256, candidate.release.golden.plain_sha256}
        self._say(machine.SelfTestPassed(_installed(candidate)), version, tested=tested)
        await host.activate(candidate, tested)
        self._say(machine.Activated(), version, tested=tested)
        probation = await host.probation(candidate)
        record = self._parts.journal.record
        line, outcome = machine.step(record.line(self._line), machine.ProbationPassed())
        record = record.with_line(line)
        if self._assignment is not None:
            issued, expires = candidate.release.issued, self._assignment.expires
            floor = raised_floor(record.clock_floor, issued, expires, self._parts.limits.clock_ceiling)
            record = replace(record, clock_floor=floor)
        self._parts.journal.save(record, commit=True)
        self._parts.collect()
        synthetic = " (synthetic)" if probation.synthetic else ""
        message = f"{self._line} {version} committed{synthetic} with {candidate.component.name} on {tested.delegate}"
        return self._event(version, outcome, message=message, tested=tested, probation=probation)

    async def _end(self, error: OtaError) -> UpdateEvent:
        """Every bad end: journal it, put the serving release back if the candidate was live, say so."""
        record = self._record
        version, state = record.pending_version, record.state
        if self._assignment is not None:
            version = version or self._assignment.version
        event = _failure(state, error, self._component_rejected)
        try:
            outcome = self._save(event)
        finally:
            if state in LIVE:
                await self._revert()
        if outcome is not Outcome.FAILED:
            self._parts.collect()
        return self._event(
            version, outcome, reason=error.reason, message=error.message, hint=error.hint, attempt=record.attempts
        )

    async def _revert(self) -> None:
        active = self._record.active
        previous = None if active is None else payloads.stored_candidate(self._parts.store, active)
        try:
            await self._parts.host.revert(self._line, previous)
        except OtaError as e:
            self._tell("", e.reason, f"the committed release does not serve: {e.message}")

    def _candidate(self, release: Release, components: Sequence[Component]) -> Candidate:
        opener = payloads.opener(self._parts.store)
        return Candidate(release, components[0], opener, alternatives=tuple(components[1:]))

    # -- saying it -----------------------------------------------------------------------------------------------------

    @property
    def _record(self) -> LineRecord:
        return self._parts.journal.record.line(self._line)

    def _save(self, event: machine.Event) -> Outcome | None:
        journal = self._parts.journal
        line, outcome = machine.step(self._record, event)
        journal.save(journal.record.with_line(line))
        return outcome

    def _say(self, event: machine.Event, version: str = "", **details: Unpack[Details]) -> UpdateEvent:
        return self._event(version, self._save(event), **details)

    def _tell(self, version: str, reason: Reason, message: str) -> None:
        self._event(version, None, reason=reason, message=message)

    def _event(self, version: str, outcome: Outcome | None, **details: Unpack[Details]) -> UpdateEvent:
        counts, record = self._counts, self._record
        traffic = replace(
            self._traffic,
            fetched_bytes=counts.fetched_bytes,
            refetched_bytes=counts.refetched_bytes,
            duplicate_bytes=counts.duplicate_bytes,
        )
        details.setdefault("attempt", record.attempts)
        ended = None if outcome is None else outcome.value
        said = UpdateEvent(self._line, version, record.state.value, ended, traffic=traffic, **details)
        self._parts.emit(said)
        return said


def _installed(candidate: Candidate) -> Installed:
    release = candidate.release
    return Installed(
        line=release.line,
        version=release.version,
        release_counter=release.release_counter,
        release_sha256=release.sha256,
        component=candidate.component.name,
        plain_sha256=candidate.component.plain_sha256,
        golden_sha256=release.golden.plain_sha256,
    )


def _failure(state: State, error: OtaError, component_rejected: bool) -> machine.Event:
    """Whose fault `error` was in `state`. A release is quarantined once its bytes were opened or it ran."""
    at_fault = not isinstance(error, TransferError | StoreError) and error.reason is not Reason.BUSY
    if state is State.TESTING and error.reason is Reason.BUSY:
        return machine.TrialPostponed(error.reason)
    if state in (State.TESTING, *LIVE):
        at_fault = at_fault and isinstance(error, Rejected)
        return machine.CandidateRejected(error.reason) if at_fault else machine.UpdateFailed(error.reason)
    if at_fault:
        return machine.UpdateRefused(error.reason, quarantine=state is State.VERIFYING or component_rejected)
    return machine.UpdateFailed(error.reason)
