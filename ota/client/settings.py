"""The life of a device's settings: states, events, one transition table and one recovery map. Pure: no clock, no I/O.

Rules:
1. `step` alone changes a `SettingsRecord`; a pair of state and event that the table does not list raises.
2. The journal holds the record of a trial before the trial begins; attempts are counted before the settings are used.
3. Only a passed trial makes settings active. Any other end goes back to what was active before: earlier settings, or
   the device's own file, which is what `""` stands for.
4. After a restart an interrupted trial is begun again until its attempts are used up, then it is taken back.
5. A person's change of the file wins over settings that took its place.
6. Settings that failed are not tried again unless a person asks; the fleet's are looked at once.
STATES.md shows these tables too (`ota.client.states`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ota.client.machine import IllegalTransitionError, Outcome
from ota.errors import Reason

MAX_QUARANTINED = 16


class State(enum.Enum):
    """What becomes of the settings. `unknown` stands for a persisted word that this version does not know."""

    IDLE = "idle"
    TRIAL = "trial"
    UNKNOWN = "unknown"


class Origin(enum.Enum):
    """Who wants the settings: the fleet's signed document, or a person at the device."""

    FLEET = "fleet"
    PERSON = "person"


@dataclass(frozen=True, slots=True)
class TrialProposed:
    """Settings that can be read are wanted.

    Attributes:
        sha256: of the document. file_sha256: of the device's own file, whose place it would take.
        expect: what has to work again within the time of the trial: `link`, `source NAME`, `line NAME`.
    """

    sha256: str
    file_sha256: str
    origin: Origin
    expect: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SettingsRefused:
    """The fleet wants settings that this device cannot use at all."""

    sha256: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class TrialBegun:
    """The device is about to use the settings on trial."""


@dataclass(frozen=True, slots=True)
class TrialPassed:
    """Everything expected of the settings on trial works."""


@dataclass(frozen=True, slots=True)
class TrialFailed:
    """Something expected does not work within the time of the trial, or the device cannot start with the settings."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The process ended in the middle of a trial."""

    max_attempts: int


@dataclass(frozen=True, slots=True)
class FileChanged:
    """A person changed the device's own file after settings had taken its place: it is in force again."""


@dataclass(frozen=True, slots=True)
class ActiveDamaged:
    """The stored document of the active settings cannot be read any more; the device's own file is in force again."""


Event = (
    TrialProposed | SettingsRefused | TrialBegun | TrialPassed | TrialFailed | Interrupted | FileChanged | ActiveDamaged
)


class Recovery(enum.Enum):
    """What becomes of an interrupted state."""

    NONE = "nothing to do"
    RETRY = "begin the trial again, or take the settings back and quarantine them after the last attempt"
    ROLL_BACK = "take the settings on trial back"


RECOVERY: Mapping[State, Recovery] = MappingProxyType(
    {State.IDLE: Recovery.NONE, State.TRIAL: Recovery.RETRY, State.UNKNOWN: Recovery.ROLL_BACK}
)

_Key = tuple[State, type[Event]]
_Goal = tuple[State, Outcome | None]

TRANSITIONS: Mapping[_Key, _Goal] = MappingProxyType(
    {
        (State.IDLE, TrialProposed): (State.TRIAL, None),
        (State.IDLE, SettingsRefused): (State.IDLE, Outcome.REJECTED),
        (State.IDLE, FileChanged): (State.IDLE, Outcome.ROLLED_BACK),
        (State.IDLE, ActiveDamaged): (State.IDLE, Outcome.ROLLED_BACK),
        (State.TRIAL, TrialBegun): (State.TRIAL, None),
        (State.TRIAL, TrialPassed): (State.IDLE, Outcome.COMMITTED),
        (State.TRIAL, TrialFailed): (State.IDLE, Outcome.ROLLED_BACK),
        (State.TRIAL, FileChanged): (State.IDLE, Outcome.ROLLED_BACK),
        # it stays on trial as long as attempts are left: `_recovered`
        (State.TRIAL, Interrupted): (State.TRIAL, None),
        (State.UNKNOWN, Interrupted): (State.IDLE, Outcome.ROLLED_BACK),
    }
)


@dataclass(frozen=True, slots=True)
class SettingsRecord:
    """Everything the journal keeps about the settings.

    Attributes:
        active: hash of the document in force; empty for the device's own file.
        file: hash of the device's own file when settings took, or are to take, its place.
        trial: hash of the document on trial, empty when none is; origin, expect: as proposed.
        attempts: trials of it begun so far.
        fleet: hash of the fleet's last document that was dealt with, however it ended.
        quarantine: documents not to be tried again for the fleet, by hash; the oldest falls out.
    """

    state: State = State.IDLE
    active: str = ""
    file: str = ""
    trial: str = ""
    origin: Origin = Origin.PERSON
    expect: tuple[str, ...] = ()
    attempts: int = 0
    fleet: str = ""
    quarantine: Mapping[str, Reason] = field(default_factory=dict)


def step(record: SettingsRecord, event: Event) -> tuple[SettingsRecord, Outcome | None]:
    """The record after `event`, and the outcome if a trial or a settings document ended with it.

    Raises:
        IllegalTransitionError: the table does not list the pair.
    """
    goal = TRANSITIONS.get((record.state, type(event)))
    if goal is None:
        raise IllegalTransitionError(f"settings: {type(event).__name__} in state {record.state.value}")
    state, outcome = goal
    moved = replace(record, state=state)
    match event:
        case TrialProposed():
            by_fleet = event.origin is Origin.FLEET
            return replace(
                moved,
                file=event.file_sha256,
                trial=event.sha256,
                origin=event.origin,
                expect=event.expect,
                attempts=0,
                fleet=event.sha256 if by_fleet else record.fleet,
            ), outcome
        case SettingsRefused():
            quarantine = _quarantined(record.quarantine, event.sha256, event.reason)
            return replace(moved, fleet=event.sha256, quarantine=quarantine), outcome
        case TrialBegun():
            return replace(moved, attempts=record.attempts + 1), outcome
        case TrialPassed():
            quarantine = {known: why for known, why in record.quarantine.items() if known != record.trial}
            return replace(_ended(moved), active=record.trial, quarantine=quarantine), outcome
        case TrialFailed():
            return _failed(moved, event.reason), outcome
        case FileChanged():
            return replace(_ended(moved), active="", file=""), outcome
        case ActiveDamaged():
            return replace(moved, active="", file=""), outcome
        case Interrupted():
            return _recovered(record, moved, event.max_attempts, outcome)


def _recovered(
    before: SettingsRecord, moved: SettingsRecord, max_attempts: int, outcome: Outcome | None
) -> tuple[SettingsRecord, Outcome | None]:
    if RECOVERY[before.state] is Recovery.RETRY and before.attempts < max_attempts:
        return moved, outcome
    return replace(_failed(moved, Reason.INTERRUPTED), state=State.IDLE), Outcome.ROLLED_BACK


def _failed(record: SettingsRecord, reason: Reason) -> SettingsRecord:
    quarantine = _quarantined(record.quarantine, record.trial, reason) if record.trial else record.quarantine
    return replace(_ended(record), quarantine=quarantine)


def _ended(record: SettingsRecord) -> SettingsRecord:
    return replace(record, trial="", expect=(), attempts=0)


def _quarantined(quarantine: Mapping[str, Reason], sha256: str, reason: Reason) -> Mapping[str, Reason]:
    entries = [(known, why) for known, why in quarantine.items() if known != sha256]
    return dict([*entries[-(MAX_QUARANTINED - 1) :], (sha256, reason)])
