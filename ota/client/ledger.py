"""How one update of one line writes down where it is and tells it: journal first, then the event.

Not here: what a state means (`machine`), what is done in it (`update`, `acquire`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

from ota.client import machine
from ota.client.fetch import Inbox
from ota.client.journal import Journal
from ota.client.limits import Limits
from ota.client.locks import Locks
from ota.client.machine import LineRecord, Outcome
from ota.client.ports import DeviceKeys, Host, Identity, Probation, Tested, Traffic, UpdateEvent
from ota.client.store import Store
from ota.client.transfer import Counts
from ota.errors import Reason


class Details(TypedDict, total=False):
    """Optional fields of an `UpdateEvent`."""

    reason: Reason
    message: str
    hint: str
    attempt: int
    tested: Tested
    probation: Probation


@dataclass(frozen=True, slots=True)
class Parts:
    """What every update of this device works with.

    Attributes:
        unreverted: lines whose host was not told to the end to serve the committed release.
    """

    identity: Identity
    keys: DeviceKeys
    journal: Journal
    store: Store
    inbox: Inbox
    host: Host
    limits: Limits
    locks: Locks
    emit: Callable[[UpdateEvent], None]
    collect: Callable[[], None]
    unreverted: set[str] = field(default_factory=set)


class Ledger:
    """One line's record in the journal, and the events of one update of it.

    Attributes:
        counts: blocks of this update, counted by the transfer. traffic: the rest of its bytes.
    """

    def __init__(self, parts: Parts, line: str) -> None:
        self._parts = parts
        self.line = line
        self.counts = Counts()
        self.traffic = Traffic()

    @property
    def record(self) -> LineRecord:
        """The line's record, as last saved."""
        return self._parts.journal.record.line(self.line)

    def save(self, event: machine.Event) -> Outcome | None:
        """Journal what `event` makes of the line.

        Raises:
            StoreError: the journal cannot be written; the record stays as it was.
        """
        journal = self._parts.journal
        line, outcome = machine.step(self.record, event)
        journal.save(journal.record.with_line(line))
        return outcome

    def say(self, event: machine.Event, version: str = "", **details: Unpack[Details]) -> UpdateEvent:
        """As `save`, then tell it."""
        return self.event(version, self.save(event), **details)

    def tell(self, version: str, reason: Reason, message: str) -> None:
        """Tell something remarkable that changes no state."""
        self.event(version, None, reason=reason, message=message)

    def event(self, version: str, outcome: Outcome | None, **details: Unpack[Details]) -> UpdateEvent:
        """Emit an event in the present state and return it."""
        counts, record = self.counts, self.record
        traffic = replace(
            self.traffic,
            fetched_bytes=counts.fetched_bytes,
            refetched_bytes=counts.refetched_bytes,
            duplicate_bytes=counts.duplicate_bytes,
        )
        details.setdefault("attempt", record.attempts)
        ended = None if outcome is None else outcome.value
        said = UpdateEvent(self.line, version, record.state.value, ended, traffic=traffic, **details)
        self._parts.emit(said)
        return said
