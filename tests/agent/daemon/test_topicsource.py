"""What the daemon does with samples that arrive on the broker: strictly read, bounded, never silently incomplete."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import protocol
from agent.configtable import Table
from agent.daemon import topicsource
from agent.daemon.topics import Topics
from agent.daemon.topicsource import MAX_PAYLOAD_BYTES, MAX_WAITING, TopicSources, parse_samples
from agent.errors import ConfigError, Reason
from agent.sourceconfig import SourceConfig, parse_source
from ota.mqtt import Received


def message(payload: Any, *, retain: bool = False) -> Received:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return Received("edge/v1/edge/cam-1/in/pump", data, 0, retain, None, (), len(data))


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


class Process:
    """A source as far as the feed knows it."""

    def __init__(self, channels: int = 1, name: str = "pump") -> None:
        table = {"name": name, "kind": "topic", "topic": "pump", "channels": channels, "rate_hz": 100, "window": 4}
        self.config: SourceConfig = parse_source(Table(table, "agent.toml", Path("/")))
        self.fed: list[tuple[int, list[list[float]]]] = []
        self.samples: Mapping[str, int] = {}
        self.there = True

    def feed(self, t_ns: int, rows: list[list[float]]) -> bool:
        if self.there:
            assert len(protocol.encode(protocol.Feed(t_ns, rows))) <= protocol.MAX_MESSAGE_BYTES
            self.fed.append((t_ns, rows))
        return self.there

    @property
    def values(self) -> list[float]:
        return [row[0] for _, rows in self.fed for row in rows]


async def quiet(process: Process) -> None:
    """Wait until nothing more comes."""
    seen = -1
    while seen != len(process.fed):
        seen = len(process.fed)
        await asyncio.sleep(5 * topicsource.PAUSE_S)


# --- payloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "channels", "rows"),
    [
        ("1.5", 1, [[1.5]]),
        ("[1, 2, 3]", 1, [[1], [2], [3]]),
        ("[1, 2, 3, 4]", 2, [[1, 2], [3, 4]]),
        ("[[1, 2], [3, 4]]", 2, [[1, 2], [3, 4]]),
        ('{"values": [1, 2]}', 2, [[1, 2]]),
        ('{"values": 7}', 1, [[7]]),
        (" [ -1e3 ] ", 1, [[-1000.0]]),
    ],
)
def test_a_payload_is_a_number_numbers_or_samples(payload: str, channels: int, rows: list[list[float]]) -> None:
    assert parse_samples(payload.encode(), channels) == rows


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"[]", b"[[]]", b"x", b"NaN", b"[1, Infinity]", b"1e999", b"1e39", b"true", b'"1"', b"null", b"\xff",
        b"[1, 2, 3]", b"[[1, 2], [3]]", b"[[1, 2], 3]", b'{"values": [1, 2], "t": 1}', b'{"value": [1, 2]}',
        b'{"values": [1, 2], "values": [3, 4]}', b"[[[1, 2]]]", b"9" * 400, b"[" * 9000, b"[1, true]",
        b"[" + b"1," * MAX_PAYLOAD_BYTES + b"1]",
    ],
)  # fmt: skip
def test_any_other_payload_is_no_sample(payload: bytes) -> None:
    assert parse_samples(payload, 2) is None


@given(st.binary(max_size=200), st.integers(1, 4))
def test_any_bytes_are_rows_of_the_right_width_or_nothing(payload: bytes, channels: int) -> None:
    rows = parse_samples(payload, channels)
    assert rows is None or (rows and all(len(row) == channels for row in rows))


@given(st.lists(st.floats(-3e38, 3e38), min_size=1, max_size=60), st.sampled_from([1, 2, 3]))
def test_what_was_published_is_what_is_read(values: list[float], channels: int) -> None:
    values = values[: len(values) // channels * channels] or [1.0] * channels
    for payload in (values, {"values": values}):
        rows = parse_samples(json.dumps(payload).encode(), channels)
        assert rows is not None
        assert [one for row in rows for one in row] == values


# --- handing over ----------------------------------------------------------------------------------------------------


@in_a_loop
async def test_the_first_message_leaves_at_once_and_a_burst_together() -> None:
    process = Process()
    now = [1_000_000_000]
    feeds = TopicSources([process], lambda: now[0])
    assert feeds.names == ("pump",)
    feeds.heard("pump", message([1, 2]))
    assert process.fed == [(1_000_000_000, [[1], [2]])]
    for value in range(3, 53):
        now[0] += 1000
        feeds.heard("pump", message(value))
    assert len(process.fed) == 1
    await quiet(process)
    assert process.values == list(range(1, 53))
    assert len(process.fed) == 2
    assert process.fed[1][0] == now[0]
    feeds.heard("other", message(1))
    assert process.samples == {"heard": 51, "refused": 0, "dropped": 0}


@in_a_loop
async def test_a_message_that_is_no_sample_leaves_a_gap_between_those_around_it() -> None:
    process = Process()
    feeds = TopicSources([process], lambda: 5)
    for payload in (1, b"garbage", 2, 3):
        feeds.heard("pump", message(payload))
    await quiet(process)
    assert process.fed == [(5, [[1]]), (5, []), (5, [[2], [3]])]
    assert process.samples["refused"] == 1


@in_a_loop
async def test_a_retained_message_is_no_sample_and_no_gap() -> None:
    process = Process()
    feeds = TopicSources([process], lambda: 5)
    for one in (message(9, retain=True), message(1), message(9, retain=True), message(2)):
        feeds.heard("pump", one)
    await quiet(process)
    assert process.fed == [(5, [[1]]), (5, [[2]])]
    assert process.samples["refused"] == 2


@in_a_loop
async def test_a_flood_costs_the_oldest_samples_which_are_counted_and_leaves_a_gap() -> None:
    process = Process()
    feeds = TopicSources([process], lambda: 5)
    block = 2000
    for number in range(40):
        feeds.heard("pump", message([number] * block))
    await quiet(process)
    counts = process.samples
    assert counts["heard"] == 40
    assert len(process.values) + counts["dropped"] == 40 * block
    assert MAX_WAITING - block <= len(process.values) - block <= MAX_WAITING
    assert process.values[:block] == [0] * block
    assert process.fed[1] == (5, []), "what follows does not follow what was heard before"
    assert process.values[-1] == 39


@in_a_loop
async def test_samples_for_a_process_that_is_not_there_are_dropped_and_leave_a_gap() -> None:
    process = Process(channels=2)
    process.there = False
    feeds = TopicSources([process], lambda: 5)
    feeds.heard("pump", message([[1, 2], [3, 4]]))
    await asyncio.sleep(3 * topicsource.PAUSE_S)
    assert process.samples["dropped"] == 2
    process.there = True
    feeds.heard("pump", message([5, 6]))
    await quiet(process)
    assert process.fed == [(5, []), (5, [[5, 6]])]


@in_a_loop
async def test_two_sources_may_hear_the_same_topic() -> None:
    one, other = Process(1, "one"), Process(2, "other")
    feeds = TopicSources([one, other], lambda: 5)
    assert feeds.names == ("pump",)
    feeds.heard("pump", message([1, 2]))
    await quiet(one)
    assert one.fed == [(5, [[1], [2]])]
    assert other.fed == [(5, [[1, 2]])]


# --- topics ----------------------------------------------------------------------------------------------------------


def test_only_the_devices_own_inputs_are_heard_and_counted_as_samples() -> None:
    topics = Topics("edge", "cam-1", ("pump", "fan-2"))
    assert [name for name, _ in topics.heard][3:] == ["edge/v1/edge/cam-1/in/pump", "edge/v1/edge/cam-1/in/fan-2"]
    assert topics.suffix("edge/v1/edge/cam-1/in/pump") == "in/pump"
    assert topics.purpose("edge/v1/edge/cam-1/in/pump") == "samples"
    for topic in ("edge/v1/edge/cam-1/in/other", "edge/v1/edge/cam-2/in/pump", "edge/v1/edge/cam-1/in/pump/x"):
        assert topics.suffix(topic) is None
    assert Topics("edge", "cam-1").suffix("edge/v1/edge/cam-1/in/pump") is None


@pytest.mark.parametrize("name", ["", "+", "#", "a/b", "PUMP", "pump\n", "-pump", "a" * 33, "$SYS"])
def test_an_input_outside_the_grammar_never_becomes_part_of_a_topic(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Topics("edge", "cam-1", (name,))
    assert refused.value.reason is Reason.BAD_CONFIG
