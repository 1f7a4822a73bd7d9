"""The device's side of the block exchange against a link that loses, repeats, delays and lies."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from ota import blocks
from ota.blocks import MAX_BLOCK_BYTES, Header, Request, Status
from ota.client.transports.mqtt import AnswerTime, MqttTransport, Waits
from ota.errors import BlockTooLarge, Reason, TransferError

SHA = "cd" * 32
FAST = Waits(first_s=0.02, shortest_s=0.01, longest_s=0.05, attempts=4, block_s=0.05, offline_s=0.05)
NOT_ALONE = replace(FAST, block_s=0.4, shunned_s=3600.0)
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


def _serving(document: bytes, waits: Waits = FAST) -> tuple[FakeLink, MqttTransport]:
    link = FakeLink()
    transport = _transport(link, waits)
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
        digest = hashlib.sha256(b"data").hexdigest()
        link.answers = lambda request, number: (
            _answer(transport, link.requests[0], b"data", digest=digest) if number == 2 else None
        )
        assert await transport.desired(100) == b"data"
        assert transport.counts.repeated_requests == 2


def test_beside_another_source_silence_is_borne_twice_and_then_left_to_that_one_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        link, transport = _serving(b"data", NOT_ALONE)
        answers, link.answers = link.answers, None
        for requests in (4, 5):  # the second one makes sure
            with pytest.raises(TransferError) as caught:
                await transport.desired(100)
            assert caught.value.reason is Reason.TRANSFER_TIMEOUT
            assert len(link.requests) == requests
        for call in (transport.desired(100), transport.block(SHA, 0, 4)):
            with pytest.raises(TransferError) as caught:
                await call
            assert caught.value.reason is Reason.SOURCE_UNREACHABLE
        assert len(link.requests) == 5, "nobody was asked"
        link.answers = answers
        monkeypatch.setattr(transport, "_clock", lambda: asyncio.get_running_loop().time() + 3600.0)
        assert await transport.desired(100) == b"data"
        assert await transport.block(SHA, 0, 4) == b"data"

    asyncio.run(main())


def test_a_block_for_which_nothing_is_heard_ends_the_asking_and_a_slow_one_does_not() -> None:
    async def main() -> None:
        link, transport = _serving(b"data", NOT_ALONE)
        answers = link.answers
        link.answers = None
        slow = asyncio.create_task(transport.block(SHA, 0, 4))
        await asyncio.sleep(0)
        link.answers = answers
        assert await transport.block(SHA, 4, 4) == b""  # heard meanwhile
        with pytest.raises(TransferError):
            await slow
        assert await transport.block(SHA, 0, 4) == b"data"
        link.answers = None
        silent = await asyncio.gather(*(transport.block(SHA, 0, 4) for _ in range(2)), return_exceptions=True)
        assert all(isinstance(failure, TransferError) for failure in silent)
        asked = len(link.requests)
        with pytest.raises(TransferError) as caught:
            await transport.block(SHA, 0, 4)
        assert (caught.value.reason, len(link.requests)) == (Reason.SOURCE_UNREACHABLE, asked)
        transport.reconnected()  # to another broker, maybe
        link.answers = answers
        assert await transport.block(SHA, 0, 4) == b"data"

    asyncio.run(main())


def test_one_document_whose_requests_are_dropped_keeps_nobody_from_asking_for_others() -> None:
    async def main() -> None:
        link, transport = _serving(b"data", NOT_ALONE)
        answers = link.answers
        assert answers is not None
        link.answers = lambda request, number: (
            None if request.item == blocks.Metadata("root", 2) else answers(request, number)
        )
        for _ in range(3):
            with pytest.raises(TransferError) as caught:
                await transport.metadata("root", 2, 100)
            assert caught.value.reason is Reason.TRANSFER_TIMEOUT
            assert await transport.metadata("timestamp", None, 100) == b"data"

    asyncio.run(main())


def test_a_source_that_is_the_only_one_is_asked_however_silent_it_was() -> None:
    async def main() -> None:
        link, transport = _serving(b"data")
        answers, link.answers = link.answers, None
        with pytest.raises(TransferError):
            await transport.desired(100)
        link.answers = answers
        assert await transport.desired(100) == b"data"

    asyncio.run(main())


def test_a_block_is_asked_for_once_because_the_transfer_decides_what_silence_means() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)
        with pytest.raises(TransferError) as caught:
            await transport.block(SHA, 0, 100)
        assert caught.value.reason is Reason.TRANSFER_TIMEOUT
        assert len(link.requests) == 1

    asyncio.run(main())


def test_a_broker_that_drops_large_messages_without_a_word_is_asked_for_smaller_parts() -> None:
    async def main() -> None:
        document = bytes(range(256)) * 400
        link, transport = _serving(document)
        serve = link.answers
        assert serve is not None
        link.answers = lambda request, number: serve(request, number) if request.length <= 10_000 else None
        assert await transport.target("person/1.0.0/release.json", SHA, 1 << 20) == document
        assert transport.counts.repeated_requests == 2, "for the first part alone: the rest is asked for so at once"

    asyncio.run(main())


def test_a_block_that_the_broker_does_not_carry_says_what_it_does_carry() -> None:
    async def main() -> None:
        link = FakeLink()
        transport = _transport(link)
        link.answers = lambda request, _: _answer(transport, request, b"", status=Status.TOO_LARGE, total=9000)
        with pytest.raises(BlockTooLarge) as caught:
            await transport.block(SHA, 0, 65536)
        assert (caught.value.reason, caught.value.largest_bytes) == (Reason.BLOCK_TOO_LARGE, 9000)

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
