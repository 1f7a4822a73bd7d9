"""The life of one line: states, events, one transition table and one recovery map. Pure: no clock, no files, no I/O.

Rules:
1. `step` alone changes a `LineRecord`; a pair of state and event that the table does not list raises.
2. The journal holds the record of a state before the act of that state begins; attempts are counted on the way into
   `testing`, thus before anything of the candidate runs.
3. Until `activating` a failure discards the candidate. From `activating` on it means rolling back.
4. After a restart the committed release serves; what was interrupted follows `RECOVERY`; an unknown state rolls back.
5. Only passing the probation commits; the counter floor rises there and nowhere else, and never falls.
STATES.md is generated from these tables (`ota.client.states`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ota.client.ports import Installed
from ota.errors import Reason

MAX_QUARANTINED = 32


class State(enum.Enum):
    """What a line is doing. `unknown` stands for a persisted word that this version does not know."""

    IDLE = "idle"
    CHECKING = "checking"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    STAGING = "staging"
    TESTING = "testing"
    ACTIVATING = "activating"
    PROBATION = "probation"
    UNKNOWN = "unknown"


class Outcome(enum.Enum):
    """How an update ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    REJECTED = "rejected"
    FAILED = "failed"
    UP_TO_DATE = "up_to_date"


@dataclass(frozen=True, slots=True)
class CheckStarted:
    """Somebody wants to know whether there is a new release."""


@dataclass(frozen=True, slots=True)
class NothingNew:
    """The assigned release is the active one, or none is assigned."""


@dataclass(frozen=True, slots=True)
class ReleaseAssigned:
    """A verified release that this device may run and does not run yet."""

    version: str
    release_sha256: str


@dataclass(frozen=True, slots=True)
class PayloadsFetched:
    """Every payload wanted lies complete in the inbox, or its plaintext already in the store."""


@dataclass(frozen=True, slots=True)
class FileVerified:
    """One file was decrypted and decoded, and is what the release signs."""


@dataclass(frozen=True, slots=True)
class DeltaRefused:
    """A delta did not give the signed result; the full payload is wanted instead."""


@dataclass(frozen=True, slots=True)
class FileStaged:
    """One file lies sealed in the store, another is waiting."""


@dataclass(frozen=True, slots=True)
class CandidateStaged:
    """All files of the candidate lie in the store."""

    candidate: Installed


@dataclass(frozen=True, slots=True)
class TrialResumed:
    """A staged candidate, interrupted or postponed before, is tried again."""


@dataclass(frozen=True, slots=True)
class ComponentRejected:
    """The self-test refused this component; the release has another one to try."""


@dataclass(frozen=True, slots=True)
class SelfTestPassed:
    """The candidate reproduced its golden vectors inside its budgets; it may have preferred another component."""

    candidate: Installed


@dataclass(frozen=True, slots=True)
class Activated:
    """Results come from the candidate now."""


@dataclass(frozen=True, slots=True)
class ProbationPassed:
    """The candidate served long enough inside its budgets."""


@dataclass(frozen=True, slots=True)
class UpdateRefused:
    """The release must not run on this device: what it is, or what came for it, is at fault."""

    reason: Reason
    quarantine: bool = False


@dataclass(frozen=True, slots=True)
class UpdateFailed:
    """The device, the network or the disk is at fault, not the release."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class CandidateRejected:
    """The candidate ran and was found unfit; it is quarantined."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class TrialPostponed:
    """The host had no room for the trial, or its hardware is to be mended; it counts as no attempt and the candidate
    waits."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The process ended, or the update was cancelled, in the middle of a state."""

    max_attempts: int


@dataclass(frozen=True, slots=True)
class CandidateWithdrawn:
    """A waiting candidate is no longer assigned to this device, or its files are gone."""


@dataclass(frozen=True, slots=True)
class AttemptsExhausted:
    """A waiting candidate was tried as often as allowed without an answer; it is quarantined."""


@dataclass(frozen=True, slots=True)
class OperatorRolledBack:
    """A person asked for the previous release; the active one is quarantined."""


@dataclass(frozen=True, slots=True)
class ActiveDamaged:
    """The stored files of the active release no longer open; the previous one takes over, nothing is quarantined."""


@dataclass(frozen=True, slots=True)
class ActiveUnfit:
    """The committed release kept crashing in service; the previous one takes over and it is quarantined."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class QuarantineLifted:
    """A person allows the quarantined releases of this line to be tried again."""


Event = (
    CheckStarted
    | NothingNew
    | ReleaseAssigned
    | PayloadsFetched
    | FileVerified
    | DeltaRefused
    | FileStaged
    | CandidateStaged
    | TrialResumed
    | ComponentRejected
    | SelfTestPassed
    | Activated
    | ProbationPassed
    | UpdateRefused
    | UpdateFailed
    | CandidateRejected
    | TrialPostponed
    | Interrupted
    | CandidateWithdrawn
    | AttemptsExhausted
    | OperatorRolledBack
    | ActiveDamaged
    | ActiveUnfit
    | QuarantineLifted
)


class Recovery(enum.Enum):
    """What becomes of an interrupted state."""

    NONE = "nothing to do"
    DISCARD = "discard the candidate; what was fetched stays and is resumed"
    RETRY = "try the staged candidate again, or roll back and quarantine it after the last attempt"
    ROLL_BACK = "roll back and discard the candidate"


RECOVERY: Mapping[State, Recovery] = MappingProxyType(
    {
        State.IDLE: Recovery.NONE,
        State.CHECKING: Recovery.DISCARD,
        State.FETCHING: Recovery.DISCARD,
        State.VERIFYING: Recovery.DISCARD,
        State.STAGING: Recovery.DISCARD,
        State.TESTING: Recovery.RETRY,
        State.ACTIVATING: Recovery.RETRY,
        State.PROBATION: Recovery.RETRY,
        State.UNKNOWN: Recovery.ROLL_BACK,
    }
)

_WORKING = (State.CHECKING, State.FETCHING, State.VERIFYING, State.STAGING)
LIVE = (State.ACTIVATING, State.PROBATION)
"""States in which the host serves, or is about to serve, the candidate."""
_Key = tuple[State, type[Event]]
_Goal = tuple[State, Outcome | None]

TRANSITIONS: Mapping[_Key, _Goal] = MappingProxyType(
    {
        (State.IDLE, CheckStarted): (State.CHECKING, None),
        (State.IDLE, TrialResumed): (State.TESTING, None),
        (State.IDLE, CandidateWithdrawn): (State.IDLE, None),
        (State.IDLE, AttemptsExhausted): (State.IDLE, Outcome.REJECTED),
        (State.IDLE, OperatorRolledBack): (State.IDLE, Outcome.ROLLED_BACK),
        (State.IDLE, ActiveDamaged): (State.IDLE, Outcome.ROLLED_BACK),
        (State.IDLE, ActiveUnfit): (State.IDLE, Outcome.ROLLED_BACK),
        (State.IDLE, QuarantineLifted): (State.IDLE, None),
        (State.CHECKING, NothingNew): (State.IDLE, Outcome.UP_TO_DATE),
        (State.CHECKING, ReleaseAssigned): (State.FETCHING, None),
        (State.FETCHING, PayloadsFetched): (State.VERIFYING, None),
        (State.VERIFYING, FileVerified): (State.STAGING, None),
        (State.VERIFYING, DeltaRefused): (State.FETCHING, None),
        # all files may lie in the store already, then there is nothing to verify
        (State.VERIFYING, CandidateStaged): (State.TESTING, None),
        (State.STAGING, FileStaged): (State.VERIFYING, None),
        (State.STAGING, CandidateStaged): (State.TESTING, None),
        (State.TESTING, ComponentRejected): (State.FETCHING, None),
        (State.TESTING, SelfTestPassed): (State.ACTIVATING, None),
        (State.TESTING, CandidateRejected): (State.IDLE, Outcome.REJECTED),
        (State.TESTING, TrialPostponed): (State.IDLE, Outcome.FAILED),
        (State.TESTING, UpdateFailed): (State.IDLE, Outcome.FAILED),
        (State.ACTIVATING, Activated): (State.PROBATION, None),
        (State.PROBATION, ProbationPassed): (State.IDLE, Outcome.COMMITTED),
        **{(state, UpdateRefused): (State.IDLE, Outcome.REJECTED) for state in _WORKING},
        **{(state, UpdateFailed): (State.IDLE, Outcome.FAILED) for state in _WORKING},
        **{(state, CandidateRejected): (State.IDLE, Outcome.ROLLED_BACK) for state in LIVE},
        **{(state, UpdateFailed): (State.IDLE, Outcome.ROLLED_BACK) for state in LIVE},
        **{(state, Interrupted): (State.IDLE, None) for state in State if state is not State.IDLE},
    }
)


@dataclass(frozen=True, slots=True)
class LineRecord:
    """Everything the journal keeps about one line.

    Attributes:
        active, previous: the committed release and the one before it, both complete in the store.
        pending_version, pending_sha256: the release being worked on, empty when none is.
        candidate: set from `testing` on, and in `idle` while a staged candidate waits for its next trial.
        attempts: trials of `pending_sha256` begun so far; forgotten when another release is assigned.
        quarantine: releases not to be tried again, by the hash of their release.json; the oldest falls out.
        floor_counter, floor_sha256: highest release counter ever committed and the release that had it.
    """

    line: str
    state: State = State.IDLE
    active: Installed | None = None
    previous: Installed | None = None
    pending_version: str = ""
    pending_sha256: str = ""
    candidate: Installed | None = None
    attempts: int = 0
    quarantine: Mapping[str, Reason] = field(default_factory=dict)
    floor_counter: int = 0
    floor_sha256: str = ""


class IllegalTransitionError(RuntimeError):
    """A programming error: the event does not belong to the state."""


def step(record: LineRecord, event: Event) -> tuple[LineRecord, Outcome | None]:
    """The record after `event`, and the outcome if the update ended with it.

    Raises:
        IllegalTransitionError: the table does not list the pair, or `trial` events lack their candidate.
    """
    goal = TRANSITIONS.get((record.state, type(event)))
    if goal is None:
        raise IllegalTransitionError(f"{record.line}: {type(event).__name__} in state {record.state.value}")
    state, outcome = goal
    moved = replace(record, state=state)
    match event:
        case ReleaseAssigned():
            return _assigned(moved, event), outcome
        case CandidateStaged():
            return replace(moved, candidate=event.candidate, attempts=moved.attempts + 1), outcome
        case SelfTestPassed():
            return replace(moved, candidate=event.candidate), outcome
        case TrialResumed():
            if record.candidate is None:
                raise IllegalTransitionError(f"{record.line}: no candidate waits for a trial")
            return replace(moved, attempts=moved.attempts + 1), outcome
        case TrialPostponed():
            return replace(moved, attempts=max(0, moved.attempts - 1)), outcome
        case ComponentRejected():
            # the next component is a part of the same attempt
            return replace(moved, candidate=None, attempts=max(0, moved.attempts - 1)), outcome
        case UpdateRefused() | CandidateRejected() as refused:
            quarantine = isinstance(refused, CandidateRejected) or refused.quarantine
            return _dropped(moved, refused.reason if quarantine else None), outcome
        case CandidateWithdrawn():
            return _dropped(moved, None), outcome
        case AttemptsExhausted():
            return _dropped(moved, Reason.INTERRUPTED), outcome
        case ProbationPassed():
            return _committed(moved), outcome
        case OperatorRolledBack():
            return _rolled_back(moved, Reason.OPERATOR), outcome
        case ActiveUnfit():
            return _rolled_back(moved, event.reason), outcome
        case ActiveDamaged():
            return _rolled_back(moved, None), outcome
        case QuarantineLifted():
            return replace(moved, quarantine={}), outcome
        case Interrupted():
            return _recovered(record, moved, event.max_attempts)
        case _:
            return moved, outcome


def _assigned(record: LineRecord, event: ReleaseAssigned) -> LineRecord:
    attempts = record.attempts if record.pending_sha256 == event.release_sha256 else 0
    pending = replace(record, pending_version=event.version, pending_sha256=event.release_sha256)
    return replace(pending, candidate=None, attempts=attempts)


def _dropped(record: LineRecord, reason: Reason | None) -> LineRecord:
    quarantine = record.quarantine
    if reason is not None and record.pending_sha256:
        quarantine = _quarantined(quarantine, record.pending_sha256, reason)
    return replace(record, candidate=None, pending_version="", pending_sha256="", attempts=0, quarantine=quarantine)


def _quarantined(quarantine: Mapping[str, Reason], sha256: str, reason: Reason) -> Mapping[str, Reason]:
    entries = [(known, why) for known, why in quarantine.items() if known != sha256]
    return dict([*entries[-(MAX_QUARANTINED - 1) :], (sha256, reason)])


def _committed(record: LineRecord) -> LineRecord:
    candidate = record.candidate
    if candidate is None:
        raise IllegalTransitionError(f"{record.line}: a probation without a candidate")
    # a release committed again (after its files rotted) must not push its predecessor out
    again = record.active is not None and record.active.release_sha256 == candidate.release_sha256
    higher = candidate.release_counter >= record.floor_counter
    return replace(
        _dropped(record, None),
        active=candidate,
        previous=record.previous if again else record.active,
        floor_counter=candidate.release_counter if higher else record.floor_counter,
        floor_sha256=candidate.release_sha256 if higher else record.floor_sha256,
    )


def _rolled_back(record: LineRecord, unfit: Reason | None) -> LineRecord:
    if record.active is None:
        raise IllegalTransitionError(f"{record.line}: no active release to roll back from")
    quarantine = record.quarantine
    if unfit is not None:
        quarantine = _quarantined(quarantine, record.active.release_sha256, unfit)
    return replace(_dropped(record, None), active=record.previous, previous=None, quarantine=quarantine)


def _recovered(before: LineRecord, moved: LineRecord, max_attempts: int) -> tuple[LineRecord, Outcome | None]:
    match RECOVERY[before.state]:
        case Recovery.RETRY if before.candidate is not None and before.attempts < max_attempts:
            return moved, None
        case Recovery.RETRY:
            live = before.state in LIVE
            return _dropped(moved, Reason.INTERRUPTED), Outcome.ROLLED_BACK if live else Outcome.REJECTED
        case Recovery.ROLL_BACK:
            return _dropped(moved, None), Outcome.ROLLED_BACK
        case _:
            # the release stays pending, so that its attempts are remembered when it is assigned again
            return replace(moved, candidate=None), None
