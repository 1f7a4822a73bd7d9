"""Samples over a real broker: from who publishes them, through the link, to a source's inlet."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from pathlib import Path

from agent.configtable import Table
from agent.daemon.link import Identity, Link, LinkSettings, Orders
from agent.daemon.telemetry import Clocks, Telemetry
from agent.daemon.topics import Topics
from agent.daemon.topicsource import TopicSources
from agent.sourceconfig import parse_source
from ota.mqtt import Inbox, Message, Mqtt, Reconnect, ReconnectPolicy, Settings, Subscribed, Tls
from tests.fakes.broker import Authority, Broker
from tests.fakes.broker import Identity as Certificate

POLICY = ReconnectPolicy(first_s=0.05, longest_s=0.2)


class Source:
    """Takes what is heard for it."""

    def __init__(self, topic: str) -> None:
        table = {"name": topic, "kind": "topic", "topic": topic, "channels": 2, "rate_hz": 10, "window": 4}
        self.config = parse_source(Table(table, "agent.toml", Path("/")))
        self.samples: dict[str, int] = {}
        self.rows: list[list[float]] = []

    def feed(self, t_ns: int, rows: list[list[float]]) -> bool:
        self.rows += rows
        return True


def files(certificate: Certificate) -> Tls:
    return Tls(certificate.ca, certificate.certificate, certificate.key)


def publisher(broker: Broker, authority: Authority) -> Mqtt:
    inbox = Inbox()
    settings = Settings(broker.host, broker.port, files(authority.issue("ota_sensors")), "ota_sensors")
    mqtt = Mqtt(settings, inbox, reconnect=Reconnect(POLICY, random.Random(1)), clock=time.monotonic)
    mqtt.start()
    deadline = time.monotonic() + 60
    while not isinstance(inbox.get(1.0), Subscribed) and not mqtt.connected:
        assert time.monotonic() < deadline
    return mqtt


def test_what_a_gateway_publishes_for_an_input_reaches_the_source_and_nothing_else_does(
    broker: Broker, authority: Authority
) -> None:
    source = Source("pump")
    feeds = TopicSources([source])
    telemetry = Telemetry(Clocks(time.time_ns, time.monotonic_ns, "boot-1"))
    link = Link(
        LinkSettings(
            "127.0.0.1",
            broker.port,
            Topics("edge", "cam-1", feeds.names),
            files(authority.issue("cam-1")),
            reconnect=POLICY,
        ),
        Identity("boot-1", "i-1"),
        Orders(print, print, feeds.heard),
        telemetry,
        rng=random.Random(1),
        clock=time.monotonic,
        wall=time.time,
    )

    async def main() -> None:
        task = asyncio.create_task(link.run())
        gateway = await asyncio.to_thread(publisher, broker, authority)
        try:
            async with asyncio.timeout(60):
                while link.status()["state"] != "connected":
                    await asyncio.sleep(0.02)
                for suffix in ("cam-1/in/other", "cam-2/in/pump", "cam-1/in/pump"):
                    gateway.publish(Message(f"edge/v1/edge/{suffix}", b"[[1, 2], [3.5, -4]]", qos=1))
                while not source.rows:
                    await asyncio.sleep(0.02)
        finally:
            await asyncio.to_thread(gateway.close, 0.2)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert source.rows == [[1, 2], [3.5, -4]]
    assert source.samples == {"heard": 1, "refused": 0, "dropped": 0}
    assert link.bytes_by_purpose()["samples"]["in"] > 0
    assert link.ignored == 0
