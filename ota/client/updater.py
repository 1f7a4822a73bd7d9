"""The device side of updates as one object: check, resume, roll back, sideload; all lines of a device.

Order of use: construct, `await recover()` once, serve `active(line)` for every line, then `check` as often as wanted.
Not here: the steps of one update (`update`), trust (`repository`, `trust`), anything that runs a model (`ports.Host`).
Invariants: one update per line at a time, and lines do not wait for each other; a repository is refreshed by one task
at a time; whatever goes wrong, `active(line)` stays a committed release whose files open, if the device has any; a
device whose revocation was verified installs nothing any more.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from ota.client import machine, payloads, rivals
from ota.client.configuration import Configuration
from ota.client.desired import Assignment, Desired
from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.journal import Journal, Record
from ota.client.ledger import Parts
from ota.client.limits import Limits
from ota.client.locks import Locks, LockView
from ota.client.machine import LIVE, Outcome, State
from ota.client.policy import Gate
from ota.client.ports import Candidate, Clock, DeviceKeys, Host, Identity, Transport, UpdateEvent
from ota.client.repository import Repository
from ota.client.rest import Rest
from ota.client.rivals import Run
from ota.client.store import Store
from ota.client.transports.stick import reach
from ota.client.update import Update, put_back
from ota.client.wishes import Wishes
from ota.errors import OtaError, Reason

MAIN = "main"
SIDELOAD = "sideload"


class Updater:
    """All updates of one device.

    Args:
        fs: the state directory.
        identity: id, profile and agent version of this device.
        keys: its secrets.
        pinned_root: root metadata that enrolment wrote.
        transports: sources in order of preference; one that cannot be reached is passed over for the next.
        host: runs the models.
        clock: wall clock, UTC.
        rng: jitter.
        limits: every bound.
        on_event: told of every step, in order; must not block and must not raise.
        on_revoked: called once, when verified metadata says that this device is expelled.
        on_settings: given the settings that verified metadata wants here (None for none), after every refresh.

    Attributes:
        settings: which settings are in force or on trial; whoever embeds this acts on them.
        gate: when and how fast payloads are fetched; None at any time.

    Raises:
        StoreError: the state directory cannot be used at all.
    """

    def __init__(
        self,
        fs: Fs,
        identity: Identity,
        keys: DeviceKeys,
        pinned_root: bytes,
        transports: Sequence[Transport],
        host: Host,
        clock: Clock,
        rng: random.Random,
        limits: Limits,
        on_event: Callable[[UpdateEvent], None],
        on_revoked: Callable[[], None] = lambda: None,
        on_settings: Callable[[str | None], None] = lambda _: None,
        gate: Gate | None = None,
    ) -> None:
        self._fs = fs
        self._pinned_root = pinned_root
        self._transports = tuple(transports)
        self._limits = limits
        self._journal = Journal(fs)
        self._store = Store(fs, keys.storage, limits.reserve_bytes, keys.retired_storage)
        self._main = Repository(fs, self._journal, MAIN, pinned_root, limits)
        self.settings = Configuration(fs, self._journal)
        self._locks = Locks()
        device = (identity, keys, self._journal, self._store, Inbox(fs, limits, rng, gate), host)
        self._parts = Parts(*device, limits, self._locks, on_event, lambda: self._rest.collect())
        self._rest = Rest(self._parts, lambda: {held for run in self._running.values() for held in run.update.holds})
        self._on_revoked = on_revoked
        self._on_settings = on_settings
        self._wishes = Wishes(self._parts, clock, self._expel)
        self._running: dict[str, Run] = {}

    @property
    def record(self) -> Record:
        """What is installed, pending and quarantined, and the floors; for status and telemetry."""
        return self._journal.record

    def locks(self) -> list[LockView]:
        """Which line holds which accelerator and how much disk, and who waits; for status."""
        return self._locks.view()

    @property
    def store(self) -> Store:
        """The sealed files; for the rotation of the key they are under."""
        return self._store

    @property
    def busy(self) -> bool:
        """Whether an update of some line is under way."""
        return bool(self._running)

    def active(self, line: str) -> Candidate | None:
        """The committed release of a line, for the host to serve; None before the first commit.

        Raises:
            StoreError: `io_error`.
        """
        installed = self._rest.line(line).active
        return None if installed is None else payloads.stored_candidate(self._store, installed)

    async def recover(self) -> list[UpdateEvent]:
        """Bring every line to rest after a restart: applies the recovery map, replaces an active release whose files no
        longer open by the previous one, removes what nobody needs. Calls no method of the host: nothing serves yet.
        Interrupted trials go on at the next `check`, network or not.

        Returns:
            What was found wrong, also given to `on_event`.
        """
        events: list[UpdateEvent] = []
        if self._journal.condition is not None:
            events.append(self._rest.device_event(self._journal.condition))
        for name in sorted(self.record.lines):
            if name in self._running:
                continue  # people are answered already: it has brought its line to rest, and the others must not wait
            try:
                async with self.starting(name):
                    events += self._rest.settle(name)
                    events += await self._rest.check_active(name)
            except OtaError as e:
                events.append(self._rest.line_event(name, None, e))
            await asyncio.sleep(0)
        self._rest.collect()
        return events

    async def check(self, line: str | None = None) -> list[UpdateEvent]:
        """Refresh the metadata and bring one line, or all, to what is assigned.

        Returns:
            The last event of every line that was looked at, and one for the device when the refresh failed.
        """
        return await self._round(self._main, self._transports, line)

    async def consult(self, transport: Transport) -> bool:
        """Whether `transport` proves that this device is expelled; `on_revoked` was called then. Nothing is installed.

        Raises:
            OtaError: they cannot be had or verified.
        """
        try:
            await self._wishes.ask(self._main, (transport,), allow_expired=False)
        except OtaError as e:
            if e.reason is not Reason.DEVICE_REVOKED:
                raise
            return True
        return False

    async def sideload(
        self, path: Path, root: bytes | None = None, *, allow_expired: bool = False
    ) -> list[UpdateEvent]:
        """Update from a directory or stored zip with a repository in it; the same checks as over the network.

        Args:
            root: pinned root of that repository, which names its floors; None for the one from enrolment.
            allow_expired: an operator answers for it that dates are not looked at; floors and counters are.
        """
        try:
            transport = await reach(path, self._parts.identity.device)
            anchor = root or self._pinned_root
            name = f"{SIDELOAD}-{hashlib.sha256(anchor).hexdigest()[:12]}"
            repository = Repository(self._fs, self._journal, name, anchor, self._limits)
        except OtaError as e:
            return [self._rest.device_event(e)]
        return await self._round(repository, (transport,), None, allow_expired)

    def starting(self, line: str) -> AbstractAsyncContextManager[None]:
        """Held while the host is brought to serve `active(line)`; whoever would change that waits. Raises `busy`."""
        return self._writing(line, "start")

    async def serve(self, line: str) -> None:
        """Let the host serve the committed release of a line that it could not serve at the start.

        Raises:
            OtaError: it does not serve.
        """
        async with self.starting(line):
            await put_back(self._parts, line)

    async def rollback(self, line: str) -> UpdateEvent:
        """Serve the previous release again, because a person says so; the active one is quarantined.

        Raises:
            OtaError: `busy` while an update of the line runs; `not_found` without a previous release.
            StoreError: the previous release does not open, or the journal cannot be written; nothing changed.
        """
        self._refuse_busy(line)
        async with self._writing(line, "rollback"):
            self._refuse_busy(line)
            return await self._rest.go_back(line, machine.OperatorRolledBack(), "")

    async def unfit(self, line: str, release_sha256: str, error: OtaError) -> UpdateEvent | None:
        """Serve the previous release again because the committed one keeps failing in service with `error`; it is
        quarantined. An update under way that has not gone live makes room and is tried again later.

        Returns:
            How it ended; None when that release is not the committed one any more, or does not serve now.

        Raises:
            OtaError: `not_found` without a previous release; `busy` when the update does not end.
            StoreError: the previous release does not open, or the journal cannot be written; nothing changed.
        """
        if self._rest.line(line).state in LIVE or not self._rest.is_active(line, release_sha256):
            return None
        if (run := self._running.get(line)) is not None:
            run.error = rivals.postponed(line)
            await self._stop(line, run)
        async with self._writing(line, "rollback"):
            if not self._rest.is_active(line, release_sha256):
                return None
            return await self._rest.go_back(line, machine.ActiveUnfit(error.reason), f": {error.message}")

    def retry(self, line: str) -> None:
        """Lift the quarantine of a line's releases, because a person says so.

        Raises:
            OtaError: `busy` while an update of the line runs or is not cleared up yet.
            StoreError: the journal cannot be written.
        """
        self._refuse_busy(line)
        record = self._rest.line(line)
        if record.state is not State.IDLE:
            raise rivals.unsettled(line)
        if record.quarantine:
            self._rest.save(record, machine.QuarantineLifted())

    async def cancel(self, line: str) -> bool:
        """Stop the running update of a line and return to what it served before; False when none runs. What was
        fetched stays for the next check."""
        run = self._running.get(line)
        if run is None:
            return False
        run.error = rivals.cancelled(line)
        await self._stop(line, run)
        return True

    async def _stop(self, line: str, run: Run) -> None:
        """Cancel a running update and bring its line to rest.

        Raises:
            OtaError: `busy`: it did not end.
        """
        run.task.cancel()
        _, pending = await asyncio.wait([run.task], timeout=self._limits.cancel_timeout_s)
        if pending:
            raise rivals.stuck(line)
        if line in self._running:
            return  # whoever took its place clears up behind it
        async with self._writing(line, "cancel"):
            if line not in self._running:
                await self._rest.rest(line)

    # -- one round over the lines --------------------------------------------------------------------------------------

    async def _round(
        self, repository: Repository, transports: Sequence[Transport], line: str | None, allow_expired: bool = False
    ) -> list[UpdateEvent]:
        events: list[UpdateEvent] = []
        desired: Desired | None = None
        try:
            desired = await self._wishes.ask(repository, transports, allow_expired=allow_expired)
            if repository is self._main:
                self._on_settings(desired.settings)
        except OtaError as e:
            events.append(self._rest.device_event(e))
        if self._wishes.revoked:
            return events
        names = {name for name, record in self.record.lines.items() if record.candidate or self._rest.unsettled(name)}
        names -= self._running.keys()
        named = set() if desired is None else set(desired.assignments) | set(desired.refused)
        # a stick says nothing of lines that are not on it
        names = names | named if repository is self._main else named
        if line is not None:
            names &= {line}
        elif repository is self._main:
            names -= {n for n, run in self._running.items() if rivals.goes_on(run, self._rest.line(n), desired)}
        ended = await asyncio.gather(
            *(self._one(name, desired, transports, repository.name) for name in sorted(names)), return_exceptions=True
        )
        for result in ended:
            if isinstance(result, UpdateEvent):
                events.append(result)
            elif not isinstance(result, asyncio.CancelledError):
                raise result
        if line is not None and not events:
            events.append(self._rest.line_event(line, Outcome.UP_TO_DATE, None))
        return events

    def _expel(self) -> None:
        for run in self._running.values():
            run.error = rivals.expelled()
            run.task.cancel()
        self._on_revoked()

    async def _one(
        self, line: str, desired: Desired | None, transports: Sequence[Transport], source: str
    ) -> UpdateEvent:
        """One line's part of a round, as a task that `cancel` can find."""
        assignment = None if desired is None else desired.assignments.get(line)
        version = assignment.version if assignment else self._rest.line(line).pending_version
        # a stick does not change while it is read
        recheck = self._wishes.recheck(self._main, transports, line) if source == MAIN else None
        update = Update(self._parts, line, None if desired is None else desired.grants, transports, recheck)
        try:
            await self._make_room(line, update, assignment, source)
        except OtaError as e:
            return self._rest.line_event(line, Outcome.FAILED, e, version)
        # from here on `cancel` finds the new one; it begins when the one before it has ended
        task = asyncio.get_running_loop().create_task(self._advance(line, update, desired, source))
        run = Run(task, update, source, version)
        self._running[line] = run
        task.add_done_callback(lambda _: self._forget(line, run))
        try:
            return await task
        except asyncio.CancelledError:
            ours = asyncio.current_task()
            if not task.cancelled() or run.error is None or ours is None or ours.cancelling():
                task.cancel()
                raise
            return self._rest.line_event(line, Outcome.FAILED, run.error, run.version)

    async def _make_room(self, line: str, update: Update, assignment: Assignment | None, source: str) -> None:
        """Cancel the running update of a line if `update` may take its place.

        Raises:
            OtaError: the running one stays: `busy`, `superseded`, or why the contender may not run at all.
        """
        while (run := self._running.get(line)) is not None:
            rivals.check_other(run, line, assignment.sha256 if assignment else None)
            if assignment is None:
                return
            release = await update.acceptable(assignment)
            update.wanted, update.counter = release.sha256, release.release_counter
            error = rivals.outranked(run, release, latest_decides=source == run.source == MAIN)
            if self._running.get(line) is run:
                run.error = error
                run.task.cancel()
                return

    def _forget(self, line: str, run: Run) -> None:
        if self._running.get(line) is run:
            del self._running[line]

    def _writing(self, line: str, who: str) -> AbstractAsyncContextManager[None]:
        """Whoever changes a line's record or its serving release does so alone; `busy` and `state_timeout` as there."""
        limits = self._limits
        return self._locks.exclusive(f"line {line}", who, wait_s=limits.lock_wait_s, timeout_s=limits.update_timeout_s)

    async def _advance(self, line: str, update: Update, desired: Desired | None, source: str) -> UpdateEvent:
        assignment = None if desired is None else desired.assignments.get(line)
        try:
            async with self._writing(line, "update"):
                await self._rest.rest(line)
                candidate = self._rest.line(line).candidate
                if source != MAIN and desired is not None:
                    await rivals.spare(self._rest.line(line), desired, update)
                    if assignment is not None and self._rest.is_active(line, assignment.sha256):
                        return await update.run(assignment)
                if candidate is not None:
                    if desired is None or (assignment and assignment.sha256 == candidate.release_sha256):
                        return await update.resume()
                    self._rest.save(self._rest.line(line), machine.CandidateWithdrawn())
                if assignment is not None:
                    return await update.run(assignment)
                if desired is not None and line in desired.refused:
                    return await update.refuse(desired.refused[line])
                return self._rest.line_event(line, Outcome.UP_TO_DATE, None)
        except OtaError as e:
            return self._rest.line_event(line, Outcome.FAILED, e, assignment.version if assignment else "")

    def _refuse_busy(self, line: str) -> None:
        if line in self._running:
            raise rivals.running(line)
