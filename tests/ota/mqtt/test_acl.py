"""The shipped ACL, by what is delivered: a granted subscription proves nothing."""

from __future__ import annotations

import pytest

from ota.mqtt import Acknowledged, Message, Received, Will
from tests.fakes.broker import Broker

from .conftest import Client, MakeClient

NOT_AUTHORIZED = 0x87
OWN = ("status", "reported", "evt", "tele", "log", "blk/get")


def _connected(client: Client) -> Client:
    client.ready()
    return client


def _publish(client: Client, topic: str, payload: bytes = b"x") -> int:
    """Publish with QoS 1; the broker's reason code."""
    client.mqtt.publish(Message(topic, payload, token=topic))
    return client.expect(Acknowledged, where=lambda event: event.token == topic).code


def test_a_device_publishes_everything_it_may_in_its_own_tree(shared_broker: Broker, make_client: MakeClient) -> None:
    operator = _connected(make_client(shared_broker, "ota_operator", *(f"edge/v1/edge/+/{s}" for s in OWN[:5])))
    server = _connected(make_client(shared_broker, "ota_service", "$share/ota/edge/v1/+/+/blk/get"))
    device = _connected(make_client(shared_broker, "cam-1"))
    for suffix in OWN:
        assert _publish(device, f"edge/v1/edge/cam-1/{suffix}") < 0x80
    heard = {operator.expect(Received).topic for _ in range(5)}
    assert heard == {f"edge/v1/edge/cam-1/{suffix}" for suffix in OWN[:5]}
    assert server.expect(Received).topic == "edge/v1/edge/cam-1/blk/get"


@pytest.mark.fault("F79")
def test_a_device_cannot_publish_in_the_tree_of_another(shared_broker: Broker, make_client: MakeClient) -> None:
    suffixes = (*OWN, "cmd", "blk/data")
    watched = [f"edge/v1/edge/+/{suffix}" for suffix in OWN[:5]]
    operator = _connected(make_client(shared_broker, "ota_operator", *watched))
    victim = _connected(make_client(shared_broker, "cam-1", "edge/v1/edge/cam-1/cmd", "edge/v1/edge/cam-1/blk/data"))
    thief = _connected(make_client(shared_broker, "cam-2"))
    for suffix in suffixes:
        assert _publish(thief, f"edge/v1/edge/cam-1/{suffix}") == NOT_AUTHORIZED
    # nor may it answer or command itself, or hint to the fleet
    for topic in ("edge/v1/edge/cam-2/cmd", "edge/v1/edge/cam-2/blk/data", "edge/v1/edge/fleet/hint"):
        assert _publish(thief, topic) == NOT_AUTHORIZED
    assert operator.quiet() == []
    assert victim.quiet(0.1) == []
    assert thief.mqtt.counters.losses == 0


@pytest.mark.fault("F79")
@pytest.mark.parametrize(
    "filters",
    [
        ["edge/v1/edge/cam-1/#"],
        ["#"],
        ["edge/v1/edge/+/cmd", "edge/v1/edge/+/blk/data"],
        ["$share/thieves/edge/v1/edge/cam-1/cmd"],
    ],
)
def test_a_device_receives_nothing_of_another_whatever_it_subscribes_to(
    filters: list[str], shared_broker: Broker, make_client: MakeClient
) -> None:
    victim = _connected(make_client(shared_broker, "cam-1", "edge/v1/edge/cam-1/cmd", "edge/v1/edge/cam-1/blk/data"))
    thief = _connected(make_client(shared_broker, "cam-2", *filters))
    operator = _connected(make_client(shared_broker, "ota_operator"))
    server = _connected(make_client(shared_broker, "ota_service"))
    assert _publish(victim, "edge/v1/edge/cam-1/evt", b"of cam-1") < 0x80
    assert _publish(operator, "edge/v1/edge/cam-1/cmd", b"for cam-1") < 0x80
    assert _publish(server, "edge/v1/edge/cam-1/blk/data", b"for cam-1") < 0x80
    assert [victim.expect(Received).payload for _ in range(2)] == [b"for cam-1"] * 2
    assert thief.quiet() == []


@pytest.mark.fault("F92")
def test_system_topics_are_closed_to_devices(shared_broker: Broker, make_client: MakeClient) -> None:
    device = _connected(make_client(shared_broker, "cam-1", "$SYS/#", "$CONTROL/#"))
    assert device.quiet() == [], "retained $SYS values are not delivered"
    assert _publish(device, "$CONTROL/dynamic-security/v1") == NOT_AUTHORIZED


@pytest.mark.fault("F92")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_will_in_the_tree_of_another_is_not_published(shared_broker: Broker, make_client: MakeClient) -> None:
    operator = _connected(make_client(shared_broker, "ota_operator", "edge/v1/edge/+/status"))

    def vanish() -> None:
        raise SystemExit

    for victim, heard in (("cam-2", True), ("cam-1", False)):
        will = Will(f"edge/v1/edge/{victim}/status", b"gone", delay_s=0)
        make_client(shared_broker, "cam-2", wake=vanish, will=lambda number, will=will: will).inbox.get(5)
        messages = [event for event in operator.quiet(0.6) if isinstance(event, Received)]
        assert bool(messages) is heard, "its own will arrives, so that silence proves something"
    _publish(_connected(make_client(shared_broker, "cam-2")), "edge/v1/edge/cam-2/status", b"")


def test_a_dashboard_hears_devices_and_cannot_command_them(shared_broker: Broker, make_client: MakeClient) -> None:
    dashboard = _connected(make_client(shared_broker, "ota_dashboard", "edge/v1/edge/+/tele"))
    device = _connected(make_client(shared_broker, "cam-1"))
    assert _publish(device, "edge/v1/edge/cam-1/tele") < 0x80
    dashboard.expect(Received)
    assert _publish(dashboard, "edge/v1/edge/cam-1/cmd") == NOT_AUTHORIZED


def test_samples_reach_their_device_alone_and_only_from_who_may_publish_them(
    shared_broker: Broker, make_client: MakeClient
) -> None:
    device = _connected(make_client(shared_broker, "cam-1", "edge/v1/edge/cam-1/in/pump"))
    thief = _connected(make_client(shared_broker, "cam-2", "edge/v1/edge/cam-1/in/#", "edge/v1/edge/+/in/pump"))
    sensors = _connected(make_client(shared_broker, "ota_sensors", "edge/v1/edge/+/tele", "edge/v1/edge/+/in/+"))
    assert _publish(sensors, "edge/v1/edge/cam-1/in/pump", b"[1]") < 0x80
    assert device.expect(Received).payload == b"[1]"
    for liar in (thief, device):
        assert _publish(liar, "edge/v1/edge/cam-1/in/pump", b"[9]") == NOT_AUTHORIZED
    assert _publish(sensors, "edge/v1/edge/cam-1/cmd") == NOT_AUTHORIZED
    assert _publish(device, "edge/v1/edge/cam-1/tele") < 0x80
    assert thief.quiet() == []
    assert sensors.quiet() == []


def test_every_device_hears_the_fleet_hint_from_server_and_operator(
    shared_broker: Broker, make_client: MakeClient
) -> None:
    devices = [_connected(make_client(shared_broker, name, "edge/v1/edge/fleet/hint")) for name in ("cam-1", "cam-2")]
    for name in ("ota_service", "ota_operator"):
        sender = _connected(make_client(shared_broker, name))
        assert _publish(sender, "edge/v1/edge/fleet/hint", name.encode()) < 0x80
        assert [device.expect(Received).payload for device in devices] == [name.encode()] * 2
