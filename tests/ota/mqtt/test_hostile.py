"""A block server that lies, over a real broker: what it costs is bounded, and what arrives is right or refused."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ota import blocks, payload
from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.transfer import Counts
from ota.client.transports.directory import DirectoryTransport
from ota.errors import Reason, TransferError
from ota.mailbox import Message, Received
from ota.publisher.serve import REQUEST_FILTER, BlockServer
from ota.release import LEAF_BYTES, Payload
from tests.fakes.blocksource import MemorySource
from tests.fakes.blocksource import payload as make_payload
from tests.fakes.broker import Authority, Broker

from .conftest import MakeClient
from .test_transfer import Device, _device

SIZE = 1_500_000
HALF = 12 * LEAF_BYTES
SHA, DATA = make_payload(SIZE)
DESCRIBED = Payload(SHA, SIZE, "raw", "cobblestone-256", "0" * 32, payload.leaves(DATA))
FAST = Limits(retry_base_s=0.001, retry_cap_s=0.01, block_timeout_s=2.0)
Lie = Callable[[Message, int], list[Message]]


class Hostile:
    """A block server between a true answer and the broker; `lie(answer, number)` says what is published instead."""

    def __init__(self, make_client: MakeClient, broker: Broker, lie: Lie) -> None:
        self._client = make_client(broker, "ota_service", REQUEST_FILTER)
        self._server = BlockServer(MemorySource(payloads={SHA: DATA}), "edge", clock=time.monotonic)
        self._lie = lie
        self._ended = threading.Event()
        self.answers = 0
        self._client.ready()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            event = self._client.inbox.get(0.1)
            if not isinstance(event, Received):
                continue
            answer = self._server.answer(event)
            assert answer is not None
            for message in self._lie(answer, self.answers):
                self._client.mqtt.publish(message)
            self.answers += 1

    def close(self) -> None:
        self._ended.set()
        self._thread.join(5)


StartHostile = Callable[[Lie], Hostile]


@pytest.fixture
def hostile(make_client: MakeClient, shared_broker: Broker) -> Iterator[StartHostile]:
    with contextlib.ExitStack() as ending:

        def start(lie: Lie) -> Hostile:
            server = Hostile(make_client, shared_broker, lie)
            ending.callback(server.close)
            return server

        yield start


def _fetch(
    broker: Broker, authority: Authority, folder: Path, limits: Limits = FAST, stick: Path | None = None
) -> tuple[Counts, Device]:
    counts = Counts()

    async def main() -> Device:
        async with _device(broker, authority) as device, asyncio.timeout(60):
            inbox = Inbox(Fs(folder), limits, random.Random(1))
            await inbox.fetch(
                DESCRIBED, [device.transport, *([DirectoryTransport(stick, "cam-1")] if stick else [])], counts
            )
            return device

    try:
        return counts, asyncio.run(main())
    finally:
        part = folder / "inbox" / f"{SHA}.part"
        if part.exists() and counts.fetched_bytes == SIZE:
            assert part.read_bytes() == DATA


@pytest.mark.fault("F19")
def test_blocks_that_come_three_times_are_written_once(
    hostile: StartHostile, shared_broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    hostile(lambda answer, _: [answer] * 3)
    counts, device = _fetch(shared_broker, authority, tmp_path)
    assert (counts.fetched_bytes, counts.refetched_bytes) == (SIZE, 0)
    assert device.transport.counts.unknown > 0, "the copies were dropped by their request id"


@pytest.mark.fault("F20")
def test_blocks_in_reverse_order_make_the_same_payload(
    hostile: StartHostile, shared_broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    held: list[Message] = []

    def reverse(answer: Message, number: int) -> list[Message]:
        held.append(answer)
        # the first window has two blocks, and the last leaf may come alone
        if len(held) < 2 and number < 20:
            return []
        out = held[::-1]
        held.clear()
        return out

    hostile(reverse)
    counts, _ = _fetch(shared_broker, authority, tmp_path)
    assert counts.fetched_bytes == SIZE


@pytest.mark.fault("F17")
def test_flipped_bits_now_and_then_cost_their_leaves_and_no_more(
    hostile: StartHostile, shared_broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    flipped: list[int] = []

    def flip(answer: Message, number: int) -> list[Message]:
        if number % 7 != 3 or len(flipped) >= 3:
            return [answer]
        flipped.append(number)
        return [replace(answer, payload=bytes([answer.payload[0] ^ 1]) + answer.payload[1:])]

    hostile(flip)
    counts, _ = _fetch(shared_broker, authority, tmp_path)
    assert len(flipped) == 3
    assert SIZE < counts.fetched_bytes + counts.refetched_bytes <= SIZE + 3 * LEAF_BYTES


@pytest.mark.fault("F16")
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b""])
def test_blocks_that_are_always_cut_short_end_as_corrupt(
    hostile: StartHostile, shared_broker: Broker, authority: Authority, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    server = hostile(lambda answer, _: [replace(answer, payload=change(answer.payload))])
    with pytest.raises(TransferError) as failure:
        _fetch(shared_broker, authority, tmp_path)
    assert failure.value.reason is Reason.TRANSFER_CORRUPT
    assert server.answers <= FAST.window_blocks * FAST.block_attempts + FAST.bad_blocks


@pytest.mark.fault("F22")
def test_oversize_answers_never_reach_the_transfer(
    hostile: StartHostile, shared_broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    """Twice what was asked for, before each right answer; what the broker's own limit stops does not even leave."""
    hostile(lambda answer, _: [replace(answer, payload=answer.payload + b"x" * 30_000), answer])
    counts, device = _fetch(shared_broker, authority, tmp_path)
    assert (counts.fetched_bytes, counts.duplicate_bytes) == (SIZE, 0)
    assert device.transport.counts.oversize > 0


@pytest.mark.fault("F21")
def test_answers_to_old_requests_and_for_other_places_are_dropped(
    hostile: StartHostile, shared_broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    old: list[Message] = []

    def stale(answer: Message, number: int) -> list[Message]:
        header = blocks.parse_header(answer.correlation)
        assert header is not None
        elsewhere = replace(answer, correlation=replace(header, offset=header.offset ^ 4096).encode())
        before = old[-3:]
        old.append(answer)
        return [*before, elsewhere, answer]

    hostile(stale)
    counts, device = _fetch(shared_broker, authority, tmp_path)
    assert (counts.fetched_bytes, counts.duplicate_bytes) == (SIZE, 0)
    assert device.transport.counts.unknown > 20


@pytest.mark.fault("F23")
def test_endless_blocks_that_nobody_asked_for_neither_stop_nor_feed_the_transfer(
    hostile: StartHostile, shared_broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    def flood(answer: Message, number: int) -> list[Message]:
        header = blocks.parse_header(answer.correlation)
        assert header is not None
        unasked = replace(answer, correlation=replace(header, rid=header.rid ^ 0x5A5A5A5A).encode())
        return [unasked] * 12 + [answer]

    hostile(flood)
    counts, device = _fetch(shared_broker, authority, tmp_path)
    assert (counts.fetched_bytes, counts.duplicate_bytes) == (SIZE, 0)
    assert device.transport.counts.unknown >= 12 * SIZE // LEAF_BYTES


@pytest.mark.fault("F24")
def test_a_server_that_takes_its_time_for_every_block_is_left(
    hostile: StartHostile, shared_broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    """A block of 4 KiB now and then, far below the slowest rate: the watchdog, in seconds instead of minutes."""

    def slow(answer: Message, number: int) -> list[Message]:
        if len(answer.payload) > 4096:
            return []
        time.sleep(0.4)
        return [answer]

    hostile(slow)
    limits = replace(FAST, block_timeout_s=0.6, block_attempts=100, stall_s=3.0, min_bytes_per_s=20_000)
    with pytest.raises(TransferError) as failure:
        _fetch(shared_broker, authority, tmp_path, limits)
    assert failure.value.reason is Reason.TRANSFER_TIMEOUT
    assert "slower than" in failure.value.message
    assert failure.value.retry


@pytest.mark.fault("F26")
def test_a_payload_replaced_in_the_middle_ends_as_corrupt_and_the_rest_comes_from_a_stick(
    hostile: StartHostile, shared_broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    """Half by MQTT and the rest from a stick: what the broker's side brought before is kept."""

    def replaced(answer: Message, number: int) -> list[Message]:
        header = blocks.parse_header(answer.correlation)
        assert header is not None
        good = header.offset < HALF
        return [answer if good else replace(answer, payload=bytes(len(answer.payload)))]

    hostile(replaced)
    stick = tmp_path / "stick"
    (stick / "payloads").mkdir(parents=True)
    (stick / "payloads" / SHA).write_bytes(DATA)
    state = tmp_path / "state"
    state.mkdir()
    with pytest.raises(TransferError) as failure:
        _fetch(shared_broker, authority, state)
    assert failure.value.reason is Reason.TRANSFER_CORRUPT
    counts = Counts()
    read: list[int] = []

    class Stick(DirectoryTransport):
        async def block(self, sha256: str, offset: int, length: int) -> bytes:
            read.append(length)
            return await super().block(sha256, offset, length)

    asyncio.run(Inbox(Fs(state), FAST, random.Random(2)).fetch(DESCRIBED, [Stick(stick, "cam-1")], counts))
    assert (state / "inbox" / f"{SHA}.part").read_bytes() == DATA
    assert counts.resumed_bytes == HALF
    assert sum(read) == SIZE - counts.resumed_bytes == counts.fetched_bytes
