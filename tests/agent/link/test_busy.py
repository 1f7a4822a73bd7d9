"""A transfer and the rest of the uplink share one connection: neither may keep the other from its own."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ota import payload as payloads
from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.transfer import Counts
from ota.mqtt import Message, Sent
from ota.release import Payload
from tests.fakes.blockserver import BlockServerProcess
from tests.fakes.blocksource import payload
from tests.fakes.broker import Authority, Broker
from tests.fakes.broker import Identity as Certificate

from .conftest import Operator
from .test_link import CMD, Daemon, _answer, _order, _result, _running

SIZE = 12_000_000
SHA, DATA = payload(SIZE)
DESCRIBED = Payload(SHA, SIZE, "raw", "cobblestone-256", "0" * 32, payloads.leaves(DATA))


@pytest.fixture
def server(broker: Broker, authority: Authority, tmp_path: Path) -> Iterator[BlockServerProcess]:
    with BlockServerProcess(broker, authority.issue("ota_service"), SIZE, tmp_path / "server.log") as running:
        running.wait_connected()
        yield running


async def _fetch(folder: Path, transport: object) -> None:
    folder.mkdir()
    inbox = Inbox(Fs(folder), Limits(), random.Random(1))
    await inbox.fetch(DESCRIBED, [transport], Counts())  # type: ignore[list-item]
    assert (folder / "inbox" / f"{SHA}.part").read_bytes() == DATA


def test_commands_are_answered_and_results_leave_while_a_transfer_uses_all_of_the_connection(
    broker: Broker, operator: Operator, authority: Authority, server: BlockServerProcess, tmp_path: Path
) -> None:
    certificate: Certificate = authority.issue("cam-1")

    async def transfers(transport: object) -> None:
        for number in range(1000):
            await _fetch(tmp_path / f"state-{number}", transport)

    async def main() -> None:
        daemon = Daemon()
        async with _running(daemon.link(certificate, broker.port)) as link:
            busy = asyncio.create_task(transfers(link.transport))
            before = link.bytes_by_purpose()
            waited = []
            for seq in range(8):
                await asyncio.sleep(0.1)
                began = time.monotonic()
                daemon.telemetry.result("person", _result(seq))
                _order(operator, id=f"c-{seq}")
                assert (await _answer(operator))["id"] == f"c-{seq}"
                rows = json.loads(await asyncio.to_thread(operator.next, "tele"))["results"]
                assert [row[0] for row in rows] == [seq]
                waited.append(time.monotonic() - began)
            assert not busy.done()
            busy.cancel()
            await asyncio.gather(busy, return_exceptions=True)
            arrived = link.bytes_by_purpose()["updates"]["in"] - before.get("updates", {"in": 0})["in"]
            assert arrived > SIZE, "the transfer really was busy"
            assert max(waited) < 3.0, waited

    asyncio.run(main())


def test_a_flood_of_commands_does_not_stop_a_transfer(
    broker: Broker, operator: Operator, authority: Authority, server: BlockServerProcess, tmp_path: Path
) -> None:
    certificate: Certificate = authority.issue("cam-1")
    sent = [0]

    async def flood() -> None:
        while True:
            for _ in range(50):
                sent[0] += operator.mqtt.publish(Message(CMD, b'{"v":1,"id":"flood"', qos=0)) is Sent.QUEUED
            await asyncio.sleep(0.005)

    async def main() -> None:
        async with _running(Daemon().link(certificate, broker.port)) as link:
            flooding = asyncio.create_task(flood())
            await _fetch(tmp_path / "state", link.transport)
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
            assert link.status()["state"] == "connected"
            assert sent[0] > 500

    asyncio.run(main())
