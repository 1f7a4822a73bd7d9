"""Lines at rest: after a restart, a cancelled update or a rollback; and which files stay on the disk.

Not here: what a running update does (`update`), when anything begins (`updater`).
Invariants: what the journal calls active is what the host is told to serve; a file is removed only when no record, no
running update and no pending release needs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ota.client import machine, payloads
from ota.client.ledger import Parts
from ota.client.machine import LIVE, LineRecord, Outcome, State
from ota.client.ports import Installed, UpdateEvent
from ota.client.update import put_back
from ota.errors import OtaError, Reason, StoreError

DEVICE = "*"


class Rest:
    """Brings lines to rest. Whoever calls for one line holds that line.

    Args:
        holds: plaintext hashes that running updates have staged.
    """

    def __init__(self, parts: Parts, holds: Callable[[], set[str]]) -> None:
        self._parts = parts
        self._holds = holds

    def unsettled(self, line: str) -> bool:
        """Whether an update of the line was cut off and not cleared up yet; asked while none runs."""
        return self.line(line).state is not State.IDLE or line in self._parts.unreverted

    def is_active(self, line: str, release_sha256: str) -> bool:
        """Whether that release is the committed one."""
        active = self.line(line).active
        return active is not None and active.release_sha256 == release_sha256

    def settle(self, line: str) -> list[UpdateEvent]:
        """Apply the recovery map to a line that no task works on."""
        record = self.line(line)
        if record.state is State.IDLE:
            return []
        outcome = self.save(record, machine.Interrupted(self._parts.limits.trial_attempts))
        if outcome is None:
            return []
        reason = Reason.STATE_CORRUPT if record.state is State.UNKNOWN else Reason.INTERRUPTED
        message = f"{line} {record.pending_version} was interrupted while {record.state.value}, trial {record.attempts}"
        return [self.line_event(line, outcome, OtaError(reason, message), record.pending_version)]

    async def rest(self, line: str) -> None:
        """As `settle`, for a line whose host may still serve the candidate of a cancelled update.

        Raises:
            OtaError: the committed release does not serve; the journal is at rest all the same.
        """
        if self.line(line).state in LIVE:
            self._parts.unreverted.add(line)
        try:
            self.settle(line)
        finally:
            # also what a cancelled end of an update has left to be done
            if line in self._parts.unreverted:
                await put_back(self._parts, line)

    async def go_back(
        self, line: str, event: machine.OperatorRolledBack | machine.ActiveUnfit, why: str
    ) -> UpdateEvent:
        """Serve the previous release again and quarantine the active one, because of `why`.

        Raises:
            OtaError: `not_found` without a previous release.
            StoreError: it does not open, or the journal cannot be written; nothing changed.
        """
        await self.rest(line)
        record = self.line(line)
        previous = None if record.previous is None else payloads.stored_candidate(self._parts.store, record.previous)
        if record.previous is None or previous is None:
            raise OtaError(
                Reason.NOT_FOUND, f"{line} has no previous release", hint="edge-agent status shows what is installed"
            )
        await self.prove(record.previous)
        # a quarantine may have been lifted meanwhile
        outcome = self.save(self.line(line), event)
        failure: OtaError | None = None
        try:
            await put_back(self._parts, line)
        except OtaError as e:
            failure = e
        message = f"{line} is back at {previous.version}{why}" + (
            f"; it does not serve: {failure.message}" if failure else ""
        )
        reason = event.reason if isinstance(event, machine.ActiveUnfit) else Reason.OPERATOR
        return self.line_event(line, outcome, OtaError(reason, message), previous.version)

    async def check_active(self, line: str) -> list[UpdateEvent]:
        """Replace an active release whose files were lost or damaged by the one before it."""
        events: list[UpdateEvent] = []
        while (active := self.line(line).active) is not None:
            try:
                if payloads.stored_candidate(self._parts.store, active) is None:
                    raise StoreError(Reason.NOT_FOUND, f"release.json of {line} {active.version} is gone")
                await self.prove(active)
                break
            except StoreError as e:
                if e.reason not in (Reason.NOT_FOUND, Reason.PAYLOAD_CORRUPT):
                    raise
                outcome = self.save(self.line(line), machine.ActiveDamaged())
                events.append(self.line_event(line, outcome, e, active.version))
        return events

    async def prove(self, installed: Installed) -> None:
        """Open every file of a release.

        Raises:
            StoreError: one is gone or damaged.
        """
        for sha256 in (installed.plain_sha256, installed.golden_sha256):
            os.close(await self._parts.store.read(sha256))

    def collect(self) -> None:
        """Remove stored files, releases and fetched parts that no record and no running update needs."""
        self._tell_uncopied()
        plain: set[str] = set()
        kept: set[str] = set()
        sealed: set[str] = set()
        for installed in self._parts.journal.references():
            plain |= {installed.plain_sha256, installed.golden_sha256}
            kept.add(installed.release_sha256)
        plain |= self._holds()
        try:
            for line in self._parts.journal.record.lines.values():
                release = self._parts.store.release(line.pending_sha256) if line.pending_sha256 else None
                if release is not None:
                    kept.add(release.sha256)
                    sealed.update(payloads.payload_hashes(release))
                    plain.update(part.plain_sha256 for part in (*release.components, release.golden))
            self._parts.store.collect(plain, kept)
            self._parts.inbox.collect(frozenset(sealed))
        except StoreError as e:
            self.device_event(e)  # what could not be removed is removed next time

    def line(self, line: str) -> LineRecord:
        """The line's record."""
        return self._parts.journal.record.line(line)

    def save(self, record: LineRecord, event: machine.Event) -> Outcome | None:
        """Journal what `event` makes of `record`.

        Raises:
            StoreError: the journal cannot be written.
        """
        line, outcome = machine.step(record, event)
        self._parts.journal.save(self._parts.journal.record.with_line(line), commit=outcome is Outcome.ROLLED_BACK)
        self._tell_uncopied()
        return outcome

    def _tell_uncopied(self) -> None:
        """A record that was saved without its copies: done, and yet something is wrong with the disk."""
        error, self._parts.journal.uncopied = self._parts.journal.uncopied, None
        if error is not None:
            self.device_event(error)

    def line_event(self, line: str, outcome: Outcome | None, error: OtaError | None, version: str = "") -> UpdateEvent:
        """Emit an event of a line in its present state and return it."""
        record = self.line(line)
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
        self._parts.emit(event)
        return event

    def device_event(self, error: OtaError) -> UpdateEvent:
        """Emit what concerns the device as a whole and return it."""
        event = UpdateEvent(DEVICE, "", State.IDLE.value, Outcome.FAILED.value, error.reason, error.message, error.hint)
        self._parts.emit(event)
        return event
