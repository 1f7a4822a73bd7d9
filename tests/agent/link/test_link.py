"""The daemon's link against a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.daemon.commands import Check, Command, Hint, Report, Rollback
from agent.daemon.link import Identity, Link, LinkSettings, Orders
from agent.daemon.telemetry import Clocks, Telemetry, TelemetryLimits
from agent.daemon.topics import Topics
from agent.errors import ControlError, Reason
from agent.protocol import Result
from ota.mqtt import Limits, Message, ReconnectPolicy, Tls
from tests.fakes.blockserver import DEVICE_DOCUMENT, BlockServerProcess
from tests.fakes.broker import Authority, Broker
from tests.fakes.broker import Identity as Certificate
from tests.fakes.ports import free_port

from .conftest import MakeOperator, Operator

# The link in a process that can be killed: arguments are CA, certificate, key and port.
_LINK_PROCESS = """
import asyncio, random, sys, time
from agent.daemon.link import Identity, Link, LinkSettings, Orders
from agent.daemon.telemetry import Clocks, Telemetry
from agent.daemon.topics import Topics
from ota.mqtt import Tls

async def main():
    *files, port = sys.argv[1:]
    settings = LinkSettings("127.0.0.1", int(port), Topics("edge", "cam-1"), Tls(*files), will_delay_s=0)
    telemetry = Telemetry(Clocks(time.time_ns, time.monotonic_ns, "boot-1"))
    link = Link(
        settings, Identity("boot-1", "i-1"), Orders(print, print), telemetry,
        rng=random.Random(1), clock=time.monotonic, wall=time.time,
    )
    await link.run()

asyncio.run(main())
"""
POLICY = ReconnectPolicy(first_s=0.05, longest_s=0.2, takeover_s=0.2)
CMD = "edge/v1/edge/cam-1/cmd"


class Daemon:
    """What the link is told to do, and a daemon's answers."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.hints: list[tuple[Hint, float]] = []
        self.refuse: Reason | None = None
        self.telemetry = Telemetry(Clocks(time.time_ns, time.monotonic_ns, "boot-1"), TelemetryLimits())

    def command(self, command: Command) -> None:
        if self.refuse is not None:
            raise ControlError(self.refuse, "not now")
        self.commands.append(command)

    def hint(self, hint: Hint, delay_s: float) -> None:
        self.hints.append((hint, delay_s))

    def link(self, certificate: Certificate, port: int, **settings: Any) -> Link:
        return Link(
            LinkSettings(
                "127.0.0.1",
                port,
                Topics("edge", "cam-1"),
                Tls(certificate.ca, certificate.certificate, certificate.key),
                flush_s=0.05,
                limits=Limits(connect_timeout_s=2.0),
                reconnect=POLICY,
                **settings,
            ),
            Identity("boot-1", "i-1"),
            Orders(self.command, self.hint),
            self.telemetry,
            rng=random.Random(1),
            clock=time.monotonic,
            wall=time.time,
        )


@contextlib.asynccontextmanager
async def _running(link: Link, *, connected: bool = True) -> AsyncIterator[Link]:
    task = asyncio.create_task(link.run())
    try:
        if connected:
            await _until(lambda: link.status()["state"] == "connected")
        yield link
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def _order(operator: Operator, *, retain: bool = False, **body: Any) -> None:
    command = {"v": 1, "id": "c-1", "action": "check", "expires_at": int(time.time()) + 60, **body}
    operator.mqtt.publish(Message(CMD, json.dumps(command).encode(), retain=retain))


async def _answer(operator: Operator) -> dict[str, Any]:
    batch = json.loads(await asyncio.to_thread(operator.next, "evt"))
    [event] = [event for event in batch["events"] if event["kind"] == "command"]
    facts: dict[str, Any] = event["facts"]
    return facts


def _result(seq: int) -> Result:
    now = time.monotonic_ns()
    items = [{"label": "person", "score": 0.9, "box": [1.0, 2.0, 3.0, 4.0]}]
    return Result(seq, now - 2_000_000, now, [100, 200, 1500, 60], items)


@pytest.fixture
def certificate(authority: Authority) -> Certificate:
    return authority.issue("cam-1")


def test_status_is_online_while_connected_and_offline_after_a_stop(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        async with _running(Daemon().link(certificate, broker.port)):
            status = json.loads(await asyncio.to_thread(operator.next, "status"))
            assert status["state"] == "online"
            assert status["session"] == {"boot": "boot-1", "instance": "i-1", "number": 1}
        assert json.loads(operator.next("status"))["state"] == "offline"

    asyncio.run(main())


def test_the_will_says_offline_with_the_number_of_the_connection_that_died(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        root = Path(__file__).resolve().parents[3]
        arguments = [certificate.ca, certificate.certificate, certificate.key, str(broker.port)]
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", _LINK_PROCESS, *arguments, cwd=root)
        online = json.loads(await asyncio.to_thread(operator.next, "status", 10))
        process.kill()
        await process.wait()
        will = json.loads(await asyncio.to_thread(operator.next, "status", 10))
        assert (online["state"], will["state"]) == ("online", "offline")
        assert will["session"] == online["session"]

    asyncio.run(main())


def test_reported_is_retained_and_sent_only_when_it_changes(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        link = Daemon().link(certificate, broker.port)
        link.report({"lines": {"person": "1.0.0"}})
        async with _running(link):
            assert json.loads(await asyncio.to_thread(operator.next, "reported")) == {"lines": {"person": "1.0.0"}}
            await asyncio.to_thread(operator.next, "status")  # counted as state as well
            before = link.bytes_by_purpose()["state"]["out"]
            for _ in range(10):
                link.report({"lines": {"person": "1.0.0"}})
            await asyncio.sleep(0.1)
            assert link.bytes_by_purpose()["state"]["out"] == before
            link.report({"lines": {"person": "1.1.0"}})
            assert json.loads(await asyncio.to_thread(operator.next, "reported")) == {"lines": {"person": "1.1.0"}}

    asyncio.run(main())


def test_every_result_arrives_exactly_once(broker: Broker, operator: Operator, certificate: Certificate) -> None:
    async def main() -> None:
        daemon = Daemon()
        async with _running(daemon.link(certificate, broker.port)) as link:
            for seq in range(3000):
                daemon.telemetry.result("person", _result(seq))
                if seq % 50 == 49:
                    await asyncio.sleep(0.01)
            seqs: list[int] = []
            messages = 0
            while len(seqs) < 3000:
                batch = json.loads(await asyncio.to_thread(operator.next, "tele"))
                seqs += [row[0] for row in batch["results"]]
                messages += 1
            assert seqs == list(range(3000))
            assert messages < 60, "gathered, not one by one"
            await _until(lambda: link.status()["waiting"] == 0)
            flow = link.bytes_by_purpose()["telemetry"]["out"]
            print(f"\n3000 results in {messages} messages, {flow / 3000:.0f} bytes a result")

    asyncio.run(main())


def test_results_of_a_broker_outage_arrive_afterwards_none_missing_and_repeats_are_recognisable(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemon = Daemon()
        async with _running(daemon.link(certificate, broker.port)) as link:
            seq = 0

            async def work(results: int) -> None:
                nonlocal seq
                for _ in range(results):
                    daemon.telemetry.result("person", _result(seq))
                    seq += 1
                    await asyncio.sleep(0.002)

            await work(100)
            await asyncio.to_thread(broker.stop)
            await work(100)
            assert not link.connected
            await asyncio.to_thread(broker.start)
            await work(100)
            await _until(lambda: link.connected)
            batches: dict[int, list[int]] = {}
            while sum(len(seqs) for seqs in batches.values()) < 300:
                batch = json.loads(await asyncio.to_thread(operator.next, "tele"))
                seqs = [row[0] for row in batch["results"]]
                assert batches.setdefault(batch["n"], seqs) == seqs, "a repeated batch is the same batch"
            assert sorted(seq for seqs in batches.values() for seq in seqs) == list(range(300))

    asyncio.run(main())


def test_offline_memory_is_bounded_and_the_loss_is_told(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemon = Daemon()
        daemon.telemetry = Telemetry(
            Clocks(time.time_ns, time.monotonic_ns, "boot-1"), TelemetryLimits(waiting_bytes=100_000)
        )
        await asyncio.to_thread(broker.stop)
        async with _running(daemon.link(certificate, broker.port), connected=False) as link:
            for seq in range(5000):
                daemon.telemetry.result("person", _result(seq))
            daemon.telemetry.event("update", {"outcome": "committed"}, alarm=True)
            await asyncio.sleep(0.2)
            assert daemon.telemetry.waiting_bytes <= 100_000
            await asyncio.to_thread(broker.start)
            await _until(lambda: link.connected)
            first = json.loads(await asyncio.to_thread(operator.next, "evt"))
            assert first["events"][0]["facts"] == {"outcome": "committed"}
            assert int(first["lost"]["2"]) > 3000
            seqs: list[int] = []
            while not seqs or seqs[-1] != 4999:
                batch = json.loads(await asyncio.to_thread(operator.next, "tele"))
                seqs += [row[0] for row in batch["results"]]
            assert len(seqs) == 5000 - int(first["lost"]["2"])

    asyncio.run(main())


def test_telemetry_reaches_a_broker_that_takes_small_packets_only(
    tmp_path: Path, authority: Authority, certificate: Certificate, make_operator: MakeOperator
) -> None:
    server = authority.issue("broker", hosts=["127.0.0.1"])
    with Broker(tmp_path / "small", server, options={"max_packet_size": "20000"}) as broker:
        operator = make_operator(broker)

        async def main() -> None:
            daemon = Daemon()
            for seq in range(2000):
                daemon.telemetry.result("person", _result(seq))
            async with _running(daemon.link(certificate, broker.port)) as link:
                seqs: list[int] = []
                while len(seqs) < 2000:
                    batch = json.loads(await asyncio.to_thread(operator.next, "tele"))
                    seqs += [row[0] for row in batch["results"]]
                assert seqs == list(range(2000))
                assert link.status()["counts"]["oversize"] == 0

        asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "command"),
    [
        ({"line": "person"}, Check("c-1", "person")),
        ({}, Check("c-1", None)),
        ({"action": "rollback", "line": "person"}, Rollback("c-1", "person")),
        ({"action": "report"}, Report("c-1")),
    ],
)
def test_a_command_is_handed_to_the_daemon_and_answered(
    body: dict[str, Any], command: Command, broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemon = Daemon()
        async with _running(daemon.link(certificate, broker.port)):
            _order(operator, **body)
            assert await _answer(operator) == {"id": "c-1", "state": "accepted", "reason": None, "message": ""}
            assert daemon.commands == [command]
            _order(operator, **body)
            await asyncio.sleep(0.2)
            assert daemon.commands == [command], "the same id again"

    asyncio.run(main())


@pytest.mark.fault("F84")
@pytest.mark.parametrize(
    "payload",
    [b"{", b"[" * 3000, b"x" * 60_000, json.dumps({"v": 1, "id": "c-2", "action": "format_disk"}).encode()],
    ids=["cut", "deep", "large", "unknown"],
)
def test_a_bad_command_is_answered_with_its_reason_and_the_link_goes_on(
    payload: bytes, broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemon = Daemon()
        async with _running(daemon.link(certificate, broker.port)) as link:
            operator.mqtt.publish(Message(CMD, payload))
            answer = await _answer(operator)
            assert answer["state"] == "refused"
            assert answer["reason"] in ("bad_message", "unknown_command")
            _order(operator)
            assert (await _answer(operator))["state"] == "accepted"
            assert link.status()["counts"]["losses"] == 0

    asyncio.run(main())


def test_a_command_the_daemon_cannot_carry_out_is_refused_with_the_daemons_reason(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemon = Daemon()
        daemon.refuse = Reason.NO_PREVIOUS
        async with _running(daemon.link(certificate, broker.port)):
            _order(operator, action="rollback", line="person")
            answer = await _answer(operator)
            assert (answer["state"], answer["reason"]) == ("refused", "no_previous")

    asyncio.run(main())


@pytest.mark.fault("F82")
def test_a_retained_command_is_never_delivered_to_a_device_that_connects_later(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemon = Daemon()
        _order(operator, retain=True)
        await _until(lambda: operator.mqtt.waiting() == 0)
        async with _running(daemon.link(certificate, broker.port)):
            _order(operator, id="c-2")
            assert (await _answer(operator))["id"] == "c-2"
            assert daemon.commands == [Check("c-2", None)]

    asyncio.run(main())


@pytest.mark.fault("F82")
def test_a_command_that_waited_at_the_broker_until_it_expired_is_refused(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemon = Daemon()
        async with _running(daemon.link(certificate, broker.port)):
            pass
        _order(operator, id="old", expires_at=int(time.time()))
        _order(operator, id="fresh")
        await _until(lambda: operator.mqtt.waiting() == 0)
        async with _running(daemon.link(certificate, broker.port)):
            await _until(lambda: bool(daemon.commands))
            answers: dict[str, str | None] = {}
            while len(answers) < 2:  # in one batch or in two
                batch = json.loads(await asyncio.to_thread(operator.next, "evt"))
                answers |= {event["facts"]["id"]: event["facts"]["reason"] for event in batch["events"]}
            assert answers == {"old": "command_expired", "fresh": None}
            assert daemon.commands == [Check("fresh", None)]

    asyncio.run(main())


@pytest.mark.fault("F85")
def test_a_flood_of_commands_is_cut_and_costs_no_telemetry(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemon = Daemon()
        async with _running(daemon.link(certificate, broker.port)) as link:
            for number in range(200):
                _order(operator, id=f"c-{number}")
            daemon.telemetry.event("update", {"outcome": "committed"}, alarm=True)
            await _until(lambda: link.status()["counts"]["commands_flooded"] >= 150)
            assert 20 <= len(daemon.commands) <= 22
            kinds: list[str] = []
            while "update" not in kinds:
                batch = json.loads(await asyncio.to_thread(operator.next, "evt"))
                kinds += [event["kind"] for event in batch["events"]]

    asyncio.run(main())


def test_a_hint_asks_for_a_check_after_a_random_part_of_its_spread(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemon = Daemon()
        async with _running(daemon.link(certificate, broker.port)):
            hint = b'{"v":1,"line":"person","spread_s":100}'
            for _ in range(3):
                operator.mqtt.publish(Message("edge/v1/edge/fleet/hint", hint))
            await _until(lambda: len(daemon.hints) == 3)
            assert {hint for hint, _ in daemon.hints} == {Hint("person", 100)}
            delays = [delay for _, delay in daemon.hints]
            assert len(set(delays)) == 3
            assert all(0 <= delay <= 100 for delay in delays)
            for _ in range(5):
                operator.mqtt.publish(Message("edge/v1/edge/fleet/hint", b'{"v":1,"line":null,"spread_s":0}'))
            operator.mqtt.publish(Message("edge/v1/edge/fleet/hint", b"{}"))
            await asyncio.sleep(0.2)
            assert len(daemon.hints) == 4, "a flood of hints is one look"
            assert daemon.hints[3][1] >= 10, "and that comes later"

    asyncio.run(main())


def test_the_status_names_what_is_wrong_with_the_broker(
    tmp_path: Path, broker: Broker, certificate: Certificate
) -> None:
    stranger = Authority(tmp_path / "stranger").issue("cam-1")

    async def main() -> None:
        cases = [
            (certificate, free_port(), "broker_unreachable"),
            (Certificate("cam-1", stranger.ca, certificate.certificate, certificate.key), broker.port, None),
        ]
        cases[1] = (*cases[1][:2], "broker_untrusted")
        for files, port, reason in cases:
            async with _running(Daemon().link(files, port), connected=False) as link:
                await _until(lambda link=link: link.status()["state"] == "waiting")  # type: ignore[misc]
                status = link.status()
                assert status["reason"] == reason
                assert status["message"]
                assert status["hint"]
                assert link.alive
                assert not link.connected

    asyncio.run(main())


@pytest.mark.fault("F80")
def test_two_devices_with_one_identity_raise_an_alarm(
    broker: Broker, operator: Operator, certificate: Certificate
) -> None:
    async def main() -> None:
        daemons = Daemon(), Daemon()
        async with _running(daemons[0].link(certificate, broker.port)):
            async with _running(daemons[1].link(certificate, broker.port), connected=False):
                while True:
                    batch = json.loads(await asyncio.to_thread(operator.next, "evt", 15))
                    alarms = [event["facts"] for event in batch["events"] if event["kind"] == "alarm"]
                    if alarms:
                        break
        assert alarms[0]["reason"] in ("session_taken_over", "broker_lost")
        assert "revoke" in alarms[0]["hint"]

    asyncio.run(main())


def test_the_link_carries_block_requests_and_counts_them_as_updates(
    tmp_path: Path, broker: Broker, authority: Authority, certificate: Certificate
) -> None:
    async def main() -> None:
        async with _running(Daemon().link(certificate, broker.port)) as link:
            assert await link.transport.desired(1000) == DEVICE_DOCUMENT
            flow = link.bytes_by_purpose()["updates"]
            assert flow["in"] > len(DEVICE_DOCUMENT)
            assert flow["out"] > 50
            assert link.status()["bytes"]["keepalive"]["in"] > 0

    with BlockServerProcess(broker, authority.issue("ota_service"), 1000, tmp_path / "server.log") as server:
        server.wait_connected()
        asyncio.run(main())
