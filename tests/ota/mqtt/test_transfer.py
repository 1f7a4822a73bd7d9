"""Payloads through broker, block server processes and transport, over mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ota import payload as payloads
from ota.blocks import MAX_BLOCK_BYTES
from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.transfer import Counts
from ota.client.transports.mqtt import MqttTransport, Waits
from ota.errors import BrokerError, OtaError, Reason, TransferError
from ota.mqtt import (
    Connected,
    Message,
    Mqtt,
    Received,
    Reconnect,
    Sent,
    Settings,
    Subscribed,
    Subscription,
    Tls,
)
from ota.mqtt import Inbox as Mailbox
from ota.publisher import announce, serve
from ota.release import Payload
from tests.fakes.blockserver import DEVICE_DOCUMENT, BlockServerProcess
from tests.fakes.blocksource import MemorySource, payload
from tests.fakes.broker import Authority, Broker, Identity
from tests.fakes.ports import free_port

from .conftest import SOON, MakeClient

SIZE = 5_000_000
BLOCK = 65_536
# no request is repeated because this machine is busy
PATIENT = Waits(first_s=16.0, shortest_s=16.0)
SHA, PAYLOAD = payload(SIZE)
DESCRIBED = Payload(SHA, SIZE, "raw", "cobblestone-256", "0" * 32, payloads.leaves(PAYLOAD))


class Device:
    """The least a device needs: the adapter, the transport, and a task that carries answers from one to the other."""

    def __init__(self, broker: Broker, authority: Authority, waits: Waits) -> None:
        identity = authority.issue("cam-1")
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self.inbox = Mailbox(wake=self._wake)
        settings = Settings(
            broker.host,
            broker.port,
            Tls(identity.ca, identity.certificate, identity.key),
            "cam-1",
            subscriptions=(Subscription("edge/v1/edge/cam-1/blk/data", qos=0),),
        )
        self.mqtt = Mqtt(settings, self.inbox, reconnect=Reconnect(SOON, random.Random(1)), clock=time.monotonic)
        self.transport = MqttTransport(self, clock=time.monotonic, first_rid=1, waits=waits)
        self.connected = asyncio.Event()

    def request(self, payload: bytes) -> bool:
        return self.mqtt.publish(Message("edge/v1/edge/cam-1/blk/get", payload, qos=0)) is Sent.QUEUED

    async def pump(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            for event in self.inbox.drain():
                if isinstance(event, Received):
                    self.transport.received(event.correlation, event.user, event.payload)
                elif isinstance(event, Connected):
                    self.transport.reconnected()
                elif isinstance(event, Subscribed):
                    self.connected.set()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrived.set)


@contextlib.asynccontextmanager
async def _device(broker: Broker, authority: Authority, waits: Waits | None = None) -> AsyncIterator[Device]:
    device = Device(broker, authority, waits or Waits(first_s=1.0, shortest_s=0.3, attempts=8))
    pump = asyncio.create_task(device.pump())
    device.mqtt.start()
    try:
        await asyncio.wait_for(device.connected.wait(), 60)
        yield device
    finally:
        pump.cancel()
        await asyncio.to_thread(device.mqtt.close, 0.5)


async def _fetch(device: Device, window: int = 4) -> bytes:
    offsets = iter(range(0, SIZE, BLOCK))
    blocks: dict[int, bytes] = {}

    async def one_at_a_time() -> None:
        for offset in offsets:
            blocks[offset] = await device.transport.block(SHA, offset, min(BLOCK, SIZE - offset))

    await asyncio.gather(*(one_at_a_time() for _ in range(window)))
    return b"".join(blocks[offset] for offset in sorted(blocks))


@pytest.fixture
def start_server(tmp_path: Path, authority: Authority) -> Callable[[Broker, str], BlockServerProcess]:
    def start(broker: Broker, name: str = "ota_service") -> BlockServerProcess:
        log = tmp_path / f"{name}-{time.monotonic_ns()}.log"
        return BlockServerProcess(broker, authority.issue(name), SIZE, log)

    return start


def test_five_megabytes_arrive_intact_and_every_block_is_asked_for_once(
    shared_broker: Broker, authority: Authority, start_server: Callable[..., BlockServerProcess]
) -> None:
    async def main() -> None:
        async with _device(shared_broker, authority, PATIENT) as device:
            started = time.perf_counter()
            data = await _fetch(device)
            took_s = time.perf_counter() - started
            print(f"\n5 MB over mTLS, 64 KiB x 4: {took_s * 1000:.0f} ms, {SIZE / took_s / 1e6:.0f} MB/s")
            assert hashlib.sha256(data).hexdigest() == SHA
            assert device.transport.counts.answers == -(-SIZE // BLOCK)
            assert device.transport.counts.repeated_requests == 0
            assert await device.transport.desired(1000) == DEVICE_DOCUMENT

    with start_server(shared_broker) as server:
        server.wait_connected()
        asyncio.run(main())
        assert server.terminate() == 0
        assert server.answers() == -(-SIZE // BLOCK) + 1


def test_what_the_repository_does_not_have_is_not_found_and_what_is_too_long_is_said(
    shared_broker: Broker, authority: Authority, start_server: Callable[..., BlockServerProcess]
) -> None:
    async def main() -> None:
        async with _device(shared_broker, authority) as device:
            transport = device.transport
            calls = [
                (transport.block("00" * 32, 0, BLOCK), Reason.NOT_FOUND),
                (transport.metadata("root", 2, 1000), Reason.NOT_FOUND),
                (transport.target("person/1.0.0/release.json", SHA, 1000), Reason.NOT_FOUND),
                (transport.desired(5), Reason.METADATA_TOO_LARGE),
            ]
            for call, reason in calls:
                with pytest.raises(TransferError) as caught:
                    await call
                assert caught.value.reason is reason

    with start_server(shared_broker) as server:
        server.wait_connected()
        asyncio.run(main())


def test_without_a_block_server_there_is_silence_and_not_an_answer(shared_broker: Broker, authority: Authority) -> None:
    async def main() -> None:
        async with _device(shared_broker, authority, Waits(first_s=0.1, shortest_s=0.1, attempts=3)) as device:
            with pytest.raises(TransferError) as caught:
                await device.transport.metadata("root", 2, 1000)
            assert caught.value.reason is Reason.TRANSFER_TIMEOUT

    asyncio.run(main())


async def _into_inbox(device: Device, folder: Path, at_block: int, happens: Callable[[], None]) -> Counts:
    """Fetch as the daemon does; `happens` is called once `at_block` answers came."""
    fetching = asyncio.create_task(
        Inbox(Fs(folder), Limits(retry_base_s=0.01), random.Random(1)).fetch(
            DESCRIBED, [device.transport], counts := Counts()
        )
    )
    while device.transport.counts.answers < at_block and not fetching.done():
        await asyncio.sleep(0)
    happens()
    await fetching
    assert (folder / "inbox" / f"{SHA}.part").read_bytes() == PAYLOAD
    return counts


def test_a_server_killed_in_the_middle_and_started_again_costs_at_most_the_window_twice(
    tmp_path: Path, shared_broker: Broker, authority: Authority, start_server: Callable[..., BlockServerProcess]
) -> None:
    servers = [start_server(shared_broker)]
    servers[0].wait_connected()

    def killed() -> None:
        servers[0].kill()
        servers.append(start_server(shared_broker))

    async def main() -> None:
        async with _device(shared_broker, authority) as device:
            counts = await _into_inbox(device, tmp_path, 20, killed)
            assert counts.lost_blocks > 0
            assert counts.fetched_bytes == SIZE
            assert counts.duplicate_bytes + counts.refetched_bytes <= 8 * BLOCK

    try:
        asyncio.run(main())
    finally:
        for server in servers:
            server.kill()


def test_a_broker_restarted_in_the_middle_is_not_waited_for_until_the_time_out(
    tmp_path: Path, own_broker: Broker, authority: Authority, start_server: Callable[..., BlockServerProcess]
) -> None:
    async def main() -> None:
        async with _device(own_broker, authority) as device, asyncio.timeout(30):
            restart: list[asyncio.Future[None]] = []
            loop = asyncio.get_running_loop()
            counts = await _into_inbox(
                device, tmp_path, 20, lambda: restart.append(loop.run_in_executor(None, own_broker.restart))
            )
            await asyncio.gather(*restart)
            assert counts.fetched_bytes == SIZE
            assert device.mqtt.counters.connections == 2

    with start_server(own_broker) as server:
        server.wait_connected()
        asyncio.run(main())


@pytest.mark.parametrize(
    ("option", "limit", "block"),
    [("max_packet_size", 30_000, 16_384), ("max_packet_size", 6000, 4096), ("message_size_limit", 20_000, 16_384)],
)
def test_a_broker_that_carries_only_small_messages_is_given_small_blocks(
    tmp_path: Path,
    server_identity: Identity,
    authority: Authority,
    start_server: Callable[..., BlockServerProcess],
    option: str,
    limit: int,
    block: int,
) -> None:
    """A client is told of `max_packet_size`, so the block server says so; above `message_size_limit` all vanishes."""

    async def main(broker: Broker) -> None:
        async with _device(broker, authority) as device, asyncio.timeout(60):
            counts = await _into_inbox(device, tmp_path, 1, lambda: None)
            assert counts.fetched_bytes == SIZE
            assert device.transport.counts.answers >= SIZE // block
            assert (counts.lost_blocks > 0) == (option == "message_size_limit")
            assert counts.lost_blocks <= 16

    with Broker(tmp_path / "broker", server_identity, options={option: str(limit)}) as broker:
        with start_server(broker) as server:
            server.wait_connected()
            asyncio.run(main(broker))


def test_two_servers_share_the_requests_of_one_device(
    shared_broker: Broker, authority: Authority, start_server: Callable[..., BlockServerProcess]
) -> None:
    async def main() -> None:
        async with _device(shared_broker, authority, PATIENT) as device:
            assert hashlib.sha256(await _fetch(device)).hexdigest() == SHA
            assert device.transport.counts.unknown == 0, "no request was answered twice"

    with start_server(shared_broker, "ota_service") as one, start_server(shared_broker, "ota_service_2") as two:
        one.wait_connected()
        two.wait_connected()
        asyncio.run(main())
        assert [one.terminate(), two.terminate()] == [0, 0]
        shares = (one.answers(), two.answers())
        assert sum(shares) == -(-SIZE // BLOCK)
        assert min(shares) >= 20, shares


def test_a_block_of_the_largest_size_fits_the_brokers_packet_limit(
    shared_broker: Broker, authority: Authority, start_server: Callable[..., BlockServerProcess]
) -> None:
    async def main() -> None:
        async with _device(shared_broker, authority) as device:
            block = await device.transport.block(SHA, BLOCK, MAX_BLOCK_BYTES)
            assert block == PAYLOAD[BLOCK : BLOCK + MAX_BLOCK_BYTES]

    with start_server(shared_broker) as server:
        server.wait_connected()
        asyncio.run(main())


def test_a_device_that_asks_with_thousands_of_properties_costs_the_block_server_nothing(
    shared_broker: Broker,
    authority: Authority,
    make_client: MakeClient,
    start_server: Callable[[Broker, str], BlockServerProcess],
) -> None:
    hostile = make_client(shared_broker, "cam-2")
    hostile.ready()
    with start_server(shared_broker, "ota_service") as server:
        server.wait_connected()
        before_s = server.cpu_s()
        for _ in range(10):
            # 125 kB, and a second of work for whoever takes them apart
            heavy = Message("edge/v1/edge/cam-2/blk/get", b"", user=(("", ""),) * 25_000)
            assert hostile.mqtt.publish(heavy) is Sent.QUEUED

        async def main() -> None:
            while hostile.mqtt.waiting():
                await asyncio.sleep(0.05)
            async with _device(shared_broker, authority, PATIENT) as device:
                assert await device.transport.block(SHA, 0, 100) == PAYLOAD[:100]

        asyncio.run(asyncio.wait_for(main(), 120))
        assert server.cpu_s() - before_s < 2.0


def test_a_hint_reaches_the_fleet(shared_broker: Broker, authority: Authority, make_client: MakeClient) -> None:
    device = make_client(shared_broker, "cam-1", "edge/v1/edge/fleet/hint")
    device.ready()
    operator = authority.issue("ota_operator")
    tls = Tls(operator.ca, operator.certificate, operator.key)
    announce.send_hint(
        host="127.0.0.1",
        port=shared_broker.port,
        tls=tls,
        tenant="edge",
        client_id="ota_operator",
        line="person",
        spread_s=30,
    )
    assert device.expect(Received).payload == b'{"line":"person","spread_s":30,"v":1}'


def test_a_hint_that_the_broker_does_not_allow_or_cannot_take_is_an_error(
    shared_broker: Broker, authority: Authority
) -> None:
    identity = authority.issue("ota_dashboard")
    tls = Tls(identity.ca, identity.certificate, identity.key)
    with pytest.raises(BrokerError) as caught:
        announce.send_hint(host="127.0.0.1", port=shared_broker.port, tls=tls, tenant="edge", client_id="ota_dashboard")
    assert caught.value.reason is Reason.BROKER_REFUSED
    assert "0x87" in caught.value.message
    with pytest.raises(BrokerError) as caught:
        announce.send_hint(
            host="127.0.0.1", port=free_port(), tls=tls, tenant="edge", client_id="ota_dashboard", timeout_s=0.5
        )
    assert caught.value.reason is Reason.BROKER_UNREACHABLE
    with pytest.raises(OtaError):
        announce.send_hint(host="x", port=1, tls=tls, tenant="edge", client_id="ota_dashboard", line="../x")


def test_a_server_without_its_certificate_ends_at_once_and_one_without_a_broker_waits(
    tmp_path: Path, authority: Authority, own_broker: Broker, start_server: Callable[..., BlockServerProcess]
) -> None:
    missing = Tls(authority.ca, str(tmp_path / "none.pem"), str(tmp_path / "none.key"))
    with pytest.raises(BrokerError) as caught:
        serve.run(MemorySource(), host="127.0.0.1", port=1, tls=missing, tenant="edge", client_id="ota_service")
    assert caught.value.reason is Reason.BROKER_TLS
    own_broker.stop()
    with start_server(own_broker) as server:
        deadline = time.monotonic() + 60
        while "broker_unreachable" not in server.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        own_broker.start()
        server.wait_connected()
        assert server.terminate() == 0
