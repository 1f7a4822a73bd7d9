"""Gathering records into batches."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.daemon.histogram import Histogram
from agent.daemon.telemetry import ALARM, EVENT, RESULT_FIELDS, SAMPLE, Batch, Clocks, Telemetry, TelemetryLimits
from agent.protocol import Result

BOX = [{"label": "person", "score": 0.91, "box": [10.0, 20.0, 110.0, 220.0]}]


class FakeClocks:
    """Both clocks, moved by hand; the wall clock starts in 2027."""

    def __init__(self) -> None:
        self.mono = 5_000_000_000
        self.offset = 1_800_000_000_000_000_000

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.mono + self.offset, lambda: self.mono, "boot-1")


def _telemetry(limits: TelemetryLimits | None = None, **options: Any) -> Telemetry:
    return Telemetry(FakeClocks().clocks(), limits, **options)


def _result(seq: int, items: list[Any] | None = None, latency_us: int = 1500) -> Result:
    start = 1_000_000_000 + seq * 33_000_000
    return Result(seq, start, start + latency_us * 1000, [10, 200, 1200, 50], BOX if items is None else items)


def _flush(telemetry: Telemetry, limit: int = 10**6) -> list[tuple[str, dict[str, Any]]]:
    taken: list[Batch] = []

    def publish(batch: Batch) -> bool:
        if len(taken) >= limit:
            return False
        taken.append(batch)
        return True

    while telemetry.flush(publish):
        pass
    return [(batch.suffix, json.loads(batch.payload)) for batch in taken]


def test_a_second_of_results_of_a_line_is_one_message_that_says_everything() -> None:
    telemetry = _telemetry()
    for seq in range(30):
        telemetry.result("person", _result(seq))
    [(suffix, batch)] = _flush(telemetry)
    assert suffix == "tele"
    assert (batch["v"], batch["boot"], batch["n"], batch["line"]) == (1, "boot-1", 1, "person")
    assert batch["fields"] == list(RESULT_FIELDS)
    rows = [dict(zip(batch["fields"], row, strict=True)) for row in batch["results"]]
    assert [row["seq"] for row in rows] == list(range(30))
    first = rows[0]
    assert first["t_frame_ns"] == 1_000_000_000
    assert first["latency_us"] == 1500
    assert first["items"] == BOX
    # a monotonic time placed on the wall clock by the batch's own pair of readings
    assert first["wall_ms"] == (batch["wall_ns"] - batch["mono_ns"] + first["t_frame_ns"]) // 1_000_000


def test_lines_that_take_turns_still_share_no_more_than_one_message_each() -> None:
    telemetry = _telemetry()
    for seq in range(30):
        telemetry.result("person", _result(seq))
        telemetry.result("meter", _result(seq))
    batches = _flush(telemetry)
    assert [batch["line"] for _, batch in batches] == ["person", "meter"]
    assert all(len(batch["results"]) == 30 for _, batch in batches)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2048, 20_000))
def test_every_seq_leaves_exactly_once_in_order_within_the_size_whatever_the_items(seed: int, cap: int) -> None:
    rng = random.Random(seed)
    telemetry = _telemetry(TelemetryLimits(batch_bytes=cap))
    for seq in range(200):
        items = [{"label": "x" * rng.randrange(60), "score": 0.5}] * rng.randrange(12)
        telemetry.result("person", _result(seq, items))
    taken: list[Batch] = []
    while telemetry.flush(lambda batch: taken.append(batch) is None):
        pass
    assert max(len(batch.payload) for batch in taken) <= cap
    seqs = [row[0] for batch in taken for row in json.loads(batch.payload)["results"]]
    assert seqs == list(range(200))
    assert telemetry.waiting_bytes == 0


def test_drops_are_told_as_ranges_with_their_reason() -> None:
    telemetry = _telemetry()
    telemetry.dropped("person", [3, 4, 5, 9, 11, 10], "backlog")
    telemetry.dropped("person", [12], "worker_lost")
    [(_, batch)] = _flush(telemetry)
    assert [row[:3] for row in batch["dropped"]] == [[3, 5, "backlog"], [9, 11, "backlog"], [12, 12, "worker_lost"]]
    assert telemetry.counts("person") == {"dropped_backlog": 6, "dropped_worker_lost": 1}


def test_events_leave_first_and_each_carries_both_times() -> None:
    telemetry = _telemetry()
    telemetry.result("person", _result(0))
    telemetry.event("update", {"line": "person", "state": "fetching"})
    telemetry.event("alarm", {"reason": "worker_crashed"}, alarm=True)
    batches = _flush(telemetry)
    assert [suffix for suffix, _ in batches] == ["evt", "evt", "tele"]
    [alarm] = batches[0][1]["events"]
    assert alarm["kind"] == "alarm"
    assert alarm["facts"] == {"reason": "worker_crashed"}
    assert alarm["t_ns"] == 5_000_000_000
    assert alarm["wall_ms"] == 1_800_000_005_000


def test_a_batch_that_was_not_taken_is_offered_again_unchanged_and_nothing_overtakes_or_is_lost() -> None:
    telemetry = _telemetry()
    for seq in range(10):
        telemetry.result("person", _result(seq))
    refused: list[Batch] = []
    assert telemetry.flush(lambda batch: refused.append(batch) is not None) == 0
    for seq in range(10, 20):
        telemetry.result("person", _result(seq))
    taken: list[Batch] = []
    telemetry.flush(lambda batch: taken.append(batch) is None)
    assert taken[0] == refused[0]
    assert [row[0] for batch in taken for row in json.loads(batch.payload)["results"]] == list(range(20))
    assert [json.loads(batch.payload)["n"] for batch in taken] == [1, 2]


def test_a_broker_of_small_packets_gets_small_batches_and_what_is_too_large_for_it_holds_up_nothing() -> None:
    telemetry = _telemetry()
    telemetry.event("alarm", {"text": "x" * 20_000}, alarm=True)
    telemetry.event("alarm", {"text": "small"}, alarm=True)
    for seq in range(300):
        telemetry.result("person", _result(seq))
    refused: list[Batch] = []
    telemetry.flush(lambda batch: refused.append(batch) is not None)
    assert len(refused[0].payload) > 16_000, "made for a broker that takes large packets"
    taken: list[Batch] = []
    while telemetry.flush(lambda batch: taken.append(batch) is None, room_bytes=8000):
        pass
    assert max(len(batch.payload) for batch in taken) <= 8000
    events = [event for batch in taken if batch.suffix == "evt" for event in json.loads(batch.payload)["events"]]
    seqs = [row[0] for batch in taken if batch.suffix == "tele" for row in json.loads(batch.payload)["results"]]
    assert seqs == list(range(300))
    assert telemetry.lost[ALARM] + len(events) == 2
    assert json.loads(taken[0].payload)["lost"] == {str(ALARM): telemetry.lost[ALARM]}
    telemetry.event("alarm", {"text": "x" * 20_000}, alarm=True)
    telemetry.event("alarm", {"text": "small"}, alarm=True)
    assert telemetry.flush(lambda batch: taken.append(batch) is None, room_bytes=8000) == 1
    assert json.loads(taken[-1].payload)["events"][0]["facts"] == {"text": "small"}


@pytest.mark.fault("F85")
def test_offline_the_oldest_results_go_first_then_events_and_alarms_stay() -> None:
    telemetry = _telemetry(TelemetryLimits(waiting_bytes=60_000, alarms_bytes=10_000, batch_bytes=8192))
    telemetry.event("alarm", {"number": 0}, alarm=True)
    for number in range(100):
        telemetry.event("command", {"number": number})
    for seq in range(2000):
        telemetry.result("person", _result(seq))
    assert telemetry.waiting_bytes <= 50_000
    lost = telemetry.lost
    assert lost[SAMPLE] > 1000
    assert (lost[EVENT], lost[ALARM]) == (0, 0)
    batches = _flush(telemetry)
    events = [event["facts"]["number"] for suffix, batch in batches if suffix == "evt" for event in batch["events"]]
    assert events == [0, *range(100)]
    seqs = [row[0] for suffix, batch in batches if suffix == "tele" for row in batch["results"]]
    assert seqs == list(range(lost[SAMPLE], 2000)), "the newest, without a gap"
    assert batches[0][1]["lost"] == {str(SAMPLE): lost[SAMPLE]}, "and the reader is told how many are missing"
    assert all("lost" not in batch for _, batch in batches[1:])


def test_alarms_push_everything_else_out_and_results_never_push_out_events() -> None:
    telemetry = _telemetry(TelemetryLimits(waiting_bytes=20_000, alarms_bytes=5_000, batch_bytes=8192))
    for number in range(1000):
        telemetry.event("command", {"number": number})
    events_lost = telemetry.lost[EVENT]
    assert events_lost > 500
    for seq in range(100):
        telemetry.result("person", _result(seq))
    assert telemetry.lost[EVENT] == events_lost
    assert telemetry.lost[SAMPLE] == 100
    for number in range(1000):
        telemetry.event("alarm", {"number": number}, alarm=True)
    assert telemetry.lost[ALARM] > 0, "even alarms are bounded"
    assert telemetry.waiting_bytes <= 20_000
    kinds = {event["kind"] for _, batch in _flush(telemetry) for event in batch["events"]}
    assert kinds == {"alarm"}


def test_what_gathered_offline_leaves_paced() -> None:
    telemetry = _telemetry(TelemetryLimits(batch_bytes=4096, flush_batches=3))
    for seq in range(500):
        telemetry.result("person", _result(seq))
    assert telemetry.flush(lambda batch: True) == 3


@pytest.mark.parametrize(
    "items",
    [
        [{"label": "person", "score": float("nan")}],
        [{"label": "half a character \ud800"}],
        [{"label": "x" * 60_000}],
    ],
)
def test_items_that_cannot_be_sent_leave_the_frame_accounted_for(items: list[Any]) -> None:
    telemetry = _telemetry()
    telemetry.result("person", _result(0))
    telemetry.result("person", _result(1, items))
    telemetry.result("person", _result(2))
    [(_, batch)] = _flush(telemetry)
    assert [row[0] for row in batch["results"]] == [0, 1, 2]
    assert batch["results"][1][-1] is None
    assert batch["lost"] == {str(SAMPLE): 1}


def test_results_can_be_switched_off_and_figures_stay() -> None:
    telemetry = _telemetry(results=False)
    for seq in range(100):
        telemetry.result("person", _result(seq))
    telemetry.dropped("person", [100], "backlog")
    telemetry.metrics({"bytes": {"telemetry": {"in": 0, "out": 5}}})
    [(suffix, batch)] = _flush(telemetry)
    assert suffix == "tele"
    [record] = batch["metrics"]
    assert record["facts"]["bytes"]["telemetry"]["out"] == 5
    line = record["lines"]["person"]
    assert line["counts"] == {"results": 100, "dropped_backlog": 1}
    assert set(line["stages_ms"]) == {"wait", "preprocess", "inference", "postprocess", "latency"}
    assert line["stages_ms"]["inference"]["p50"] == pytest.approx(1.2, rel=0.05)


def test_quantiles_are_within_the_error_the_buckets_promise() -> None:
    rng = random.Random(5)
    values = sorted(rng.lognormvariate(7, 1.2) for _ in range(20_000))
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for share in (0.5, 0.95, 0.99):
        exact = values[int(share * len(values)) - 1]
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.05)


def test_a_histogram_takes_any_value_and_an_empty_one_says_zero() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.5) == 0.0
    for value in (0, 0.2, 1, 10**12):
        histogram.add(value)
    assert histogram.count == 4
    assert histogram.quantile(0.01) == pytest.approx(1.0, rel=0.05)
    assert histogram.quantile(1.0) > 10**8
