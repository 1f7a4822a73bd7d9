"""Ranking of verdicts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.daemon.selection import Verdict, explain, failure, falls, quantile, rank


def verdict(name: str, min_ms: float, reason: str = "", p50_ms: float = 0.0) -> Verdict:
    return Verdict("int8.tflite", name, actual=name, min_ms=min_ms, p50_ms=p50_ms, reason=reason)


def test_the_fastest_minimum_wins_even_with_a_worse_median() -> None:
    noisy, steady = verdict("a", 1.0, p50_ms=9.0), verdict("b", 2.0, p50_ms=2.1)
    assert rank([steady, noisy])[0] is noisy


def test_what_failed_is_never_ranked() -> None:
    assert rank([verdict("a", 0.1, "golden_mismatch")]) == []


def test_of_equals_the_one_higher_on_the_ladder_wins() -> None:
    first, second = verdict("a", 1.0), verdict("b", 1.0)
    assert rank([first, second])[0] is first


def test_a_missing_runtime_does_not_hide_what_is_wrong_with_the_model() -> None:
    assert failure([verdict("a", 0, "runtime_missing"), verdict("b", 0, "golden_mismatch")]).requested == "b"
    assert failure([verdict("a", 0, "delegate_broken"), verdict("b", 0, "golden_mismatch")]).requested == "b"


def test_the_explanation_names_the_choice_and_every_alternative() -> None:
    text = explain([verdict("a", 2.0), verdict("b", 1.0), verdict("c", 0, "worker_crashed")])
    assert text == "b 1.00 ms, a 2.0x, c worker_crashed"


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_one_of_the_values_and_enough_of_them_do_not_exceed_it(values: list[float], share: float) -> None:
    q = quantile(values, share)
    assert q in values
    assert sum(v <= q for v in values) >= share * len(values) - 1e-9


def test_the_quantile_of_nothing_is_zero() -> None:
    assert quantile([], 0.5) == pytest.approx(0)


FAST = Verdict("m", "fast", actual="fast", min_ms=1.0, cpu_ms=2.0, rss_bytes=300)
FRUGAL = Verdict("m", "frugal", actual="frugal", min_ms=4.0, cpu_ms=0.5, rss_bytes=200)
SMALL = Verdict("m", "small", actual="small", min_ms=1.9, cpu_ms=1.9, rss_bytes=100)
OVER = Verdict("m", "over", actual="over", min_ms=0.1, cpu_ms=0.1, rss_bytes=1, reason="over_budget")


@pytest.mark.parametrize(
    ("objective", "best"), [("latency", FAST), ("throughput", SMALL), ("memory", SMALL), ("power", FRUGAL)]
)
def test_each_objective_has_its_own_figure_and_none_picks_what_is_over_budget(objective: str, best: Verdict) -> None:
    assert rank([OVER, FAST, FRUGAL, SMALL], objective)[0] is best


LADDER = ("litert:edgetpu", "litert:xnnpack", "litert:vx", "onnx:cpu")


def test_hardware_above_the_chosen_rung_that_is_unfit_fell_and_hardware_below_it_did_not() -> None:
    unfit = {"litert:edgetpu": ("delegate_broken", "no device"), "litert:vx": ("runtime_missing", "no library")}
    (fall,) = falls("litert:xnnpack", LADDER, False, unfit)
    assert (fall.wanted, fall.reason, fall.using) == ("litert:edgetpu", "delegate_broken", "litert:xnnpack")
    assert [f.wanted for f in falls("onnx:cpu", LADDER, False, unfit)] == ["litert:edgetpu", "litert:vx"]


def test_a_processor_rung_counts_only_as_the_first_of_a_list_that_a_person_wrote() -> None:
    unfit = {"litert:xnnpack": ("runtime_missing", "")}
    ladder = ("litert:xnnpack", "onnx:cpu")
    assert not falls("onnx:cpu", ladder, False, unfit)
    assert [f.wanted for f in falls("onnx:cpu", ladder, True, unfit)] == ["litert:xnnpack"]


def test_a_rung_that_passed_has_not_failed_however_slow() -> None:
    assert not falls("litert:xnnpack", LADDER, True, {})
