"""The device side of updates as one object: check, resume, roll back, sideload; all lines of a device.

Order of use: construct, `await recover()` once, serve `active(line)` for every line, then `check` as often as wanted.
Not here: the steps of one update (`update`), trust (`repository`, `trust`), anything that runs a model (`ports.Host`).
Invariants: one update per line at a time, and lines do not wait for each other; a repository is refreshed by one task
at a time; whatever goes wrong, `active(line)` stays a committed release whose files open, if the device has any.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from ota.client import machine, payloads
from ota.client.desired import Desired
from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.journal import Journal, Record
from ota.client.limits import Limits
from ota.client.machine import LIVE, LineRecord, Outcome, State
from ota.client.ports import Candidate, Clock, DeviceKeys, Host, Identity, Installed, Traffic, Transport, UpdateEvent
from ota.client.repository import Refreshed, Repository
from ota.client.store import Store
from ota.client.transports.directory import DirectoryTransport
from ota.client.update import Parts, Update
from ota.errors import OtaError, Reason, StoreError

DEVICE = "*"
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
    ) -> None:
        self._fs = fs
        self._pinned_root = pinned_root
        self._transports = tuple(transports)
        self._clock = clock
        self._limits = limits
        self._emit = on_event
        self._journal = Journal(fs)
        self._store = Store(fs, keys.storage, limits.reserve_bytes)
        inbox = Inbox(fs, limits, rng)
        self._inbox = inbox
        self._main = Repository(fs, self._journal, MAIN, pinned_root, limits)
        self._parts = Parts(identity, keys, self._journal, self._store, inbox, host, limits, on_event, self._collect)
        self._refreshing: dict[str, asyncio.Lock] = {}
        self._running: dict[str, tuple[asyncio.Task[UpdateEvent], Update]] = {}

    @property
    def record(self) -> Record:
        """What is installed, pending and quarantined, and the floors; for status and telemetry."""
        return self._journal.record

    def active(self, line: str) -> Candidate | None:
        """The committed release of a line, for the host to serve; None before the first commit.

        Raises:
            StoreError: `io_error`.
        """
        installed = self._line(line).active
        return None if installed is None else payloads.stored_candidate(self._store, installed)

    async def recover(self) -> list[UpdateEvent]:
        """Bring every line to rest after a restart: applies the recovery map, replaces an active release whose files
        no longer open by the previous one, removes what nobody needs. Calls no method of the host: nothing serves
        yet. Interrupted trials go on at the next `check`, network or not.

        Returns:
            What was found wrong, also given to `on_event`.
        """
        events: list[UpdateEvent] = []
        if self._journal.condition is not None:
            events.append(self._device_event(self._journal.condition))
        for name in sorted(self.record.lines):
            try:
                events += self._settle(name)
                events += self._check_active(name)
            except StoreError as e:
                events.append(self._line_event(name, None, e))
            await asyncio.sleep(0)
        self._collect()
        return events

    async def check(self, line: str | None = None) -> list[UpdateEvent]:
        """Refresh the metadata and bring one line, or all, to what is assigned.

        Returns:
            The last event of every line that was looked at, and one for the device when the refresh failed.
        """
        return await self._round(self._main, self._transports, line)

    async def sideload(self, path: Path, root: bytes | None = None) -> list[UpdateEvent]:
        """Update from a directory with a repository in it; the same checks as over the network.

        Args:
            root: pinned root of that repository, which names its floors; None for the one from enrolment.
        """
        try:
            transport = DirectoryTransport(path, self._parts.identity.device)
            anchor = root or self._pinned_root
            name = f"{SIDELOAD}-{hashlib.sha256(anchor).hexdigest()[:12]}"
            repository = Repository(self._fs, self._journal, name, anchor, self._limits)
        except OtaError as e:
            return [self._device_event(e)]
        return await self._round(repository, (transport,), None)

    async def rollback(self, line: str) -> UpdateEvent:
        """Serve the previous release again, because a person says so; the active one is quarantined.

        Raises:
            OtaError: `busy` while an update of the line runs; `not_found` without a previous release.
            StoreError: the previous release does not open, or the journal cannot be written; nothing changed.
        """
        self._refuse_busy(line)
        await self._rest(line)
        record = self._line(line)
        previous = None if record.previous is None else payloads.stored_candidate(self._store, record.previous)
        if record.previous is None or previous is None:
            raise OtaError(
                Reason.NOT_FOUND, f"{line} has no previous release", hint="edge-agent status shows what is installed"
            )
        self._prove(record.previous)
        outcome = self._save(record, machine.OperatorRolledBack())
        failure: OtaError | None = None
        try:
            await self._parts.host.revert(line, previous)
        except OtaError as e:
            failure = e
        message = f"{line} is back at {previous.version}" + (
            f", which does not serve: {failure.message}" if failure else ""
        )
        return self._line_event(line, outcome, OtaError(Reason.OPERATOR, message), previous.version)

    def retry(self, line: str) -> None:
        """Lift the quarantine of a line's releases, because a person says so.

        Raises:
            OtaError: `busy` while an update of the line runs.
            StoreError: the journal cannot be written.
        """
        self._refuse_busy(line)
        record = self._line(line)
        if record.state is State.IDLE and record.quarantine:
            self._save(record, machine.QuarantineLifted())

    async def cancel(self, line: str) -> bool:
        """Stop the running update of a line and return to what it served before; False when none runs. What was
        fetched stays for the next check."""
        running = self._running.get(line)
        if running is None:
            return False
        task = running[0]
        task.cancel()
        await asyncio.wait([task])
        await self._rest(line)
        return True

    # -- one round over the lines --------------------------------------------------------------------------------------

    async def _round(
        self, repository: Repository, transports: Sequence[Transport], line: str | None
    ) -> list[UpdateEvent]:
        events: list[UpdateEvent] = []
        refreshed: Refreshed | None = None
        try:
            async with self._refreshing.setdefault(repository.name, asyncio.Lock()):
                refreshed = await repository.refresh(transports, self._parts.identity.device, self._clock())
        except OtaError as e:
            events.append(self._device_event(e))
        waiting = {name for name, record in self.record.lines.items() if record.candidate or self._unsettled(name)}
        names = waiting
        desired = None
        if refreshed is not None:
            desired = refreshed.desired
            names = waiting | set(desired.assignments) | set(desired.refused)
            self._emit(UpdateEvent(DEVICE, "", State.CHECKING.value, traffic=Traffic(refreshed.metadata_bytes)))
        if line is not None:
            names &= {line}
        ended = await asyncio.gather(
            *(self._one(name, desired, transports) for name in sorted(names)), return_exceptions=True
        )
        for result in ended:
            if isinstance(result, UpdateEvent):
                events.append(result)
            elif not isinstance(result, asyncio.CancelledError):
                raise result
        if line is not None and not events:
            events.append(self._line_event(line, Outcome.UP_TO_DATE, None))
        return events

    async def _one(self, line: str, desired: Desired | None, transports: Sequence[Transport]) -> UpdateEvent:
        """One line's part of a round, as a task that `cancel` can find."""
        if line in self._running:
            busy = OtaError(Reason.BUSY, f"an update of {line} is running", hint="wait for it", retry=True)
            return self._line_event(line, Outcome.FAILED, busy)
        update = Update(self._parts, line)
        task = asyncio.get_running_loop().create_task(self._advance(line, update, desired, transports))
        self._running[line] = (task, update)
        try:
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            del self._running[line]

    async def _advance(
        self, line: str, update: Update, desired: Desired | None, transports: Sequence[Transport]
    ) -> UpdateEvent:
        try:
            await self._rest(line)
            assignment = None if desired is None else desired.assignments.get(line)
            candidate = self._line(line).candidate
            if candidate is not None:
                withdrawn = desired is not None and (
                    assignment is None or assignment.sha256 != candidate.release_sha256
                )
                if not withdrawn:
                    return await update.resume()
                self._save(self._line(line), machine.CandidateWithdrawn())
            if desired is not None and assignment is not None:
                return await update.run(assignment, desired.grants, transports)
            if desired is not None and line in desired.refused:
                return await update.refuse(desired.refused[line])
            return self._line_event(line, Outcome.UP_TO_DATE, None)
        except OtaError as e:
            return self._line_event(line, Outcome.FAILED, e)

    # -- bringing lines to rest ----------------------------------------------------------------------------------------

    def _unsettled(self, line: str) -> bool:
        return line not in self._running and self._line(line).state is not State.IDLE

    def _settle(self, line: str) -> list[UpdateEvent]:
        """Apply the recovery map to a line that no task works on."""
        record = self._line(line)
        if record.state is State.IDLE:
            return []
        outcome = self._save(record, machine.Interrupted(self._limits.trial_attempts))
        if outcome is None:
            return []
        reason = Reason.STATE_CORRUPT if record.state is State.UNKNOWN else Reason.INTERRUPTED
        message = f"{line} {record.pending_version} was interrupted while {record.state.value}, trial {record.attempts}"
        return [self._line_event(line, outcome, OtaError(reason, message), record.pending_version)]

    async def _rest(self, line: str) -> None:
        """As `_settle`, for a line whose host may still serve the candidate of a cancelled update."""
        live = self._line(line).state in LIVE
        try:
            self._settle(line)
        finally:
            if live:
                await self._parts.host.revert(line, self.active(line))

    def _check_active(self, line: str) -> list[UpdateEvent]:
        """Replace an active release whose files were lost or damaged by the one before it."""
        events: list[UpdateEvent] = []
        while (active := self._line(line).active) is not None:
            try:
                if payloads.stored_candidate(self._store, active) is None:
                    raise StoreError(Reason.NOT_FOUND, f"release.json of {line} {active.version} is gone")
                self._prove(active)
                break
            except StoreError as e:
                if e.reason not in (Reason.NOT_FOUND, Reason.PAYLOAD_CORRUPT):
                    raise
                outcome = self._save(self._line(line), machine.ActiveDamaged())
                events.append(self._line_event(line, outcome, e, active.version))
        return events

    def _prove(self, installed: Installed) -> None:
        for sha256 in (installed.plain_sha256, installed.golden_sha256):
            os.close(self._store.open(sha256))

    def _collect(self) -> None:
        """Remove stored files, releases and fetched parts that no record and no running update needs."""
        plain: set[str] = set()
        kept: set[str] = set()
        sealed: set[str] = set()
        for installed in self._journal.references():
            plain |= {installed.plain_sha256, installed.golden_sha256}
            kept.add(installed.release_sha256)
        for _, update in self._running.values():
            plain |= update.holds
        try:
            for line in self.record.lines.values():
                release = self._store.release(line.pending_sha256) if line.pending_sha256 else None
                if release is not None:
                    kept.add(release.sha256)
                    sealed.update(payloads.payload_hashes(release))
                    plain.update(part.plain_sha256 for part in (*release.components, release.golden))
            self._store.collect(plain, kept)
            self._inbox.collect(frozenset(sealed))
        except StoreError as e:
            self._device_event(e)  # what could not be removed is removed next time

    # -- small things --------------------------------------------------------------------------------------------------

    def _line(self, line: str) -> LineRecord:
        return self._journal.record.line(line)

    def _save(self, record: LineRecord, event: machine.Event) -> Outcome | None:
        line, outcome = machine.step(record, event)
        self._journal.save(self._journal.record.with_line(line), commit=outcome is Outcome.ROLLED_BACK)
        return outcome

    def _refuse_busy(self, line: str) -> None:
        if line in self._running:
            raise OtaError(Reason.BUSY, f"an update of {line} is running", hint="wait, or cancel it", retry=True)

    def _line_event(self, line: str, outcome: Outcome | None, error: OtaError | None, version: str = "") -> UpdateEvent:
        record = self._line(line)
        event = UpdateEvent(
            line,
            version,
            record.state.value,
            None if outcome is None else outcome.value,
            None if error is None else error.reason,
            "" if error is None else error.message,
            "" if error is None else error.hint,
            record.attempts,
        )
        self._emit(event)
        return event

    def _device_event(self, error: OtaError) -> UpdateEvent:
        event = UpdateEvent(DEVICE, "", State.IDLE.value, Outcome.FAILED.value, error.reason, error.message, error.hint)
        self._emit(event)
        return event
