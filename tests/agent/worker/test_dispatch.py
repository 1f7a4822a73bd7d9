"""The dispatch rules, one by one and against random histories."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.errors import AgentError, Reason
from agent.worker.dispatch import MAX_READERS, Dispatch, Drop, Ended, Moved, Notify, slots_needed


def offer(dispatch: Dispatch, t_ns: int = 0):
    slot = dispatch.free_slot()
    assert slot is not None
    return dispatch.offer(slot, t_ns)


def serving(policy: str = "live", queue_frames: int = 4) -> Dispatch:
    """A dispatch with an active reader 1 of line `a` that has asked."""
    dispatch = Dispatch(policy, queue_frames)
    dispatch.attach(1, "a", active=True)
    dispatch.credit(1, None)
    return dispatch


def test_a_source_rests_until_its_first_active_reader_asks():
    dispatch = Dispatch("live", 4)
    assert dispatch.free_slot() is None
    dispatch.attach(1, "a", active=False)
    dispatch.credit(1, None)
    assert not dispatch.started
    assert dispatch.free_slot() is None
    dispatch.attach(2, "a", active=True)
    assert not dispatch.started
    dispatch.credit(2, None)
    assert dispatch.started
    assert dispatch.free_slot() is not None


def test_a_frame_goes_at_once_to_a_reader_that_asked_and_the_next_waits_for_its_credit():
    dispatch = serving()
    assert offer(dispatch, 7) == [Notify(1, 0, 7, 0)]
    assert offer(dispatch, 8) == []
    assert dispatch.credit(1, 0) == [Notify(1, 1, 8, 1)]


def test_a_hiccup_shorter_than_the_queue_drops_nothing():
    dispatch = serving(queue_frames=4)
    slot = offer(dispatch)[0].slot
    assert [offer(dispatch) for _ in range(4)] == [[]] * 4
    delivered = []
    for _ in range(4):
        (notify,) = dispatch.credit(1, slot)
        delivered.append(notify.seq)
        slot = notify.slot
    assert delivered == [1, 2, 3, 4]


def test_an_overloaded_live_line_flushes_the_older_frames_and_keeps_the_newest():
    dispatch = serving(queue_frames=3)
    offer(dispatch)
    for _ in range(3):
        assert offer(dispatch) == []
    assert offer(dispatch) == [Drop("a", (1, 2, 3), "backlog")]
    assert dispatch.credit(1, 0) == [Notify(1, 4, 0, 4)]


def test_policy_every_waits_instead_of_dropping():
    dispatch = serving("every", queue_frames=2)
    offer(dispatch)
    offer(dispatch)
    offer(dispatch)
    assert dispatch.free_slot() is None
    dispatch.credit(1, 0)
    assert dispatch.free_slot() is not None


def test_a_switch_takes_pending_frames_along_and_ends_the_old_reader_after_its_lease():
    dispatch = serving()
    offer(dispatch)  # 0, leased to reader 1
    offer(dispatch)  # 1, pending
    dispatch.attach(2, "a", active=False)
    dispatch.credit(2, None)
    assert dispatch.switch("a", 2) == [Moved("a", 2, 1), Notify(2, 1, 0, 1)]
    assert dispatch.credit(1, 0) == [Ended(1)]


def test_a_switch_between_frames_ends_the_old_reader_at_once():
    dispatch = serving()
    dispatch.attach(2, "a", active=False)
    assert dispatch.switch("a", 2) == [Moved("a", 2, 0), Ended(1)]


def test_an_active_attach_on_an_occupied_line_is_a_switch():
    dispatch = serving()
    assert dispatch.attach(2, "a", active=True) == [Moved("a", 2, 0), Ended(1)]


def test_a_switch_to_a_reader_of_another_line_is_refused():
    dispatch = serving()
    dispatch.attach(2, "b", active=False)
    with pytest.raises(AgentError) as caught:
        dispatch.switch("a", 2)
    assert caught.value.reason is Reason.BAD_MESSAGE


def test_losing_a_reader_drops_its_lease_alone_and_the_pending_frames_wait_for_the_next():
    dispatch = serving()
    offer(dispatch)
    offer(dispatch)
    assert dispatch.lost(1) == [Drop("a", (0,), "worker_lost")]
    dispatch.attach(2, "a", active=True)
    assert dispatch.credit(2, None) == [Notify(2, 1, 0, 1)]


def test_without_any_reader_frames_fall_out_as_no_reader():
    dispatch = serving(queue_frames=2)
    dispatch.lost(1)
    offer(dispatch)
    offer(dispatch)
    assert offer(dispatch) == [Drop("a", (0, 1), "no_reader")]


def test_detaching_the_active_reader_ends_its_line_and_drops_what_waits():
    dispatch = serving()
    offer(dispatch)
    offer(dispatch)
    assert dispatch.detach(1, "paused") == [Drop("a", (0,), "paused"), Drop("a", (1,), "no_reader")]
    assert dispatch.free_slot() is None
    assert dispatch.detach(1, "paused") == []


def test_detaching_a_reader_in_waiting_leaves_the_line_alone():
    dispatch = serving()
    dispatch.attach(2, "a", active=False)
    assert dispatch.detach(2, "rejected") == []
    assert [type(effect) for effect in offer(dispatch)] == [Notify]


def test_stopping_drops_pending_frames_and_lets_a_lease_be_answered():
    dispatch = serving()
    offer(dispatch)
    offer(dispatch)
    assert dispatch.stop() == [Drop("a", (1,), "stopped")]
    assert dispatch.credit(1, 0) == [Ended(1)]
    assert dispatch.idle


@pytest.mark.parametrize("slot", [1, 3, None])
def test_returning_a_slot_that_was_not_lent_is_refused(slot):
    dispatch = serving()
    offer(dispatch)
    with pytest.raises(AgentError):
        dispatch.credit(1, slot)


def test_asking_twice_is_refused():
    dispatch = serving()
    with pytest.raises(AgentError):
        dispatch.credit(1, None)


def test_one_reader_too_many_is_refused():
    dispatch = Dispatch("live", 4)
    for reader in range(MAX_READERS):
        dispatch.attach(reader, f"line{reader}", active=True)
    with pytest.raises(AgentError):
        dispatch.attach(MAX_READERS, "more", active=True)


def followed(policy: str = "live") -> Dispatch:
    """Line "a" with reader 1, line "c" on it with reader 2, both asking."""
    dispatch = Dispatch(policy, 4)
    dispatch.attach(1, "a", active=True)
    dispatch.attach(2, "c", active=True, after="a")
    dispatch.credit(2, None)
    assert not dispatch.started, "a line that follows keeps no source awake"
    dispatch.credit(1, None)
    return dispatch


def test_a_line_that_follows_gets_what_the_other_gives_back_with_something_found():
    dispatch = followed()
    assert offer(dispatch, 7) == [Notify(1, 0, 7, 0, followed=True)]
    assert dispatch.credit(1, 0, b"boxes") == [Notify(2, 0, 7, 0, b"boxes")]
    assert dispatch.free_slot() == 1, "the frame is still read"
    assert dispatch.credit(2, 0) == []
    assert dispatch.free_slot() == 0


def test_a_frame_in_which_nothing_was_found_does_not_reach_the_line_that_follows():
    dispatch = followed()
    offer(dispatch)
    assert dispatch.credit(1, 0) == []
    assert dispatch.idle


def test_a_reader_that_says_what_nobody_asked_breaks_the_rules():
    dispatch = serving()
    offer(dispatch)
    with pytest.raises(AgentError) as caught:
        dispatch.credit(1, 0, b"boxes")
    assert caught.value.reason is Reason.BAD_MESSAGE


def test_a_busy_follower_gets_the_newest_and_the_other_line_never_waits_for_it():
    dispatch = followed()
    dropped = []
    for seq in range(4):
        (notice,) = offer(dispatch)
        assert notice.seq == seq, "the line before goes on"
        dropped += [e for e in dispatch.credit(1, notice.slot, b"boxes") if isinstance(e, Drop)]
    assert dropped == [Drop("c", (1,), "backlog"), Drop("c", (2,), "backlog")]
    assert dispatch.credit(2, 0) == [Notify(2, 3, 0, 1, b"boxes")]


def test_with_every_frame_the_line_before_waits_for_its_follower_and_nothing_is_lost():
    dispatch = followed("every")
    offer(dispatch)
    dispatch.credit(1, 0, b"boxes")
    offer(dispatch)
    dispatch.credit(1, 1, b"boxes")  # the follower still holds the first, so this one waits
    assert offer(dispatch) == []
    assert dispatch.credit(2, 0) == [Notify(2, 1, 0, 1, b"boxes"), Notify(1, 2, 0, 2, followed=True)]


def test_a_follower_that_dies_or_leaves_does_not_stop_the_line_before():
    for policy in ("live", "every"):
        dispatch = followed(policy)
        offer(dispatch)
        dispatch.credit(1, 0, b"boxes")
        assert dispatch.lost(2) == [Drop("c", (0,), "worker_lost")]
        (notice,) = offer(dispatch)
        dispatch.credit(1, notice.slot, b"boxes")
        dispatch.attach(3, "c", active=True, after="a")
        assert [e.seq for e in dispatch.credit(3, None) if isinstance(e, Notify) and e.reader == 3] == [1]
        dispatch.detach(3, "stopped")
        assert [e.reader for e in offer(dispatch)] == [1]


class Histories(RuleBasedStateMachine):
    """Random histories of frames, readers, switches, deaths and detachments over two lines, and one that follows "a".

    The model keeps what each line was offered and what became of it; the dispatch may never disagree.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started = False

    def start(self, policy: str, queue_frames: int) -> None:
        self.started = True
        self.policy = policy
        self.queue_frames = queue_frames
        self.dispatch = Dispatch(policy, queue_frames)
        self.readers: dict[int, str] = {}
        self.held: dict[int, tuple[int, int]] = {}  # reader to (seq, slot)
        self.asked: set[int] = set()
        self.ended: set[int] = set()
        self.lines: set[str] = set()
        self.offered: dict[str, list[int]] = {}
        self.fate: Counter[tuple[str, int]] = Counter()
        self.delivered: dict[str, list[int]] = {}
        self.slots = [0] * slots_needed(queue_frames)
        self.next_reader = 1

    def absorb(self, effects) -> None:
        for effect in effects:
            if isinstance(effect, Notify):
                line = self.readers[effect.reader]
                assert effect.reader in self.asked
                assert effect.reader not in self.held
                assert effect.reader not in self.ended
                self.asked.discard(effect.reader)
                self.held[effect.reader] = (effect.seq, effect.slot)
                self.fate[line, effect.seq] += 1
                self.delivered.setdefault(line, []).append(effect.seq)
            elif isinstance(effect, Drop):
                for seq in effect.seqs:
                    if effect.reason in ("worker_lost", "gone"):
                        # a lease that was delivered before: delivered and then dropped is one fate
                        assert self.fate[effect.line, seq] == 1
                    else:
                        self.fate[effect.line, seq] += 1
                if self.policy == "every":
                    assert effect.reason != "backlog"
            elif isinstance(effect, Ended):
                assert effect.reader not in self.held
                self.ended.add(effect.reader)

    @precondition(lambda self: not self.started)
    @rule(policy=st.sampled_from(["live", "every"]), queue_frames=st.integers(1, 4))
    def begin(self, policy, queue_frames):
        self.start(policy, queue_frames)

    @precondition(lambda self: self.started and len(self.readers) < MAX_READERS)
    @rule(line=st.sampled_from(["a", "b", "c"]), active=st.booleans())
    def attach(self, line, active):
        reader, self.next_reader = self.next_reader, self.next_reader + 1
        self.readers[reader] = line
        if active:
            self.lines.add(line)
        self.absorb(self.dispatch.attach(reader, line, active, "a" if line == "c" else ""))

    @precondition(lambda self: self.started and self.readers)
    @rule(pick=st.integers(0, 20), found=st.booleans())
    def credit(self, pick, found):
        reader = sorted(self.readers)[pick % len(self.readers)]
        if reader in self.asked or reader in self.ended:
            return
        seq, slot = self.held.pop(reader) if reader in self.held else (-1, None)
        found = found and self.dispatch._readers[reader].followed
        self.asked.add(reader)
        if found and slot is not None and self.readers[reader] == "a" and "c" in self.lines:
            self.offered.setdefault("c", []).append(seq)
        self.absorb(self.dispatch.credit(reader, slot, b"boxes" if found and slot is not None else b""))

    @precondition(lambda self: self.started)
    @rule()
    def frame(self):
        slot = self.dispatch.free_slot()
        if slot is None:
            assert self.policy == "every" or not self.lines - {"c"}
            return
        assert slot not in [held[1] for held in self.held.values()], "a slot that is read must not be written"
        seq = self.dispatch.next_seq
        for line in self.lines - {"c"}:
            self.offered.setdefault(line, []).append(seq)
        self.absorb(self.dispatch.offer(slot, seq))

    @precondition(lambda self: self.started and self.readers)
    @rule(pick=st.integers(0, 20))
    def switch(self, pick):
        reader = sorted(self.readers)[pick % len(self.readers)]
        line = self.readers[reader]
        try:
            effects = self.dispatch.switch(line, reader)
        except AgentError:
            return
        self.lines.add(line)
        self.absorb(effects)

    @precondition(lambda self: self.started and self.readers)
    @rule(pick=st.integers(0, 20), asked_for=st.booleans())
    def lose(self, pick, asked_for):
        reader = sorted(self.readers)[pick % len(self.readers)]
        effects = self.dispatch.detach(reader, "gone") if asked_for else self.dispatch.lost(reader)
        self.held.pop(reader, None)
        self.absorb(effects)
        line = self.readers.pop(reader)
        self.asked.discard(reader)
        self.ended.discard(reader)
        if asked_for and line not in self.dispatch._lines:
            self.lines.discard(line)

    @invariant()
    def every_frame_has_at_most_one_fate_and_waiting_ones_are_bounded(self):
        if not self.started:
            return
        for line, seqs in self.offered.items():
            fates = [self.fate[line, seq] for seq in seqs]
            assert all(fate <= 1 for fate in fates)
            assert fates.count(0) <= (self.queue_frames if line != "c" else 1 if self.policy == "live" else MAX_READERS)
        for line, seqs in self.delivered.items():
            assert len(seqs) == len(set(seqs))
            if line != "c" or self.policy == "live":
                assert seqs == sorted(seqs), "frames of a line go out in order, each once"

    @invariant()
    def a_slot_can_always_be_had_while_the_policy_is_live(self):
        if self.started and self.policy == "live" and self.lines - {"c"}:
            assert self.dispatch.free_slot() is not None

    def teardown(self):
        if not self.started:
            return
        self.absorb(self.dispatch.stop())
        for line, seqs in self.offered.items():
            assert all(self.fate[line, seq] == 1 for seq in seqs), "after the end every frame has exactly one fate"
        for reader in list(self.held):
            self.absorb(self.dispatch.credit(reader, self.held.pop(reader)[1]))
        assert self.dispatch.idle


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
