"""The updater's whole persistent state as one checksummed record in two alternating slots.

A record is written whole to the older slot; a cut or damaged slot falls to the other one, which is one step older and
therefore consistent. A third copy is written at every commit, for the day both slots are lost. Losing all three is
reported (`Journal.condition`) and starts from nothing: it never stops the device.
Not here: what states mean (`machine`), the files a record refers to (`store`).
Invariants: floors only rise, unless a signed rotation of a role's keys binds them anew; nothing in a record is secret.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ota import strictjson
from ota.client.fsops import Fs
from ota.client.machine import LineRecord, State
from ota.client.ports import Installed
from ota.client.settings import Origin, SettingsRecord
from ota.client.settings import State as SettingsState
from ota.errors import OtaError, Reason, StoreError

FORMAT = 1
MAX_RECORD_BYTES = 1 << 20
DIRECTORY = "state"
_SLOTS = (f"{DIRECTORY}/record.a", f"{DIRECTORY}/record.b")
_COMMITTED = f"{DIRECTORY}/record.committed"
FILES = (*_SLOTS, _COMMITTED)
_MAGIC = b"edge-ota state "
_HEADER_BYTES = len(_MAGIC) + 64 + 1


@dataclass(frozen=True, slots=True)
class Floor:
    """Lowest version of a role's metadata that is still accepted, as long as the role keeps the keys `keys_sha256`."""

    version: int
    keys_sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """All persistent state.

    Attributes:
        lines: by name of the line.
        floors: metadata floors by repository name, then role.
        clock_floor: signed date (ISO 8601, UTC) before which it certainly is not; empty before the first.
        settings: which settings are in force or on trial instead of the device's own file.
    """

    lines: Mapping[str, LineRecord] = field(default_factory=dict)
    floors: Mapping[str, Mapping[str, Floor]] = field(default_factory=dict)
    clock_floor: str = ""
    settings: SettingsRecord = field(default_factory=SettingsRecord)

    def line(self, name: str) -> LineRecord:
        """The line's record, a fresh one if there is none."""
        return self.lines.get(name) or LineRecord(name)

    def with_line(self, line: LineRecord) -> Record:
        """A copy in which `line` is replaced."""
        return dataclasses.replace(self, lines={**self.lines, line.line: line})

    def with_floor(self, repository: str, role: str, floor: Floor) -> Record:
        """A copy with that floor."""
        floors = {**self.floors.get(repository, {}), role: floor}
        return dataclasses.replace(self, floors={**self.floors, repository: floors})

    def installed(self) -> Iterator[Installed]:
        """Every release the record refers to."""
        for line in self.lines.values():
            yield from (item for item in (line.active, line.previous, line.candidate) if item is not None)


class Journal:
    """The record in memory and on disk; loads at construction.

    Attributes:
        condition: `state_corrupt` with a message when copies were damaged, else None.
        uncopied: why a committed record has no copies yet; whoever tells it sets it to None.

    Raises:
        StoreError: no copy can be read, or the disk cannot be written.
    """

    def __init__(self, fs: Fs) -> None:
        self._fs = fs
        fs.make_dirs(DIRECTORY)
        fs.sweep(DIRECTORY)
        self.condition: OtaError | None = None
        self.uncopied: StoreError | None = None
        self._generation = 0
        self._record = self._durable = self._older = Record()
        self._load()

    @property
    def record(self) -> Record:
        """The current record, as last saved."""
        return self._record

    def save(self, record: Record, *, commit: bool = False) -> None:
        """Make `record` durable and current. `commit` renews all three copies, so that nothing refers to the release
        before the previous one any more and its files can go.

        The first copy decides: the others are renewed if the disk lets them be, else by what is saved next.
        A line that is only checking is kept as idle: a check that finds nothing is not worth a write to flash.

        Raises:
            StoreError: `no_space` or `io_error`; the record before stays current, in memory too.
        """
        record = _without_unknown(record)
        durable = _without_checks(record)
        if durable == self._durable and not commit:
            self._record = record
            return
        self._write_slot(durable)
        self._record = record
        if commit:
            try:
                self._write_slot(durable)
                self._fs.write_atomic(_COMMITTED, encode(durable, self._generation))
            except StoreError as e:
                self.uncopied = e  # whoever saves must not hear that nothing was saved

    def _write_slot(self, durable: Record) -> None:
        generation = self._generation + 1
        self._fs.write_atomic(_SLOTS[generation % 2], encode(durable, generation))
        self._older, self._durable, self._generation = self._durable, durable, generation

    def references(self) -> Iterator[Installed]:
        """Releases that either slot refers to: their files must stay, because either slot may be the one that
        survives."""
        yield from self._record.installed()
        yield from self._older.installed()

    def _load(self) -> None:
        found: list[tuple[int, Record]] = []
        bad: list[OtaError] = []
        for slot in _SLOTS:
            self._look(slot, found, bad)
        found.sort(key=lambda item: item[0])
        if not found:
            # also when neither slot is there: at the first start there is no commit either
            self._look(_COMMITTED, found, bad)
            if found and not bad:
                bad = [OtaError(Reason.STATE_CORRUPT, slot) for slot in _SLOTS]
        if found:
            self._generation, self._record = found[-1]
            self._durable = self._record
            self._older = found[0][1]
        elif (unread := next((e for e in bad if isinstance(e, StoreError)), None)) is not None:
            raise unread  # what cannot be read now may be whole: its floors must not be thrown away
        if bad:
            lost = "the newest readable copy is used" if found else "starting from nothing"
            self.condition = OtaError(
                Reason.STATE_CORRUPT,
                f"{len(bad)} of the updater's state records are damaged or gone; {lost}",
                hint="check the device's storage; updates continue by themselves",
            )

    def _look(self, path: str, found: list[tuple[int, Record]], bad: list[OtaError]) -> None:
        """Add what lies at `path` to `found`, or what is wrong with it to `bad`."""
        try:
            data = self._read(path)
            if data is not None:
                found.append(decode(data))
        except OtaError as e:
            bad.append(e)

    def _read(self, path: str) -> bytes | None:
        size = self._fs.size(path)
        if size is None:
            return None
        return self._fs.read_at(path, 0, min(size, MAX_RECORD_BYTES + 1))


def _without_unknown(record: Record) -> Record:
    """Without lines of which there is nothing to keep: whoever assigns may name as many as he likes."""
    known = {name: line for name, line in record.lines.items() if line != LineRecord(name)}
    return record if len(known) == len(record.lines) else dataclasses.replace(record, lines=known)


def _without_checks(record: Record) -> Record:
    lines = {
        name: dataclasses.replace(line, state=State.IDLE) if line.state is State.CHECKING else line
        for name, line in record.lines.items()
    }
    return _without_unknown(dataclasses.replace(record, lines=lines))


def encode(record: Record, generation: int) -> bytes:
    """Bytes of a slot: a magic word, the SHA-256 of the body, a newline, the body as canonical JSON."""
    body = strictjson.canonical(
        {
            "format": FORMAT,
            "generation": generation,
            "lines": {name: _line_to_json(line) for name, line in record.lines.items()},
            "floors": {
                repository: {role: dataclasses.asdict(floor) for role, floor in roles.items()}
                for repository, roles in record.floors.items()
            },
            "clock_floor": record.clock_floor,
            "settings": _settings_to_json(record.settings),
        }
    )
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode(data: bytes) -> tuple[int, Record]:
    """Generation and record of a slot's bytes.

    Raises:
        OtaError: `state_corrupt`.
    """
    body = data[_HEADER_BYTES:]
    expected = _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n"
    if data[:_HEADER_BYTES] != expected:
        raise OtaError(Reason.STATE_CORRUPT, "a state record is damaged")
    try:
        top = strictjson.loads(body, max_bytes=MAX_RECORD_BYTES, what="state record")
        if top["format"] != FORMAT:
            raise OtaError(Reason.STATE_CORRUPT, f"a state record has the unknown format {top['format']!r}")
        record = Record(
            lines={name: _line_from_json(name, value) for name, value in top["lines"].items()},
            floors={
                repository: {role: Floor(int(f["version"]), str(f["keys_sha256"])) for role, f in roles.items()}
                for repository, roles in top["floors"].items()
            },
            clock_floor=str(top["clock_floor"]),
            # a record from before there were settings has none
            settings=_settings_from_json(top["settings"]) if "settings" in top else SettingsRecord(),
        )
        return int(top["generation"]), record
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise OtaError(Reason.STATE_CORRUPT, f"a state record is not understood: {e!r}") from e


def _line_to_json(line: LineRecord) -> dict[str, Any]:
    def installed(item: Installed | None) -> dict[str, Any] | None:
        return None if item is None else dataclasses.asdict(item)

    return {
        "state": line.state.value,
        "active": installed(line.active),
        "previous": installed(line.previous),
        "pending_version": line.pending_version,
        "pending_sha256": line.pending_sha256,
        "candidate": installed(line.candidate),
        "attempts": line.attempts,
        # a list, because the order says which entry is oldest
        "quarantine": [[sha256, reason.value] for sha256, reason in line.quarantine.items()],
        "floor_counter": line.floor_counter,
        "floor_sha256": line.floor_sha256,
    }


def _line_from_json(name: str, value: dict[str, Any]) -> LineRecord:
    def installed(item: dict[str, Any] | None) -> Installed | None:
        return None if item is None else Installed(**item)

    return LineRecord(
        line=name,
        state=_state(value["state"]),
        active=installed(value["active"]),
        previous=installed(value["previous"]),
        pending_version=str(value["pending_version"]),
        pending_sha256=str(value["pending_sha256"]),
        candidate=installed(value["candidate"]),
        attempts=int(value["attempts"]),
        quarantine={sha256: _reason(reason) for sha256, reason in value["quarantine"]},
        floor_counter=int(value["floor_counter"]),
        floor_sha256=str(value["floor_sha256"]),
    )


def _state(word: object) -> State:
    try:
        return State(word)
    except ValueError:
        return State.UNKNOWN  # a later version wrote it; `machine.RECOVERY` rolls back


def _reason(word: str) -> Reason:
    try:
        return Reason(word)
    except ValueError:
        return Reason.STATE_CORRUPT  # still quarantined, for a cause this version has no word for


def _settings_to_json(settings: SettingsRecord) -> dict[str, Any]:
    return {
        "state": settings.state.value,
        "active": settings.active,
        "file": settings.file,
        "trial": settings.trial,
        "origin": settings.origin.value,
        "expect": list(settings.expect),
        "attempts": settings.attempts,
        "fleet": settings.fleet,
        "quarantine": [[sha256, reason.value] for sha256, reason in settings.quarantine.items()],
    }


def _settings_from_json(value: dict[str, Any]) -> SettingsRecord:
    try:
        state = SettingsState(value["state"])
    except ValueError:
        state = SettingsState.UNKNOWN  # a later version wrote it; `settings.RECOVERY` takes it back
    return SettingsRecord(
        state=state,
        active=str(value["active"]),
        file=str(value["file"]),
        trial=str(value["trial"]),
        origin=Origin(value["origin"]),
        expect=tuple(str(item) for item in value["expect"]),
        attempts=int(value["attempts"]),
        fleet=str(value["fleet"]),
        quarantine={sha256: _reason(reason) for sha256, reason in value["quarantine"]},
    )
