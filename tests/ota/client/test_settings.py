"""The settings' own machine: its table, and documents and record over cuts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import settings as effort
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ota.client import settings
from ota.client.configuration import Configuration
from ota.client.fsops import Fs
from ota.client.journal import Journal, Record, decode, encode
from ota.client.machine import IllegalTransitionError, Outcome
from ota.client.settings import RECOVERY, TRANSITIONS, Origin, SettingsRecord, State, step
from ota.errors import Reason, StoreError
from tests.crash.memory import MemoryDisk, Possibilities

A, B, FILE = "a" * 64, "b" * 64, "f" * 64
EVENTS: list[settings.Event] = [
    settings.TrialProposed(B, FILE, Origin.FLEET, ("link", "source belt")),
    settings.SettingsRefused(B, Reason.SETTINGS_REFUSED),
    settings.TrialBegun(),
    settings.TrialPassed(),
    settings.TrialFailed(Reason.SETTINGS_FAILED),
    settings.Interrupted(3),
    settings.FileChanged(),
    settings.ActiveDamaged(),
]


def record(state: State) -> SettingsRecord:
    trial = "" if state is State.IDLE else B
    return SettingsRecord(state, A, FILE, trial, Origin.FLEET, ("link",), 1 if trial else 0, B if trial else "")


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_listed_pair_leads_where_the_table_says_and_any_other_raises(state: State, event: settings.Event) -> None:
    if (state, type(event)) not in TRANSITIONS:
        with pytest.raises(IllegalTransitionError):
            step(record(state), event)
        return
    moved, outcome = step(record(state), event)
    assert (moved.state, outcome) == TRANSITIONS[state, type(event)]


def test_every_state_has_a_recovery() -> None:
    assert set(RECOVERY) == set(State)


def test_only_a_passed_trial_changes_what_is_active_and_only_to_what_was_on_trial() -> None:
    for state, event in ((state, event) for state in State for event in EVENTS):
        if (state, type(event)) in TRANSITIONS:
            active = step(record(state), event)[0].active
            expected = {settings.TrialPassed: B, settings.FileChanged: "", settings.ActiveDamaged: ""}
            assert active == expected.get(type(event), A), (state, event)


def test_a_trial_that_is_interrupted_too_often_is_taken_back_and_quarantined() -> None:
    now = record(State.TRIAL)
    for attempts in (1, 2):
        now, outcome = step(dataclasses.replace(now, attempts=attempts), settings.Interrupted(3))
        assert (now.state, outcome) == (State.TRIAL, None)
    now, outcome = step(dataclasses.replace(now, attempts=3), settings.Interrupted(3))
    assert (now.state, outcome, now.active) == (State.IDLE, Outcome.ROLLED_BACK, A)
    assert now.quarantine == {B: Reason.INTERRUPTED}


def test_settings_survive_being_written_and_read_and_a_record_without_them_is_read() -> None:
    full = Record(settings=dataclasses.replace(record(State.TRIAL), quarantine={A: Reason.SETTINGS_FAILED}))
    assert decode(encode(full, 3)) == (3, full)
    document = json.loads(_body(Record(), 4))
    del document["settings"]
    assert decode(_slot(json.dumps(document).encode())) == (4, Record())


def _body(kept: Record, generation: int) -> bytes:
    return encode(kept, generation).split(b"\n", 1)[1]


def _slot(body: bytes) -> bytes:
    return b"edge-ota state " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def test_a_state_of_a_later_version_is_taken_back() -> None:
    body = _body(Record(settings=record(State.TRIAL)), 5).replace(b'"state":"trial"', b'"state":"dreaming"')
    read = decode(_slot(body))[1].settings
    assert read.state is State.UNKNOWN
    assert step(read, settings.Interrupted(3))[0].active == A


def test_a_document_that_was_damaged_is_not_used(tmp_path: Path) -> None:
    fs = Fs(tmp_path)
    kept = Configuration(fs, Journal(fs))
    sha256 = kept.propose(b"x = 1\n", FILE, Origin.PERSON, ())
    assert kept.document(sha256) == "x = 1\n"
    (tmp_path / "config" / f"{sha256}.toml").write_bytes(b"x = 2\n")
    with pytest.raises(StoreError) as damaged:
        kept.document(sha256)
    assert damaged.value.reason is Reason.PAYLOAD_CORRUPT


def _open(disk: MemoryDisk) -> Configuration:
    fs = Fs(disk)
    return Configuration(fs, Journal(fs))


@pytest.mark.parametrize("works", [True, False])
def test_a_cut_at_any_call_leaves_settings_that_passed_and_at_most_one_more_trial(works: bool) -> None:
    disk = MemoryDisk()
    kept = _open(disk)
    first = kept.propose(b"n = 1\n", FILE, Origin.PERSON, ())
    kept.apply(settings.TrialBegun())
    kept.apply(settings.TrialPassed())
    moments: list[tuple[MemoryDisk, int, bool]] = []
    begun, ended = 0, False
    disk.on_call = lambda: moments.append((disk.snapshot(), begun, ended))
    second = kept.propose(b"n = 2\n", FILE, Origin.FLEET, ("link",))
    kept.apply(settings.TrialBegun())
    begun = 1
    kept.apply(settings.TrialPassed() if works else settings.TrialFailed(Reason.SETTINGS_FAILED))
    ended = True
    kept.propose(b"n = 3\n", FILE, Origin.PERSON, ())
    final = second if works else first
    states = set()
    for cut, had_begun, had_ended in moments:
        for picks in Possibilities(cut).picks(bound=40, seed=1):
            left = _open(cut.after_cut(picks))
            now = left.record
            states.add((now.state, now.active == first, now.attempts))
            assert now.active == final if had_ended else now.active in (first, second)
            assert left.document(now.active)
            if now.state is State.TRIAL:
                assert left.document(now.trial)
            if had_begun and not had_ended and now.state is State.TRIAL:
                assert now.attempts == 1, "settings were used before the attempt was on the disk"
            if not had_begun:
                assert now.active == first
    assert len(moments) > 15
    assert {(State.TRIAL, True, 0), (State.TRIAL, True, 1), (State.IDLE, True, 0)} <= states


class Trials(RuleBasedStateMachine):
    """Random walks with power cuts in between: the active document is always one that passed, and can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = MemoryDisk()
        self.kept = _open(self.disk)
        self.number = 0
        self.passed: set[str] = {""}
        self.begun = 0

    @precondition(lambda self: self.kept.record.state is State.IDLE)
    @rule(origin=st.sampled_from(Origin))
    def propose(self, origin: Origin) -> None:
        self.number += 1
        self.begun = 0
        self.kept.propose(f"n = {self.number}\n".encode(), FILE, origin, ("link",))

    @precondition(lambda self: self.kept.record.state is State.TRIAL and self.kept.record.attempts == self.begun < 3)
    @rule()
    def begin(self) -> None:
        self.kept.apply(settings.TrialBegun())
        self.begun += 1

    @precondition(lambda self: self.kept.record.state is State.TRIAL and self.begun)
    @rule(works=st.booleans())
    def end(self, works: bool) -> None:
        if works:
            self.passed.add(self.kept.record.trial)
        self.kept.apply(settings.TrialPassed() if works else settings.TrialFailed(Reason.SETTINGS_FAILED))

    @rule()
    def file_changes(self) -> None:
        self.kept.apply(settings.FileChanged())

    @rule()
    def restart(self) -> None:
        kept, self.disk = self.kept.record, self.disk.after_cut()
        self.kept = _open(self.disk)
        assert self.kept.record == kept
        if kept.state is not State.IDLE:
            self.kept.apply(settings.Interrupted(3))

    @invariant()
    def what_is_active_passed_its_trial_and_can_be_read(self) -> None:
        record = self.kept.record
        assert record.active in self.passed
        for sha256 in filter(None, (record.active, record.trial)):
            assert self.kept.document(sha256)
        assert record.attempts <= 3


Trials.TestCase.settings = effort(max_examples=60, stateful_step_count=30, deadline=None)
TestTrials = Trials.TestCase
