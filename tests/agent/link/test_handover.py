"""A renewed certificate takes over the connection of a real broker, or leaves it as it was."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agent.daemon import uplink
from agent.daemon.link import Identity, Link, LinkSettings, Orders
from agent.daemon.telemetry import Clocks, Telemetry, TelemetryLimits
from agent.daemon.topics import Topics
from ota.errors import BrokerError, Reason
from ota.mailbox import Connected, Inbox, Lost, Message, Received
from ota.mqtt import Counters, ReconnectPolicy, Tls
from tests.fakes.broker import Authority, Broker
from tests.fakes.broker import Identity as Certificate

from .conftest import Operator

POLICY = ReconnectPolicy(first_s=0.05, longest_s=0.2, takeover_s=30.0)
CMD = "edge/v1/edge/cam-1/cmd"


def tls(certificate: Certificate) -> Tls:
    return Tls(certificate.ca, certificate.certificate, certificate.key)


def make_link(certificate: Certificate, port: int, commands: list[str]) -> tuple[Link, Telemetry]:
    telemetry = Telemetry(Clocks(time.time_ns, time.monotonic_ns, "boot-1"), TelemetryLimits())
    settings = LinkSettings(
        "127.0.0.1", port, Topics("edge", "cam-1"), tls(certificate), flush_s=0.05, will_delay_s=5, reconnect=POLICY
    )
    link = Link(
        settings, Identity("boot-1", "i-1"), Orders(lambda c: commands.append(c.id), lambda *_: None), telemetry,
        rng=random.Random(1), clock=time.monotonic, wall=time.time,
    )  # fmt: skip
    return link, telemetry


@contextlib.asynccontextmanager
async def running(link: Link) -> AsyncIterator[Link]:
    task = asyncio.create_task(link.run())
    try:
        async with asyncio.timeout(60):
            while link.status()["state"] != "connected":
                await asyncio.sleep(0.01)
        yield link
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def outage(link: Link, gaps: list[float]) -> None:
    """Note every span in which messages could not be sent."""
    since: float | None = None
    while True:
        now = time.monotonic()
        if link.connected and since is not None:
            gaps.append(now - since)
            since = None
        elif not link.connected and since is None:
            since = now
        await asyncio.sleep(0.001)


@pytest.mark.fault("F93")
def test_a_new_certificate_takes_the_connection_over_without_an_outage(
    broker: Broker, operator: Operator, authority: Authority
) -> None:
    async def main() -> None:
        commands: list[str] = []
        old, new = authority.issue("cam-1"), authority.issue("cam-1")
        link, telemetry = make_link(old, broker.port, commands)
        async with running(link):
            assert json.loads(await asyncio.to_thread(operator.next, "status"))["session"]["number"] == 1
            gaps: list[float] = []
            watch = asyncio.create_task(outage(link, gaps))
            telemetry.event("before", {})
            assert await link.try_tls(tls(new)) is None
            watch.cancel()
            assert sum(gaps) < 0.5, gaps
            online = json.loads(await asyncio.to_thread(operator.next, "status"))
            assert (online["state"], online["session"]["number"]) == ("online", 2)
            order = {"v": 1, "id": "after", "action": "report", "expires_at": int(time.time()) + 60}
            operator.mqtt.publish(Message(CMD, json.dumps(order).encode()))
            kinds = await heard(operator, {"before", "command"})
            assert {"before", "command"} <= kinds
            # nobody takes it for a thief's second connection
            assert "alarm" not in kinds
            assert commands == ["after"]
            assert link.status()["counts"]["connections"] == 2

    asyncio.run(main())


async def heard(operator: Operator, wanted: set[str]) -> set[str]:
    kinds: set[str] = set()
    while not wanted <= kinds:
        batch = json.loads(await asyncio.to_thread(operator.next, "evt"))
        kinds |= {event["kind"] for event in batch["events"]}
    return kinds


@pytest.mark.parametrize("fault", ["another authority", "expired"])
def test_a_certificate_that_the_broker_refuses_leaves_the_connection_alone(
    broker: Broker, authority: Authority, tmp_path: Path, fault: str
) -> None:
    async def main() -> None:
        link, _ = make_link(authority.issue("cam-1"), broker.port, [])
        if fault == "expired":
            start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3)
            bad = authority.issue("cam-1", starts=start, days=1)
        else:
            stranger = Authority(tmp_path / "stranger", "stranger").issue("cam-1")
            bad = Certificate("cam-1", authority.ca, stranger.certificate, stranger.key)
        async with running(link):
            error = await link.try_tls(tls(bad))
            assert error is not None
            assert error.reason.value == "broker_refused"
            status = link.status()
            assert (status["state"], status["counts"]["losses"], status["counts"]["connections"]) == ("connected", 0, 1)

    asyncio.run(main())


@pytest.mark.fault("F93")
def test_the_old_certificate_comes_back_when_the_new_connection_does_not_last(
    broker: Broker, operator: Operator, authority: Authority
) -> None:
    async def main() -> None:
        old, new = authority.issue("cam-1"), authority.issue("cam-1")
        link, _ = make_link(old, broker.port, [])
        async with running(link):
            trial = asyncio.create_task(link.try_tls(tls(new)))
            while link.status()["counts"]["connections"] < 2:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(broker.restart)
            error = await trial
            assert error is not None
            async with asyncio.timeout(60):
                while not link.connected:
                    await asyncio.sleep(0.01)
            assert link._mqtt._client.tls == tls(old)  # whose it is, the broker's log tells as well, by serial only

    asyncio.run(main())


def test_a_trial_while_the_broker_is_away_changes_nothing(broker: Broker, authority: Authority) -> None:
    async def main() -> None:
        link, _ = make_link(authority.issue("cam-1"), broker.port, [])
        async with running(link):
            await asyncio.to_thread(broker.stop)
            error = await link.try_tls(tls(authority.issue("cam-1")))
            assert error is not None
            assert error.reason.value == "broker_unreachable"
            await asyncio.to_thread(broker.start)
            async with asyncio.timeout(60):
                while not link.connected:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


class Puppet:
    """Stands for `Mqtt`: its events come from the test, since no broker forgets to answer a subscription on demand."""

    made: ClassVar[list[Puppet]] = []

    def __init__(self, settings: object, inbox: Inbox, **_: object) -> None:
        self.inbox = inbox
        self.counters = Counters()
        self.number = 1
        self.made.append(self)

    def start(self) -> None: ...

    def hold(self, on: bool) -> None: ...

    def retry_now(self) -> None: ...

    def close(self, timeout_s: float = 0.0) -> None: ...

    def unsent(self) -> list[Message]:
        return []


@pytest.mark.fault("F93")
def test_what_a_trial_heard_before_it_timed_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uplink, "Mqtt", Puppet)
    monkeypatch.setattr(Puppet, "made", [])
    order = Received(CMD, b"{}", 1, False, None, (), 30)
    taken = Lost(1, BrokerError(Reason.SESSION_TAKEN_OVER, "taken over"), 1.0)

    async def main() -> None:
        woken: list[None] = []
        link = uplink.Uplink(
            lambda _: None,  # type: ignore[arg-type, return-value]
            Tls("ca", "old", "key"),
            policy=POLICY,
            rng=random.Random(1),
            clock=time.monotonic,
            wake=lambda: woken.append(None),
        )
        trial = asyncio.create_task(link.try_tls(Tls("ca", "new", "key"), timeout_s=0.1))
        await asyncio.sleep(0)
        first, second = Puppet.made
        second.inbox.put(Connected(2, True, 1 << 20))
        second.inbox.put(order)
        first.inbox.put(taken)
        assert link.events() == [], "whether the session moves is not known yet"
        woken.clear()
        error = await trial
        assert error is not None
        assert woken
        told = link.events()
        assert order in told, "the broker takes it for delivered"
        assert taken in told, "the first connection ended, and nobody would know"
        await link.close()

    asyncio.run(main())


def test_what_waits_for_the_broker_moves_to_the_new_connection(
    broker: Broker, operator: Operator, authority: Authority
) -> None:
    async def main() -> None:
        start: dict[str, Any] = {}
        old, new = authority.issue("cam-1"), authority.issue("cam-1")
        link, telemetry = make_link(old, broker.port, [])
        async with running(link):
            for number in range(50):
                telemetry.event(f"e{number}", {})
                await asyncio.sleep(0.002)
                if number == 10:
                    start["trial"] = asyncio.create_task(link.try_tls(tls(new)))
            assert await start["trial"] is None
            await heard(operator, {f"e{number}" for number in range(50)})

    asyncio.run(main())
