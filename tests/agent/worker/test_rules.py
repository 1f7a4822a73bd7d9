"""Rules: hysteresis, zones, minimum duration, gaps, cool-down; every beginning has one end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import AgentError, Reason
from agent.worker.rules import CENTRE, MAX_RULES, Began, Ended, Rule, Rules, inside, parse_rules

SECOND = 1_000_000_000
LEFT = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))


def person(score: float, box: tuple[float, float, float, float] = (10, 10, 30, 90)) -> dict[str, object]:
    return {"label": "person", "score": score, "box": list(box)}


def run(rule: Rule, frames: list[tuple[float, list[dict[str, object]]]]) -> list[tuple[float, str]]:
    """(time, what) of everything that the frames (time in seconds, items) begin and end."""
    rules = Rules([rule], 100, 100)
    told = []
    for t_s, items in frames:
        for what in rules.look(items, round(t_s * SECOND)):
            told.append((t_s, "began" if isinstance(what, Began) else f"ended {what.duration_s:g}"))
    return told


def test_an_event_begins_above_and_ends_only_below_the_lower_threshold() -> None:
    frames = [(t, [person(score)]) for t, score in enumerate((0.5, 0.8, 0.6, 0.45, 0.8, 0.3, 0.6))]
    assert run(Rule("r", "person", above=0.7, below=0.4), frames) == [(1, "began"), (5, "ended 3")]


def test_an_item_of_another_label_or_without_a_score_fits_no_rule() -> None:
    assert run(Rule("r", "person"), [(0, [{"label": "cat", "score": 1.0}, {"label": "person"}])]) == []


def test_a_rule_without_a_label_takes_an_anomaly_score() -> None:
    frames = [(0, [{"score": 0.1}]), (1, [{"score": 3.0}]), (2, [{"score": 0.2}])]
    assert run(Rule("r", above=1.0, below=0.5), frames) == [(1, "began"), (2, "ended 0")]


def test_an_anomaly_whose_score_cannot_be_said_is_above_every_threshold() -> None:
    unsaid = {"label": "anomalous", "score": None, "threshold": 0.004}
    frames = [(0, [{"label": "normal", "score": 0.001}]), (1, [unsaid]), (2, [{"label": "normal", "score": 0.001}])]
    assert run(Rule("r", above=0.5, below=0.5), frames) == [(1, "began"), (2, "ended 0")]


def test_an_event_begins_after_its_minimum_duration_and_a_shorter_one_not_at_all() -> None:
    rule = Rule("r", for_s=2.0)
    short = [(t / 2, [person(0.9)] if t < 4 else []) for t in range(8)]
    assert run(rule, short) == []
    long = [(t / 2, [person(0.9)] if t < 7 else []) for t in range(9)]
    assert run(rule, long) == [(2.0, "began"), (3.5, "ended 3")]


def test_a_gap_shorter_than_allowed_interrupts_nothing() -> None:
    seen = [True, False, True, True, False, False, False, True]
    frames = [(t / 10, [person(0.9)] if there else []) for t, there in enumerate(seen)]
    assert run(Rule("r", gap_s=0.25), frames) == [(0.0, "began"), (0.6, "ended 0.3"), (0.7, "began")]


def test_nothing_begins_during_the_cool_down() -> None:
    frames = [(t, [person(0.9)] if t != 1 else []) for t in range(8)]
    assert run(Rule("r", cool_down_s=5), frames) == [(0, "began"), (1, "ended 0"), (5, "began")]


def test_a_box_counts_in_the_zone_in_which_it_stands() -> None:
    high_over_the_zone = person(0.9, (10, 0, 30, 50))
    lower_half = ((0.0, 0.6), (1.0, 0.6), (1.0, 1.0), (0.0, 1.0))
    assert run(Rule("r", zone=lower_half), [(0, [high_over_the_zone])]) == []
    assert run(Rule("r", zone=lower_half), [(0, [person(0.9, (10, 0, 30, 70))])]) == [(0, "began")]
    assert run(Rule("r", zone=lower_half, anchor=CENTRE), [(0, [person(0.9, (10, 0, 30, 70))])]) == []


def test_an_item_without_a_box_is_in_no_zone() -> None:
    assert run(Rule("r", zone=LEFT), [(0, [{"label": "x", "score": 1.0}])]) == []


def test_a_count_asks_for_as_many_items() -> None:
    rule = Rule("r", count=2, zone=LEFT)
    one_outside = [person(0.9), person(0.9, (70, 10, 90, 90))]
    assert run(rule, [(0, one_outside), (1, [person(0.9), person(0.8)])]) == [(1, "began")]


def test_the_best_item_is_told_and_rules_do_not_disturb_each_other() -> None:
    rules = Rules([Rule("a", above=0.5), Rule("b", above=0.95)], 100, 100)
    [began] = rules.look([person(0.6), person(0.9)], 0)
    assert isinstance(began, Began)
    assert (began.rule.name, began.item["score"]) == ("a", 0.9)


@given(st.lists(st.booleans(), max_size=60), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.2, 0.5]))
def test_beginnings_and_ends_alternate_whatever_is_seen(seen: list[bool], for_s: float, gap_s: float) -> None:
    frames = [(t / 10, [person(0.9)] if there else []) for t, there in enumerate(seen)]
    told = run(Rule("r", for_s=for_s, gap_s=gap_s), frames)
    kinds = [what.split()[0] for _, what in told]
    assert kinds == ["began", "ended"] * (len(kinds) // 2) + ["began"] * (len(kinds) % 2)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_point_is_in_a_rectangle_or_not(x: float, y: float) -> None:
    corners = ((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75))
    on_the_edge = x in (0.25, 0.75) or y in (0.25, 0.75)
    assert on_the_edge or inside((x, y), corners) == (0.25 < x < 0.75 and 0.25 < y < 0.75)


def test_the_notch_of_a_polygon_is_outside() -> None:
    notched = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.2), (0.0, 1.0))
    assert not inside((0.5, 0.6), notched)
    assert inside((0.1, 0.6), notched)


@pytest.mark.parametrize(
    "items", [[{}], [7], [{"name": "r", "zone": [[1]]}], [{"name": "r", "zone": [], "weight": 3}], [None]]
)
def test_what_is_no_rule_is_refused(items: list[object]) -> None:
    with pytest.raises(AgentError) as caught:
        parse_rules(items)
    assert caught.value.reason is Reason.BAD_MESSAGE


def test_more_rules_than_a_line_may_have_are_refused() -> None:
    with pytest.raises(AgentError):
        parse_rules([{"name": str(i), "zone": []} for i in range(MAX_RULES + 1)])


def test_an_end_tells_how_long_the_event_was() -> None:
    rules = Rules([Rule("r")], 10, 10)
    rules.look([person(0.9)], 5 * SECOND)
    rules.look([person(0.9)], 7 * SECOND)
    assert rules.look([], 8 * SECOND) == [Ended(Rule("r"), 2.0)]
