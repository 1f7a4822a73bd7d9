"""A SEQPACKET socket in the event loop: bursts, floods, deaf peers, last words."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from agent import protocol
from agent.daemon.channel import Channel
from agent.errors import Reason, WorkerError

Body = Callable[[Channel, socket.socket, list[int], list[str]], Awaitable[None]]


def run(body: Body) -> None:
    async def main() -> None:
        ours, theirs = protocol.socket_pair()
        seen: list[int] = []
        ends: list[str] = []
        channel = Channel(ours, lambda packet: seen.append(packet.message.answered), ends.append)
        with theirs:
            await body(channel, theirs, seen, ends)
        channel.close()

    asyncio.run(main())


def test_a_flood_leaves_the_loop_to_others_and_keeps_its_order() -> None:
    async def body(channel: Channel, theirs: socket.socket, seen: list[int], ends: list[str]) -> None:
        for number in range(100):
            protocol.send(theirs, protocol.Finished(number, 0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(seen) <= 64, "others get a turn in between"
        await asyncio.sleep(0.05)
        assert seen == list(range(100))

    run(body)


def test_last_words_are_heard_before_a_channel_is_closed() -> None:
    async def body(channel: Channel, theirs: socket.socket, seen: list[int], ends: list[str]) -> None:
        for number in range(100):
            protocol.send(theirs, protocol.Finished(number, 0))
        theirs.close()
        channel.drain()
        assert seen == list(range(100))
        assert ends == ["closed"]
        assert not channel.nonsense

    run(body)


def test_a_peer_that_reads_nothing_is_hung_and_one_that_closed_is_gone() -> None:
    async def body(channel: Channel, theirs: socket.socket, seen: list[int], ends: list[str]) -> None:
        def fill() -> None:
            for _ in range(10_000):
                channel.send(protocol.Fault("x", "y" * 10_000, ""))

        with pytest.raises(WorkerError) as caught:
            fill()
        assert caught.value.reason is Reason.WORKER_HUNG
        theirs.close()
        with pytest.raises(WorkerError) as caught:
            channel.send(protocol.StopWorker())
        assert caught.value.reason is Reason.WORKER_CRASHED

    run(body)


def test_nonsense_ends_the_channel_once_and_is_told_apart() -> None:
    async def body(channel: Channel, theirs: socket.socket, seen: list[int], ends: list[str]) -> None:
        theirs.send(b"{}")
        theirs.send(b"{}")
        protocol.send(theirs, protocol.Finished(1, 0))
        await asyncio.sleep(0.02)
        assert len(ends) == 1
        assert channel.nonsense
        assert not channel.open
        assert seen == []
        with pytest.raises(WorkerError):
            channel.send(protocol.StopWorker())

    run(body)
