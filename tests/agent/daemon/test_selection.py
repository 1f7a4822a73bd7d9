"""Ranking of verdicts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.daemon.selection import Verdict, explain, failure, quantile, rank


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
