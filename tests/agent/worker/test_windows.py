"""Samples into windows: every window holds samples that follow each other, and nothing is lost or invented silently."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.worker.sources.samples import Windows, losses

MS = 1_000_000


def drain(windows: Windows, rows: np.ndarray, t_ns: int, found: list) -> None:
    """Give all rows, taking every window that becomes complete."""
    while len(rows):
        rows = rows[windows.extend(rows, t_ns) :]
        if windows.complete:
            slot = np.empty((windows.window, windows.channels), np.float32)
            found.append((windows.take(slot), slot))


@given(
    st.integers(1, 40), st.integers(1, 60), st.integers(1, 4),
    st.lists(st.integers(1, 70), min_size=1, max_size=12),
)  # fmt: skip
def test_windows_are_the_samples_cut_at_every_hop_however_they_arrive(
    window: int, hop: int, channels: int, batches: list[int]
) -> None:
    samples = np.arange(sum(batches) * channels, dtype=np.float32).reshape(-1, channels)
    windows = Windows(window, hop, channels, 1000.0)
    found: list = []
    done = 0
    for count in batches:
        done += count
        drain(windows, samples[done - count : done], done * MS, found)
    starts = range(0, len(samples) - window + 1, hop)
    assert len(found) == len(starts)
    for start, (t_ns, slot) in zip(starts, found, strict=True):
        assert np.array_equal(slot, samples[start : start + window])
        assert t_ns == (start + window) * MS, "a window's time is that of its last sample"
    assert windows.gaps == 0


@given(st.integers(1, 12), st.integers(1, 20), st.lists(st.booleans(), min_size=1, max_size=120))
def test_samples_one_by_one_make_the_same_windows_and_none_spans_a_gap(window: int, hop: int, lost: list[bool]) -> None:
    windows = Windows(window, hop, 1, 1000.0, slack_s=0.0005)
    run = gaps = 0
    for index, missing in enumerate(lost):
        if missing:
            gaps += run > 0
            run = 0
            continue
        run += 1
        windows.add([float(index)], index * MS)
        if windows.complete:
            slot = np.empty((window, 1), np.float32)
            assert windows.take(slot) == index * MS
            assert (np.diff(slot[:, 0]) == 1).all()
            assert run >= window
            assert (run - window) % hop == 0
    assert gaps - 1 <= windows.gaps <= gaps


def test_a_sample_that_comes_later_than_its_slack_or_before_the_last_one_begins_the_window_anew() -> None:
    windows = Windows(3, 3, 1, 100.0, slack_s=0.05)
    windows.add([1], 0)
    windows.add([2], 59 * MS)
    assert windows.gaps == 0, "late, but within the slack"
    windows.add([3], 120 * MS)
    assert (windows.gaps, windows.complete) == (1, False)
    windows.add([4], 119 * MS)
    assert windows.gaps == 2
    assert losses(windows, unreadable_lines=3, samples_dropped=0) == "gaps: 2, unreadable lines: 3"


def test_clearing_forgets_samples_and_time_and_counts_nothing() -> None:
    windows = Windows(2, 2, 1, 100.0, slack_s=0.01)
    windows.add([1], 10_000 * MS)
    windows.clear()
    windows.add([2], 5 * MS)
    windows.add([3], 15 * MS)
    slot = np.empty((2, 1), np.float32)
    assert windows.take(slot) == 15 * MS
    assert slot.ravel().tolist() == [2, 3]
    assert windows.gaps == 0


@pytest.mark.parametrize("hop", [1, 7, 64])
def test_collecting_and_taking_allocates_nothing_per_sample(hop: int) -> None:
    import tracemalloc

    windows = Windows(64, hop, 3, 1000.0)
    row, slot = [1.0, 2.0, 3.0], np.empty((64, 3), np.float32)

    def work(count: int) -> None:
        for index in range(count):
            windows.add(row, index)
            if windows.complete:
                windows.take(slot)

    work(200)
    tracemalloc.start()
    work(5000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096
