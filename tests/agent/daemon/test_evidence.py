"""What figures say against a delegate that pretends, and that they say nothing against one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.daemon import evidence
from agent.daemon.selection import Verdict

XNNPACK = Verdict("m", "litert:xnnpack", actual="litert:xnnpack", coverage=1.0, min_ms=4.0, cpu_ms=4.0)
PLAIN = Verdict("m", "litert:cpu", actual="litert:cpu", coverage=1.0, min_ms=20.0, cpu_ms=20.0)


def npu(cpu_ms: float, min_ms: float = 1.0, coverage: float = 1.0) -> Verdict:
    return Verdict("m", "litert:edgetpu", actual="litert:edgetpu", coverage=coverage, min_ms=min_ms, cpu_ms=cpu_ms)


@pytest.mark.parametrize("cpu_ms", [3.7, 4.0, 8.0, 20.0])
def test_hardware_that_uses_as_much_of_the_processor_as_the_processor_alone_fell_back(cpu_ms: float) -> None:
    charge = evidence.fell_back(npu(cpu_ms), [PLAIN, XNNPACK])
    assert "litert:xnnpack" in charge
    assert f"{cpu_ms:.3f} ms" in charge


def test_two_threads_do_not_hide_it() -> None:
    assert evidence.fell_back(npu(4.2, min_ms=2.2), [XNNPACK])


@pytest.mark.parametrize("cpu_ms", [0.05, 1.0, 3.5])
def test_hardware_that_takes_work_off_the_processor_is_believed_also_where_its_driver_spins(cpu_ms: float) -> None:
    assert not evidence.fell_back(npu(cpu_ms, min_ms=cpu_ms), [XNNPACK, PLAIN])


def test_hardware_that_hands_on_some_of_its_runs_fell_back_where_that_costs_as_much() -> None:
    witnesses = [replace(PLAIN, mean_cpu_ms=21.0), replace(XNNPACK, mean_cpu_ms=4.4)]
    charge = evidence.fell_back(replace(npu(0.1), mean_cpu_ms=4.2), witnesses)
    assert "4.200 ms of CPU a frame on average, as litert:xnnpack alone does (4.400 ms)" in charge
    assert not evidence.fell_back(replace(npu(0.1), mean_cpu_ms=3.5), witnesses)


def test_a_model_so_small_that_the_call_of_a_driver_costs_more_accuses_nobody() -> None:
    tiny = Verdict("m", "litert:xnnpack", actual="litert:xnnpack", min_ms=0.03, cpu_ms=0.03)
    assert not evidence.fell_back(npu(0.3, min_ms=0.4), [tiny])


def test_without_a_witness_nothing_is_said() -> None:
    assert not evidence.fell_back(npu(4.0), [])
    assert not evidence.fell_back(npu(4.0), [Verdict("m", "litert:xnnpack", reason="model_unloadable")])
    assert not evidence.fell_back(XNNPACK, [XNNPACK, PLAIN])


def test_too_small_a_share_of_the_nodes_counts_against_hardware_alone() -> None:
    assert "60.0%" in evidence.partly(npu(1, coverage=0.6), 0.9)
    assert not evidence.partly(npu(1, coverage=0.95), 0.9)
    assert not evidence.partly(Verdict("m", "litert:xnnpack", coverage=0.5), 0.9)


def test_memory_that_grows_with_every_run_is_a_leak() -> None:
    rss = [100 << 20, *((110 << 20) + i * (1 << 20) for i in range(6))]
    assert "KiB" in evidence.leaks(rss, [6] * 7)


@pytest.mark.parametrize(
    "rss_mb",
    [
        [100, 120, 120, 120, 120, 120, 120],
        [100, 110, 120, 130, 130, 130, 130],
        [100, 110, 120, 130, 140, 150, 120],
        [100, 101, 102],
    ],
)
def test_pools_that_fill_and_memory_that_comes_back_are_no_leak(rss_mb: list[int]) -> None:
    assert not evidence.leaks([mb << 20 for mb in rss_mb], [6] * len(rss_mb))


@given(st.lists(st.integers(1, 1 << 30), max_size=30), st.integers(1, 100))
@settings(deadline=None)
def test_more_rounds_are_asked_for_only_until_a_leak_can_be_told(rss: list[int], runs: int) -> None:
    enough = evidence.SETTLING_ROUNDS + evidence.GROWING_ROUNDS
    if len(rss) >= enough:
        assert not evidence.may_leak(rss)
    if len(rss) < enough:
        assert not evidence.leaks(rss, [runs] * len(rss))
