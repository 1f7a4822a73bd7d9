"""One update of one line, from its assignment to `committed` or back: the pipeline, step by step in one place.

Every step is journalled through `machine.step` before its act. Not here: what a failure means (`machine`), how the
files are had (`acquire`), where the assignment comes from (`repository`), which lines there are (`updater`).
Invariants: until `activate` the serving release is not touched; from `activate` on every way out but `committed` ends
in `Host.revert`; nothing of the candidate runs before the attempt was counted on disk; every state ends within its
limit, whatever the host does, with `state_timeout`. (Fetching ends when the slowest accepted rate is missed: `fetch`.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from ota.client import guard, machine, payloads
from ota.client.acquire import Acquisition, within
from ota.client.desired import Assignment, Grant
from ota.client.ledger import Ledger, Parts
from ota.client.machine import LIVE, Outcome, State
from ota.client.ports import Candidate, Installed, Transport, UpdateEvent
from ota.client.repository import raised_floor
from ota.errors import OtaError, Postponed, Reason, Rejected, StoreError, TransferError
from ota.release import Component, Release

# the device's own trouble, whatever the state
_NOBODYS_FAULT = (Reason.BUSY, Reason.STATE_TIMEOUT)


class Update:
    """One run for one line. Use it once.

    Args:
        still_wanted: asked before what was fetched is tried; raises when the release with that hash is not to be.

    Attributes:
        wanted: hash of the release.json it works on, empty before that is known.
        counter: release counter of that release; None before the release was read.
    """

    def __init__(
        self,
        parts: Parts,
        line: str,
        grants: Mapping[str, Grant] | None = None,
        transports: Sequence[Transport] = (),
        still_wanted: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._parts = parts
        self._line = line
        self._ledger = Ledger(parts, line)
        self._files = Acquisition(parts, self._ledger, grants or {}, transports)
        self._assignment: Assignment | None = None
        self._component_rejected = False
        self._granted = grants is not None
        self._still_wanted = still_wanted
        self.wanted = ""
        self.counter: int | None = None

    @property
    def holds(self) -> set[str]:
        """Plaintext hashes staged by this run, which no record names yet; they must not be collected."""
        return self._files.holds

    async def run(self, assignment: Assignment) -> UpdateEvent:
        """Bring the line to the assigned release; the event tells how it ended.

        Raises:
            StoreError: the journal cannot be written.
        """
        self._assignment, self.wanted = assignment, assignment.sha256
        version, ledger = assignment.version, self._ledger
        ledger.say(machine.CheckStarted(), version)
        try:
            record = ledger.record
            if record.active is not None and record.active.release_sha256 == assignment.sha256:
                return ledger.say(machine.NothingNew(), version, message=f"{self._line} {version} is installed")
            release = await self.acceptable(assignment)
            self.counter = release.release_counter
            choosing = self._parts.host.choose(release)
            choice = await within(self._parts.limits.metadata_timeout_s, "choosing a component", choosing)
            components = [release.component(name) for name in dict.fromkeys(choice.order)]
            # refused before anything is downloaded, and before a delta makes the line depend on a key it lacks
            for component in (*components[:1], release.golden):
                self._files.check_key(release, component.full)
            self._parts.store.put_release(release.raw, release.sha256)
            ledger.say(machine.ReleaseAssigned(version, release.sha256), version)
            rounds = [components] if choice.together and components else [[component] for component in components]
            return await self._try_rounds(release, rounds)
        except OtaError as e:
            return await self._end(e)

    async def acceptable(self, assignment: Assignment) -> Release:
        """The assigned release, if this device may run it; writes nothing.

        Raises:
            OtaError: it may not, or cannot be read.
        """
        guard.check_quarantine(self._ledger.record, assignment.sha256, assignment.version)
        release = await self._files.release(assignment)
        back = assignment.allow_rollback_to, assignment.allow_rollback_from
        guard.check_release(release, self._ledger.record, self._parts.identity, *back)
        return release

    async def refuse(self, error: OtaError) -> UpdateEvent:
        """Record that the line's assignment did not verify."""
        self._ledger.say(machine.CheckStarted())
        return await self._end(error)

    async def resume(self) -> UpdateEvent:
        """Try the waiting candidate again; needs no network.

        Raises:
            StoreError: the journal cannot be written.
        """
        ledger, record = self._ledger, self._ledger.record
        installed = record.candidate
        if installed is None:
            raise machine.IllegalTransitionError(f"{self._line}: no candidate waits")
        self.wanted, self.counter = installed.release_sha256, installed.release_counter
        release = self._parts.store.release(installed.release_sha256)
        if release is None:
            return ledger.say(machine.CandidateWithdrawn(), message="the files of the waiting candidate are gone")
        if record.attempts >= self._parts.limits.trial_attempts:
            return ledger.say(
                machine.AttemptsExhausted(),
                release.version,
                reason=Reason.INTERRUPTED,
                message=f"{record.attempts} trials of {self._line} {release.version} were interrupted; quarantined",
                hint="publish a newer release",
            )
        candidate = self._candidate(release, [release.component(installed.component)])
        for file in (candidate.component, release.golden):
            if not await self._files.stored(file):
                # no trial is counted for it: the device's disk is at fault
                ledger.save(machine.CandidateWithdrawn())
                message = f"{file.name} of the waiting {self._line} {release.version} is damaged or gone"
                hint = "nothing to do: the next look fetches it again"
                damaged = Reason.PAYLOAD_CORRUPT
                return ledger.event(release.version, Outcome.FAILED, reason=damaged, message=message, hint=hint)
        try:
            try:
                return await self._trial(candidate, machine.TrialResumed())
            except Rejected as e:
                if e.reason is Reason.BUSY or ledger.record.state is not State.TESTING:
                    raise
                return await self._try_others(release, installed.component, e)
        except OtaError as e:
            return await self._end(e)

    async def _try_others(self, release: Release, refused: str, error: Rejected) -> UpdateEvent:
        """The self-test refused the component that had waited: the release's further ones have their turn, as they
        would have had without the interruption."""
        choosing = self._parts.host.choose(release)
        choice = await within(self._parts.limits.metadata_timeout_s, "choosing a component", choosing)
        names = list(dict.fromkeys(choice.order))
        others = names[names.index(refused) + 1 :] if refused in names else names
        if not others:
            raise error
        self._component_rejected = True
        message = f"component {refused}: {error.message}; {others[0]} is tried instead"
        self._ledger.say(machine.ComponentRejected(), release.version, reason=error.reason, message=message)
        if not self._granted:
            raise TransferError(Reason.SOURCE_UNREACHABLE, f"{others[0]} is to be fetched first", retry=True)
        return await self._try_rounds(release, [[release.component(name)] for name in others])

    # -- trying it -----------------------------------------------------------------------------------------------------

    async def _try_rounds(self, release: Release, rounds: Sequence[Sequence[Component]]) -> UpdateEvent:
        """Fetch and try the components of one round after the other until one is taken."""
        for components, following in zip(rounds, [*rounds[1:], None], strict=True):
            await self._files.files(release, components)
            if self._still_wanted is not None:
                # keys may have been rotated, and releases withdrawn, while it was fetched
                await self._still_wanted(release.sha256)
            candidate = self._candidate(release, components)
            try:
                return await self._trial(candidate, machine.CandidateStaged(_installed(candidate)))
            except Rejected as e:
                if following is None or e.reason is Reason.BUSY or self._ledger.record.state is not State.TESTING:
                    raise
                self._component_rejected = True
                message = f"component {components[0].name}: {e.message}; {following[0].name} is tried instead"
                self._ledger.say(machine.ComponentRejected(), release.version, reason=e.reason, message=message)
        raise Rejected(Reason.NO_DELEGATE, f"no component of {release.line} {release.version} can run here")

    async def _trial(self, candidate: Candidate, begin: machine.CandidateStaged | machine.TrialResumed) -> UpdateEvent:
        """From `begin`, which counts the attempt, to the end."""
        host, limits, ledger = self._parts.host, self._parts.limits, self._ledger
        version, what = candidate.version, f"{self._line} {candidate.version}"
        async with self._accelerators(candidate):
            ledger.say(begin, version)
            testing = host.self_test(candidate)
            tested = await within(limits.testing_timeout_s, f"the self-test of {what}", testing)
            chosen = next(c for c in candidate.components if c.name == tested.component)
            candidate = self._candidate(candidate.release, [chosen])
            self._files.holds &= {chosen.plain_sha256, candidate.release.golden.plain_sha256}
            ledger.say(machine.SelfTestPassed(_installed(candidate)), version, tested=tested)
            activating = host.activate(candidate, tested)
            await within(limits.activating_timeout_s, f"activating {what}", activating)
            ledger.say(machine.Activated(), version, tested=tested)
        watching = host.probation(candidate)
        probation = await within(limits.probation_timeout_s, f"the probation of {what}", watching)
        outcome = self._commit(candidate)
        synthetic = " (synthetic)" if probation.synthetic else ""
        message = f"{what} committed{synthetic} with {candidate.component.name} on {tested.delegate}"
        return ledger.event(version, outcome, message=message, tested=tested, probation=probation)

    @asynccontextmanager
    async def _accelerators(self, candidate: Candidate) -> AsyncIterator[None]:
        """Hold every accelerator that the trial needs for itself; waiting for them is no attempt."""
        limits = self._parts.limits
        async with AsyncExitStack() as stack:
            # in one order everywhere, so that two updates never wait for each other
            for name in sorted(set(self._parts.host.exclusive(candidate))):
                await stack.enter_async_context(
                    self._parts.locks.exclusive(
                        name, self._line, wait_s=limits.lock_wait_s, timeout_s=limits.lock_timeout_s
                    )
                )
            yield

    def _commit(self, candidate: Candidate) -> Outcome | None:
        record = self._parts.journal.record
        line, outcome = machine.step(record.line(self._line), machine.ProbationPassed())
        record = record.with_line(line)
        if self._assignment is not None:
            issued, expires = candidate.release.issued, self._assignment.expires
            floor = raised_floor(record.clock_floor, issued, expires, self._parts.limits.clock_ceiling)
            record = replace(record, clock_floor=floor)
        self._parts.journal.save(record, commit=True)
        self._parts.collect()
        return outcome

    # -- bad ends ------------------------------------------------------------------------------------------------------

    async def _end(self, error: OtaError) -> UpdateEvent:
        """Every bad end: journal it, put the serving release back if the candidate was live, say so."""
        ledger, record = self._ledger, self._ledger.record
        # another release may be pending still when the assigned one is refused
        version = record.pending_version if self._assignment is None else self._assignment.version
        state = record.state
        outcome: Outcome | None = Outcome.FAILED
        try:
            # at rest nothing had begun: the waiting candidate found its accelerator in use
            if state is not State.IDLE:
                outcome = ledger.save(_failure(state, error, self._component_rejected))
            elif isinstance(error, Rejected) and error.reason is not Reason.BUSY:
                ledger.save(machine.CandidateWithdrawn())  # nothing here can try it any more
        finally:
            if state in LIVE:
                await self._revert()
        if outcome is not Outcome.FAILED:
            self._parts.collect()
        if isinstance(error, Postponed):
            outcome = None  # by policy: it goes on later, and nobody failed
        return ledger.event(
            version, outcome, reason=error.reason, message=error.message, hint=error.hint, attempt=record.attempts
        )

    async def _revert(self) -> None:
        try:
            await put_back(self._parts, self._line)
        except OtaError as e:
            self._ledger.tell("", e.reason, f"the committed release does not serve: {e.message}")

    def _candidate(self, release: Release, components: Sequence[Component]) -> Candidate:
        opener = payloads.opener(self._parts.store)
        return Candidate(release, components[0], opener, alternatives=tuple(components[1:]))


async def put_back(parts: Parts, line: str) -> None:
    """Let the host serve the committed release of `line` again; when cancelled here, it stays to be done.

    Raises:
        OtaError: it does not serve.
    """
    parts.unreverted.add(line)
    try:
        active = parts.journal.record.line(line).active
        previous = None if active is None else payloads.stored_candidate(parts.store, active)
        reverting = parts.host.revert(line, previous)
        await within(parts.limits.revert_timeout_s, f"putting the committed release of {line} back", reverting)
    except OtaError:
        parts.unreverted.discard(line)
        raise
    parts.unreverted.discard(line)


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
    at_fault = not isinstance(error, TransferError | StoreError) and error.reason not in _NOBODYS_FAULT
    not_yet = error.reason is Reason.BUSY or (error.reason is Reason.NO_DELEGATE and error.retry)
    if state is State.TESTING and not_yet:
        return machine.TrialPostponed(error.reason)
    if state in (State.TESTING, *LIVE):
        at_fault = at_fault and isinstance(error, Rejected)
        return machine.CandidateRejected(error.reason) if at_fault else machine.UpdateFailed(error.reason)
    if at_fault:
        return machine.UpdateRefused(error.reason, quarantine=state is State.VERIFYING or component_rejected)
    return machine.UpdateFailed(error.reason)
