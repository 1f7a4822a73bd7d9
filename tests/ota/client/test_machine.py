"""The transition table: complete, closed, and the same on disk as in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ota.client import machine, states
from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.machine import RECOVERY, TRANSITIONS, IllegalTransitionError, LineRecord, Outcome, State, step
from ota.client.ports import Installed
from ota.errors import Reason
from tests.crash.memory import MemoryDisk

EVENTS = sorted({event for _, event in TRANSITIONS}, key=lambda event: event.__name__)
LINE = "person"
STATES_MD = Path(machine.__file__).parents[1] / "STATES.md"


def _installed(counter: int) -> Installed:
    return Installed(LINE, f"1.{counter}.0", counter, f"{counter:064x}", "int8", "b" * 64, "c" * 64)


def _example(event: type[machine.Event]) -> machine.Event:
    match event:
        case machine.ReleaseAssigned:
            return machine.ReleaseAssigned("1.2.0", "d" * 64)
        case machine.CandidateStaged:
            return machine.CandidateStaged(_installed(2))
        case machine.SelfTestPassed:
            return machine.SelfTestPassed(_installed(2))
        case machine.UpdateRefused | machine.UpdateFailed | machine.CandidateRejected | machine.TrialPostponed:
            return event(Reason.OVER_BUDGET)
        case machine.ActiveUnfit:
            return machine.ActiveUnfit(Reason.WORKER_CRASHED)
        case machine.Interrupted:
            return machine.Interrupted(3)
        case _:
            return event()


def _record(state: State) -> LineRecord:
    return LineRecord(LINE, state, _installed(1), None, "1.2.0", "d" * 64, _installed(2), 1, {}, 1, f"{1:064x}")


def test_the_document_of_the_states_is_current() -> None:
    assert STATES_MD.read_text() == states.document(), "run python -m ota.client.states > ota/STATES.md"


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", EVENTS)
def test_a_listed_pair_leads_where_the_table_says_and_any_other_raises(
    state: State, event: type[machine.Event]
) -> None:
    record = _record(state)
    if (state, event) not in TRANSITIONS:
        with pytest.raises(IllegalTransitionError):
            step(record, _example(event))
        return
    moved, _ = step(record, _example(event))
    assert moved.state is TRANSITIONS[state, event][0]


def test_every_state_has_a_recovery_and_every_busy_state_can_be_interrupted() -> None:
    assert set(RECOVERY) == set(State)
    for state in set(State) - {State.IDLE}:
        assert step(_record(state), machine.Interrupted(3))[0].state is State.IDLE


def test_only_a_passed_probation_changes_the_active_release_or_its_floor_during_an_update() -> None:
    for (state, event), _ in TRANSITIONS.items():
        if state is State.IDLE or event is machine.ProbationPassed:
            continue
        before = _record(state)
        after, _ = step(before, _example(event))
        assert (after.active, after.floor_counter) == (before.active, before.floor_counter), (state, event)


def test_the_quarantine_is_bounded_and_drops_its_oldest_entry() -> None:
    record = _record(State.IDLE)
    for number in range(machine.MAX_QUARANTINED + 3):
        record, _ = step(record, machine.CheckStarted())
        record, _ = step(record, machine.ReleaseAssigned("1.2.0", f"{number:064x}"))
        record, _ = step(record, machine.UpdateRefused(Reason.PAYLOAD_CORRUPT, quarantine=True))
    assert list(record.quarantine) == [f"{number:064x}" for number in range(3, machine.MAX_QUARANTINED + 3)]


class JournalledLine(RuleBasedStateMachine):
    """Random walks through the table, with restarts and torn slots in between, against a plain model of the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = MemoryDisk()
        self.journal = Journal(Fs(self.disk))
        self.counter = 0
        self.committed: list[Installed] = []
        self.trials = 0
        self.floor = 0

    @property
    def line(self) -> LineRecord:
        return self.journal.record.line(LINE)

    def apply(self, event: machine.Event) -> Outcome | None:
        line, outcome = step(self.line, event)
        self.journal.save(self.journal.record.with_line(line), commit=outcome is Outcome.COMMITTED)
        return outcome

    @initialize()
    def begin(self) -> None:
        self.apply(machine.CheckStarted())
        self.apply(machine.NothingNew())

    @precondition(lambda self: self.line.state is State.IDLE and self.line.candidate is None)
    @rule()
    def assign(self) -> None:
        self.counter += 1
        self.trials = 0
        self.apply(machine.CheckStarted())
        self.apply(machine.ReleaseAssigned(f"1.{self.counter}.0", f"{self.counter:064x}"))

    @precondition(lambda self: self.line.state is State.FETCHING)
    @rule(delta_fails=st.booleans())
    def fetched(self, delta_fails: bool) -> None:
        self.apply(machine.PayloadsFetched())
        if delta_fails:
            self.apply(machine.DeltaRefused())
            self.apply(machine.PayloadsFetched())
        self.apply(machine.FileVerified())
        self.trials += 1
        self.apply(machine.CandidateStaged(_installed(self.counter)))

    @precondition(lambda self: self.line.state is State.IDLE and self.line.candidate is not None)
    @rule()
    def resume(self) -> None:
        if self.line.attempts >= 3:
            assert self.apply(machine.AttemptsExhausted()) is Outcome.REJECTED
        else:
            self.trials += 1
            self.apply(machine.TrialResumed())

    @precondition(lambda self: self.line.state is State.TESTING)
    @rule()
    def self_tested(self) -> None:
        self.apply(machine.SelfTestPassed(_installed(self.counter)))

    @precondition(lambda self: self.line.state is State.ACTIVATING)
    @rule()
    def activated(self) -> None:
        self.apply(machine.Activated())

    @precondition(lambda self: self.line.state is State.PROBATION)
    @rule()
    def passed(self) -> None:
        assert self.apply(machine.ProbationPassed()) is Outcome.COMMITTED
        self.committed.append(_installed(self.counter))
        self.floor = self.counter

    @precondition(lambda self: self.line.state in (State.TESTING, State.ACTIVATING, State.PROBATION))
    @rule(blame=st.booleans())
    def failed(self, blame: bool) -> None:
        state = self.line.state
        outcome = self.apply(
            machine.CandidateRejected(Reason.OVER_BUDGET) if blame else machine.UpdateFailed(Reason.IO_ERROR)
        )
        assert (outcome is Outcome.ROLLED_BACK) is (state is not State.TESTING)

    @precondition(lambda self: self.line.state is State.IDLE and self.line.previous is not None)
    @rule()
    def operator_rolls_back(self) -> None:
        self.apply(machine.OperatorRolledBack())
        self.committed.pop()

    @rule(torn=st.booleans())
    def restart(self, torn: bool) -> None:
        if torn:
            before = self.journal.record
            self.journal.save(before, commit=True)
            name = f"record.{'ba'[self.journal._generation % 2 == 0]}"
            self.disk.truncate(f"state/{name}", 100)
        kept = self.line
        self.journal = Journal(Fs(self.disk))
        assert self.line == kept
        assert (self.journal.condition is not None) is torn
        if torn:
            self.journal.save(self.journal.record, commit=True)
        if self.line.state is not State.IDLE:
            self.apply(machine.Interrupted(3))

    @invariant()
    def the_active_release_is_the_last_committed_one_that_was_not_rolled_back(self) -> None:
        expected = self.committed[-1] if self.committed else None
        assert self.line.active == expected
        assert self.line.floor_counter == self.floor

    @invariant()
    def no_release_gets_more_than_three_trials(self) -> None:
        assert self.trials <= 3
        assert self.line.attempts <= 3


JournalledLine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestJournalledLine = JournalledLine.TestCase
