"""What the block server answers, without a broker."""

from __future__ import annotations

import hashlib
import os

import pytest

from ota import blocks
from ota.blocks import MAX_BLOCK_BYTES, Blob, Desired, Item, Metadata, Request, Status, Target
from ota.mailbox import Message, Received
from ota.publisher.serve import BlockServer, Bounds
from tests.fakes.blocksource import MemorySource, payload

SHA, PAYLOAD = payload(300_000)
BIG = b"m" * 250_000


class Clock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def source() -> MemorySource:
    return MemorySource(
        metadata={("timestamp", None): b"ts", ("root", 1): b"root", ("targets", 4): BIG},
        desired={"cam-1": b"for cam-1", "cam-2": b"for cam-2"},
        targets={("person/1.0.0/release.json", SHA): b"release"},
        payloads={SHA: PAYLOAD},
    )


def _server(source: MemorySource, clock: Clock | None = None, **bounds: float) -> BlockServer:
    return BlockServer(source, "edge", clock=clock or Clock(), bounds=Bounds(**bounds))  # type: ignore[arg-type]


def _received(payload: bytes, topic: str = "edge/v1/edge/cam-1/blk/get") -> Received:
    return Received(topic, payload, 0, False, None, (), 0)


def _ask(
    server: BlockServer, item: Item, offset: int = 0, length: int = MAX_BLOCK_BYTES, limit: int = 1 << 20
) -> Message:
    max_bytes = None if isinstance(item, Blob) else limit
    message = server.answer(_received(Request(9, item, offset, length, max_bytes).encode()))
    assert message is not None
    return message


def _status(message: Message) -> Status:
    status = blocks.parse_status(message.user)
    assert status is not None
    return status[0]


@pytest.mark.parametrize(
    ("item", "content"),
    [
        (Metadata("timestamp", None), b"ts"),
        (Metadata("root", 1), b"root"),
        (Desired(), b"for cam-1"),
        (Target("person/1.0.0/release.json", SHA), b"release"),
    ],
)
def test_a_document_comes_with_its_length_and_hash(source: MemorySource, item: Item, content: bytes) -> None:
    message = _ask(_server(source), item)
    assert message.payload == content
    assert message.qos == 0
    header = blocks.parse_header(message.correlation)
    assert header == blocks.Header(9, 0, len(content))
    assert blocks.parse_status(message.user) == (Status.OK, hashlib.sha256(content).hexdigest())


def test_a_long_document_comes_in_parts_read_once(source: MemorySource) -> None:
    server = _server(source)
    parts = [_ask(server, Metadata("targets", 4), offset).payload for offset in range(0, len(BIG), MAX_BLOCK_BYTES)]
    assert b"".join(parts) == BIG
    assert source.reads == 1


def test_timestamp_and_desired_are_read_every_time(source: MemorySource) -> None:
    server = _server(source)
    _ask(server, Metadata("timestamp", None))
    source.metadata = {("timestamp", None): b"newer"}
    assert _ask(server, Metadata("timestamp", None)).payload == b"newer"
    source.desired = {"cam-1": b"changed"}
    assert _ask(server, Desired()).payload == b"changed"


def test_the_cache_of_documents_is_bounded(source: MemorySource) -> None:
    source.metadata = {("root", n): bytes([n]) * 1000 for n in range(1, 50)}
    server = _server(source, cached_bytes=5000)
    for n in range(1, 50):
        assert _ask(server, Metadata("root", n)).payload == bytes([n]) * 1000
    source.metadata = {}
    assert sum(_status(_ask(server, Metadata("root", n))) is Status.OK for n in range(1, 50)) == 5


def test_blocks_of_a_payload_come_from_any_offset_and_end_with_it(source: MemorySource) -> None:
    server = _server(source)
    assert _ask(server, Blob(SHA), 65536, 65536).payload == PAYLOAD[65536:131072]
    last = _ask(server, Blob(SHA), 299_999, 65536)
    assert last.payload == PAYLOAD[-1:]
    assert blocks.parse_header(last.correlation) == blocks.Header(9, 299_999, 300_000)
    assert _status(_ask(server, Blob(SHA), 300_000, 1)) is Status.NOT_FOUND
    server.close()


def test_descriptors_of_payloads_are_bounded_and_closed(source: MemorySource) -> None:
    made = dict(payload(100, seed) for seed in range(40))
    source.payloads = made
    before = len(os.listdir("/proc/self/fd"))
    server = _server(source, open_payloads=4)
    for sha256, data in made.items():
        assert _ask(server, Blob(sha256)).payload == data
    assert len(os.listdir("/proc/self/fd")) - before <= 4
    server.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "item",
    [Metadata("root", 2), Metadata("release-person", 1), Target("person/9.9.9/release.json", SHA), Blob("00" * 32)],
)
def test_what_the_repository_does_not_have_is_answered_not_found(source: MemorySource, item: Item) -> None:
    message = _ask(_server(source), item)
    assert _status(message) is Status.NOT_FOUND
    assert message.payload == b""


def test_a_document_longer_than_wanted_is_not_sent(source: MemorySource) -> None:
    message = _ask(_server(source), Metadata("targets", 4), limit=len(BIG) - 1)
    assert _status(message) is Status.TOO_LARGE
    assert message.payload == b""
    assert blocks.parse_header(message.correlation) == blocks.Header(9, 0, len(BIG))


@pytest.mark.fault("F91")
def test_the_answer_goes_to_the_tree_of_the_asking_device_and_nowhere_else(source: MemorySource) -> None:
    server = _server(source)
    request = Request(1, Desired(), 0, 1000, 1000).encode()
    for device in ("cam-1", "cam-2"):
        # whatever correlation data or user properties a request carries
        received = Received(
            f"edge/v1/edge/{device}/blk/get", request, 0, False, b"x", (("response", "edge/v1/edge/cam-9/cmd"),), 0
        )
        message = server.answer(received)
        assert message is not None
        assert message.topic == f"edge/v1/edge/{device}/blk/data"
        assert message.payload == b"for " + device.encode()


@pytest.mark.parametrize(
    "topic",
    [
        "edge/v1/other/cam-1/blk/get",
        "edge/v1/edge/../blk/get",
        "edge/v1/edge/CAM/blk/get",
        "edge/v1/edge/cam-1/blk/data",
        "edge/v1/edge/cam-1/x/blk/get",
        "edge/v1/edge//blk/get",
        "$SYS/broker",
        "",
    ],
)
def test_a_request_from_elsewhere_is_not_answered(source: MemorySource, topic: str) -> None:
    server = _server(source)
    assert server.answer(_received(Request(1, Desired(), 0, 1000, 1000).encode(), topic)) is None
    assert server.served.malformed == 1


def test_a_malformed_request_with_an_id_is_refused_and_one_without_is_counted(source: MemorySource) -> None:
    server = _server(source)
    refused = server.answer(_received(b'{"v":1,"rid":77,"get":"everything"}'))
    assert refused is not None
    assert _status(refused) is Status.REFUSED
    assert blocks.parse_header(refused.correlation) == blocks.Header(77, 0, 0)
    for data in (b"", b"{}", b"[" * 900, bytes(5000)):
        assert server.answer(_received(data)) is None
    assert server.served.malformed == 5
    assert source.reads == 0


def test_a_device_that_asks_too_much_is_not_answered_and_does_not_slow_others(source: MemorySource) -> None:
    clock = Clock()
    server = _server(source, clock, device_bytes_per_s=100_000, device_burst_bytes=200_000)
    request = Request(1, Blob(SHA), 0, 65536, None).encode()
    answers = [server.answer(_received(request)) for _ in range(10)]
    assert sum(answer is not None for answer in answers) == 3
    assert server.served.over_quota == 7
    assert server.answer(_received(request, "edge/v1/edge/cam-2/blk/get")) is not None
    clock.now = 1.0
    assert server.answer(_received(request)) is not None
    server.close()


def test_quotas_are_kept_for_a_bounded_number_of_devices(source: MemorySource) -> None:
    server = _server(source, devices=100)
    request = Request(1, Desired(), 0, 1000, 1000).encode()
    for number in range(1000):
        server.answer(_received(request, f"edge/v1/edge/cam-{number}/blk/get"))
    assert len(server._quota) == 100


def test_an_unreadable_repository_is_silent_because_not_found_would_be_believed(source: MemorySource) -> None:
    server = _server(source)
    source.broken = True
    assert server.answer(_received(Request(1, Metadata("root", 2), 0, 1000, 1000).encode())) is None
    assert server.served.faults == 1
    assert "dying" in server.served.last_fault


def test_no_answer_is_larger_than_the_broker_takes(source: MemorySource) -> None:
    """A block is refused with the size that gets through, a document comes in smaller parts."""
    server = _server(source)
    server.max_packet_bytes = 20_000
    refused = _ask(server, Blob(SHA), 0, 65536)
    header = blocks.parse_header(refused.correlation)
    assert _status(refused) is Status.TOO_LARGE
    assert header is not None
    carried = _ask(server, Blob(SHA), 0, header.total)
    assert len(carried.payload) == header.total
    assert 19_900 <= carried.packet_bytes() + 60 <= 20_100
    assert carried.packet_bytes() <= 20_000
    part = _ask(server, Metadata("targets", 4))
    assert _status(part) is Status.OK
    assert part.packet_bytes() <= 20_000
    server.close()
