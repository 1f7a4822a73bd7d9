"""The device's side of the block exchange against a link that loses, repeats, delays and lies."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import pytest

from ota import blocks
from ota.blocks import MAX_BLOCK_BYTES, Header, Request, Status
from ota.client.transports.mqtt import AnswerTime, MqttTransport, Waits
from ota.errors import Reason, TransferError

SHA = "cd" * 32
FAST = Waits(first_s=0.02, shortest_s=0.01, longest_s=0.05, attempts=4)
Answers = Callable[[Request, int], None]


class FakeLink:
    """Hands every request to `answers(request, how many requests came before)` one turn of the loop later."""

    def __init__(self, answers: Answers | None = None, *, connected: bool = True) -> None:
        self.answers = answers
        self.connected = connected
        self.requests: list[Request] = []

    def request(self, payload: bytes) -> bool:
        if not self.connected:
            return False
        parsed = blocks.parse_request(payload)
        number = len(self.requests)
        self.requests.append(parsed)
        if self.answers is not None:
            asyncio.get_running_loop().call_soon(self.answers, parsed, number)
        return True


def _transport(link: FakeLink, waits: Waits = FAST) -> MqttTransport:
    return MqttTransport(link, clock=lambda: asyncio.get_running_loop().time(), first_rid=0xFFFFFFFE, waits=waits)


def _answer(
    transport: MqttTransport,
    request: Request,
    payload: bytes,
    *,
    status: Status = Status.OK,
    total: int | None = None,
    digest: str = "",
) -> None:
    header = Header(request.rid, request.offset, len(payload) if total is None else total)
    user = (("status", status.value), ("sha256", digest)) if digest else (("status", status.value),)
    transport.received(header.encode(), user, payload)


def _serving(document: bytes) -> tuple[FakeLink, MqttTransport]:
    link = FakeLink()
    transport = _transport(link)
    digest = hashlib.sha256(document).hexdigest()
    link.answers = lambda request, _: _answer(
        transport,
        request,
        document[request.offset : request.offset + request.length],
        total=len(document),
        digest=digest,
    )
    return link, transport


def test_a_block_is_asked_for_by_hash_offset_and_length() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)
        link.answers = lambda request, _: _answer(transport, request, b"x" * request.length, total=10**6)
        assert await transport.block(SHA, 65536, 100) == b"x" * 100
        assert link.requests == [Request(0xFFFFFFFE, blocks.Blob(SHA), 65536, 100, None)]

    asyncio.run(main())


def test_a_document_of_several_parts_is_put_together() -> None:
    async def main() -> None:
        document = bytes(range(256)) * 1000
        link, transport = _serving(document)
        assert await transport.target("person/1.0.0/release.json", SHA, 1 << 20) == document
        assert [request.offset for request in link.requests] == [0, MAX_BLOCK_BYTES, 2 * MAX_BLOCK_BYTES]
        assert len({request.rid for request in link.requests}) == 3

    asyncio.run(main())


def test_request_ids_wrap_around() -> None:
    async def main() -> None:
        link, transport = _serving(b"doc")
        for _ in range(4):
            await transport.desired(100)
        assert [request.rid for request in link.requests] == [0xFFFFFFFE, 0xFFFFFFFF, 0, 1]

    asyncio.run(main())


def test_a_document_that_changes_between_two_parts_is_started_over() -> None:
    async def main() -> None:
        old, new = b"o" * 150_000, b"n" * 150_000
        link = FakeLink()
        transport = _transport(link)

        def answers(request: Request, number: int) -> None:
            document = old if number == 0 else new
            digest = hashlib.sha256(document).hexdigest()
            part = document[request.offset : request.offset + request.length]
            _answer(transport, request, part, total=len(document), digest=digest)

        link.answers = answers
        assert await transport.metadata("timestamp", None, 1 << 20) == new

    asyncio.run(main())


def test_a_document_whose_parts_never_fit_together_is_corrupt() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)
        link.answers = lambda request, _: _answer(transport, request, b"abc", digest="00" * 32)
        with pytest.raises(TransferError) as caught:
            await transport.desired(100)
        assert caught.value.reason is Reason.TRANSFER_CORRUPT
        assert len(link.requests) == 2

    asyncio.run(main())


def test_a_document_that_claims_to_be_longer_than_wanted_is_given_up_after_its_first_part() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)
        link.answers = lambda request, _: _answer(transport, request, bytes(100), total=1 << 60, digest="00" * 32)
        with pytest.raises(TransferError) as caught:
            await transport.desired(100)
        assert caught.value.reason is Reason.METADATA_TOO_LARGE
        assert len(link.requests) == 1

    asyncio.run(main())


def test_a_document_that_trickles_byte_by_byte_ends_where_it_said() -> None:
    async def main() -> None:
        document = b"slowly"
        link = FakeLink()
        transport = _transport(link)
        digest = hashlib.sha256(document).hexdigest()
        link.answers = lambda request, _: _answer(
            transport, request, document[request.offset : request.offset + 1], total=6, digest=digest
        )
        assert await transport.desired(100) == document
        assert len(link.requests) == 6

    asyncio.run(main())


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (Status.NOT_FOUND, Reason.NOT_FOUND),
        (Status.TOO_LARGE, Reason.METADATA_TOO_LARGE),
        (Status.REFUSED, Reason.UNSUPPORTED),
    ],
)
def test_an_answer_that_says_no_is_raised_at_once_as_what_it_is(status: Status, reason: Reason) -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)
        link.answers = lambda request, _: _answer(transport, request, b"", status=status)
        with pytest.raises(TransferError) as caught:
            await transport.metadata("root", 2, 1000)
        assert caught.value.reason is reason
        assert len(link.requests) == 1

    asyncio.run(main())


def test_silence_is_a_time_out_after_a_bounded_number_of_requests_and_never_not_found() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)
        with pytest.raises(TransferError) as caught:
            await transport.metadata("root", 2, 1000)
        assert caught.value.reason is Reason.TRANSFER_TIMEOUT
        assert caught.value.retry
        assert len(link.requests) == 4
        assert len({request.rid for request in link.requests}) == 1

    asyncio.run(main())


def test_without_a_connection_the_source_is_unreachable() -> None:
    async def main() -> None:
        transport = _transport(FakeLink(connected=False))
        with pytest.raises(TransferError) as caught:
            await transport.block(SHA, 0, 100)
        assert caught.value.reason is Reason.SOURCE_UNREACHABLE

    asyncio.run(main())


def test_a_lost_request_is_repeated_and_a_late_first_answer_still_counts() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)
        link.answers = lambda request, number: _answer(transport, request, b"data") if number == 2 else None
        assert await transport.block(SHA, 0, 100) == b"data"
        assert transport.counts.repeated_requests == 2

    asyncio.run(main())


@pytest.mark.fault("F21")
def test_answers_to_requests_nobody_waits_for_are_dropped_and_counted() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)

        def answers(request: Request, number: int) -> None:
            _answer(transport, Request(request.rid ^ 1, request.item, 0, 100, None), b"other request")
            _answer(transport, Request(request.rid, request.item, 100, 100, None), b"other offset")
            _answer(transport, request, b"right")
            _answer(transport, request, b"again")

        link.answers = answers
        assert await transport.block(SHA, 0, 100) == b"right"
        assert transport.counts.unknown == 3

    asyncio.run(main())


def test_more_bytes_than_asked_for_are_dropped_and_counted() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)

        def answers(request: Request, number: int) -> None:
            for _ in range(50):
                _answer(transport, request, bytes(request.length + 1))
            _answer(transport, request, b"right")

        link.answers = answers
        assert await transport.block(SHA, 0, 100) == b"right"
        assert transport.counts.oversize == 50

    asyncio.run(main())


@pytest.mark.parametrize(
    ("correlation", "user"),
    [
        (None, (("status", "ok"),)),
        (b"short", (("status", "ok"),)),
        (bytes(20), ()),
        (bytes(20), (("status", "perhaps"),)),
    ],
)
def test_answers_that_are_none_are_counted_as_malformed(
    correlation: bytes | None, user: tuple[tuple[str, str], ...]
) -> None:
    transport = _transport(FakeLink())
    transport.received(correlation, user, b"x")
    assert transport.counts.malformed == 1


def test_a_reconnected_link_is_asked_again_at_once() -> None:
    async def main() -> None:
        link = FakeLink(connected=False)
        transport = _transport(link, Waits(first_s=30.0))
        task = asyncio.create_task(transport.block(SHA, 0, 100))
        await asyncio.sleep(0.01)
        link.connected = True
        link.answers = lambda request, _: _answer(transport, request, b"data")
        transport.reconnected()
        assert await asyncio.wait_for(task, 1) == b"data"

    asyncio.run(main())


def test_a_cancelled_call_leaves_the_transport_usable_and_forgets_its_request() -> None:
    async def main() -> None:
        link, transport = _serving(b"doc")
        answers, link.answers = link.answers, None
        task = asyncio.create_task(transport.desired(100))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        _answer(transport, link.requests[0], b"late")
        assert transport.counts.unknown == 1
        link.answers = answers
        assert await transport.desired(100) == b"doc"

    asyncio.run(main())


def test_many_calls_run_at_once_and_each_gets_its_own_answer() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)
        held: list[Request] = []

        def answers(request: Request, number: int) -> None:
            held.append(request)
            if len(held) == 8:
                for one in reversed(held):
                    _answer(transport, one, b"%d" % one.offset)

        link.answers = answers
        got = await asyncio.gather(*(transport.block(SHA, offset, 100) for offset in range(8)))
        assert got == [b"%d" % offset for offset in range(8)]

    asyncio.run(main())


def test_the_wait_follows_the_answers_and_ignores_repeated_requests() -> None:
    time = AnswerTime(Waits())
    assert time.wait_s == 4.0
    for _ in range(20):
        time.learn(3.0)
    assert 3.0 < time.wait_s < 4.0, "a slow link is given its time"
    for _ in range(50):
        time.learn(0.001)
    assert time.wait_s == 1.0, "the shortest"
    assert time.silence(1.0) == 2.0
    assert time.silence(2.0) == 4.0
    assert time.wait_s == 4.0, "stays until an answer shows otherwise"
    assert time.silence(16.0) == 16.0
    time.learn(0.001)
    assert time.wait_s == 1.0
