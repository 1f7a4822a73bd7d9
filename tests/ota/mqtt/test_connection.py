"""Staying connected, and staying alive whatever the other side does."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

import pytest

from ota.errors import Reason
from ota.mqtt import (
    Acknowledged,
    Connected,
    Limits,
    Lost,
    Message,
    Received,
    Sent,
    Will,
)
from tests.fakes.broker import Broker, Identity
from tests.fakes.impostor import Impostor

from .conftest import Client, MakeClient

EVT = "edge/v1/edge/cam-1/evt"
# MQTT 5.0, 3.2: accepted, no properties
CONNACK = bytes([0x20, 3, 0, 0, 0])


def test_a_restarted_broker_is_found_again_and_what_waited_arrives_once(
    own_broker: Broker, make_client: MakeClient
) -> None:
    operator = make_client(own_broker, "ota_operator", "edge/v1/edge/+/evt", session_expiry_s=600)
    device = make_client(own_broker, "cam-1", session_expiry_s=600)
    operator.ready()
    device.ready()
    own_broker.stop()
    assert device.expect(Lost).error.reason is Reason.BROKER_LOST
    assert device.expect(Lost).error.reason is Reason.BROKER_UNREACHABLE
    for number in range(5):
        assert device.mqtt.publish(Message(EVT, b"%d" % number)) is Sent.QUEUED
    own_broker.start()
    # what waited for it may come before its subscriptions are confirmed
    assert operator.expect(Connected).session_present
    arrived = [operator.expect(Received).payload for _ in range(5)]
    assert arrived == [b"0", b"1", b"2", b"3", b"4"]
    assert not any(isinstance(event, Received) for event in operator.quiet())
    assert device.mqtt.waiting() == 0


def test_a_topic_that_only_an_earlier_session_wanted_is_left_at_its_next_message(
    own_broker: Broker, make_client: MakeClient
) -> None:
    kept, dropped = "edge/v1/edge/cam-1/in/pump", "edge/v1/edge/cam-1/in/boiler"
    before = make_client(own_broker, "cam-1", kept, dropped, session_expiry_s=600)
    before.ready()
    before.mqtt.close(0.2)
    after = make_client(own_broker, "cam-1", kept, session_expiry_s=600)
    assert after.ready().session_present
    gateway = make_client(own_broker, "ota_sensors")
    gateway.ready()
    gateway.mqtt.publish(Message(dropped, b"first"))
    assert after.expect(Received).payload == b"first"
    # the broker acts on what one client says in order: it has left when it has confirmed what came later
    answered = after.mqtt.publish(Message(EVT, b"x", token="later"))
    assert answered is Sent.QUEUED
    after.expect(Acknowledged)
    for topic, payload in ((dropped, b"second"), (kept, b"third")):
        gateway.mqtt.publish(Message(topic, payload))
    assert after.expect(Received).payload == b"third"


def test_a_broker_that_stops_answering_is_noticed_by_the_keepalive(own_broker: Broker, make_client: MakeClient) -> None:
    client = make_client(own_broker, "cam-1", limits=Limits(keepalive_s=1, connect_timeout_s=1.0))
    client.ready()
    own_broker.freeze()
    client.expect(Lost, timeout_s=60)
    assert client.mqtt.alive
    own_broker.thaw()
    client.expect(Connected, timeout_s=60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_will_is_published_when_the_process_vanishes_and_not_when_it_says_good_bye(
    own_broker: Broker, make_client: MakeClient
) -> None:
    operator = make_client(own_broker, "ota_operator", "edge/v1/edge/+/status")
    operator.ready()
    will = Will("edge/v1/edge/cam-1/status", b"gone", delay_s=0)
    polite = make_client(own_broker, "cam-1", will=lambda number: will)
    polite.ready()
    polite.mqtt.close()
    assert operator.quiet() == []
    sudden = make_client(own_broker, "cam-1", will=lambda number: Will(will.topic, b"gone %d" % number, 0), wake=_die)
    sudden.inbox.get(5)
    assert operator.expect(Received).payload == b"gone 1"


def _die() -> None:
    """End the network thread as nothing but a crash does: its socket closes without a word."""
    raise SystemExit


@pytest.mark.fault("F86")
def test_a_message_above_the_brokers_limit_is_refused_here_and_the_connection_stays(
    shared_broker: Broker, make_client: MakeClient
) -> None:
    operator = make_client(shared_broker, "ota_operator", "edge/v1/edge/+/evt")
    device = make_client(shared_broker, "cam-1")
    operator.ready()
    limit = device.ready().max_packet_bytes
    head = Message(EVT, b"").packet_bytes() + 2  # a longer length field
    assert device.mqtt.publish(Message(EVT, bytes(limit - head + 1))) is Sent.TOO_LARGE
    assert device.mqtt.publish(Message(EVT, bytes(limit - head))) is Sent.QUEUED
    assert len(operator.expect(Received).payload) == limit - head, "the largest one passes"
    assert device.quiet() == [], "and nobody hung up"
    assert device.mqtt.counters.oversize_out == 1
    assert device.mqtt.counters.losses == 0


@pytest.mark.fault("F86")
def test_a_message_queued_before_the_limit_was_known_is_dropped_instead_of_sent_for_ever(
    shared_broker: Broker, make_client: MakeClient
) -> None:
    operator = make_client(shared_broker, "ota_operator", "edge/v1/edge/+/evt")
    operator.ready()
    device = make_client(shared_broker, "cam-1", start=False)
    assert device.mqtt.publish(Message(EVT, bytes(200_000), token="huge")) is Sent.QUEUED
    assert device.mqtt.publish(Message(EVT, b"small", token="small")) is Sent.QUEUED
    device.mqtt.start()
    refused = device.expect(Acknowledged)
    assert (refused.token, refused.code) == ("huge", 0x95)
    assert operator.expect(Received).payload == b"small"
    assert device.expect(Acknowledged).code == 0
    assert device.mqtt.counters.connections == 1
    assert device.mqtt.waiting() == 0


def test_a_message_of_a_thousand_user_properties_is_dropped_and_counted(
    shared_broker: Broker, make_client: MakeClient
) -> None:
    device = make_client(shared_broker, "cam-1", "edge/v1/edge/cam-1/cmd")
    operator = make_client(shared_broker, "ota_operator")
    device.ready()
    operator.ready()
    command = "edge/v1/edge/cam-1/cmd"
    operator.mqtt.publish(Message(command, b"heavy", user=(("", ""),) * 1000))
    operator.mqtt.publish(Message(command, b"light", user=(("status", "ok"),) * 2))
    assert device.expect(Received, 60.0).payload == b"light"
    assert device.mqtt.counters.malformed == 1


@pytest.mark.fault("F22")
def test_a_packet_above_our_own_limit_is_never_buffered(server_identity: Identity, make_client: MakeClient) -> None:
    # a PUBLISH that announces 200 MB
    announcement = bytes([0x30]) + bytes([0x80, 0xA0, 0xAF, 0x5F])
    with Impostor(server_identity, [CONNACK + announcement + bytes(60_000)]) as impostor:
        client = make_client(("127.0.0.1", impostor.port), "cam-1")
        client.ready()
        lost = client.expect(Lost)
        assert lost.error.reason is Reason.BROKER_LOST
        assert client.mqtt.counters.oversize_in == 1
        assert client.mqtt.counters.in_bytes < 100


def test_the_outbox_is_bounded_while_there_is_no_broker(make_client: MakeClient) -> None:
    limits = Limits(outbox_messages=10, outbox_bytes=100_000)
    client = make_client(("127.0.0.1", 1), "cam-1", limits=limits)
    results = [client.mqtt.publish(Message(EVT, bytes(1000))) for _ in range(30)]
    assert results == [Sent.QUEUED] * 8 + [Sent.QUEUE_FULL] * 22
    assert client.mqtt.publish(Message(EVT, b"x", qos=0)) is Sent.OFFLINE
    assert client.mqtt.counters.queue_full == 22


@pytest.mark.fault("F87")
def test_an_exception_in_what_a_callback_calls_costs_the_connection_and_not_the_thread(
    shared_broker: Broker, make_client: MakeClient
) -> None:
    calls = threading.Event()

    def wake() -> None:
        if not calls.is_set():
            calls.set()
            raise ZeroDivisionError("a bug in the consumer")

    client = make_client(shared_broker, "cam-1", "edge/v1/edge/cam-1/cmd", wake=wake)
    lost = client.expect(Lost)
    assert lost.error.reason is Reason.BROKER_LOST
    assert "ZeroDivisionError" in lost.error.message
    assert client.ready().number == 2
    assert client.mqtt.alive
    assert client.mqtt.counters.faults == 1
    operator = make_client(shared_broker, "ota_operator")
    operator.ready()
    operator.mqtt.publish(Message("edge/v1/edge/cam-1/cmd", b"still listening"))
    assert client.expect(Received).payload == b"still listening"


@pytest.mark.fault("F87")
@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(bytes([0x30, 5, 0, 2, 0xFF, 0xFE, 0]), id="topic that is not UTF-8"),
        pytest.param(bytes([0x30, 1, 0]), id="publish cut short"),
        pytest.param(bytes([0x30, 4, 0, 1, 0x61, 0x7F]), id="properties longer than the packet"),
        pytest.param(bytes([0x30, 5, 0, 1, 0x61, 1, 0x63]), id="unknown property"),
        pytest.param(bytes([0x90, 2, 0, 1]), id="suback nobody waits for"),
        pytest.param(bytes([0x40, 2, 0xFF, 0xFF]), id="puback nobody waits for"),
        pytest.param(bytes([0xE0, 1, 0x42]), id="disconnect with an unknown reason"),
        pytest.param(bytes([0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01]), id="length of five bytes"),
        pytest.param(bytes([0x00, 0x00]), id="reserved packet type"),
        pytest.param(CONNACK, id="second connack"),
    ],
)
def test_a_broker_that_sends_nonsense_does_not_end_the_thread(
    hostile: bytes, server_identity: Identity, make_client: MakeClient
) -> None:
    with Impostor(server_identity, [CONNACK + hostile], hold=False) as impostor:
        client = make_client(("127.0.0.1", impostor.port), "cam-1", "some/filter")
        client.expect(Connected, where=lambda event: event.number == 1)
        assert client.expect(Lost).error.reason is Reason.BROKER_LOST
        client.expect(Connected, where=lambda event: event.number >= 2)
        assert client.mqtt.alive
        assert not any(isinstance(event, Received) for event in client.quiet(0.1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_is_noticed_and_replaced(shared_broker: Broker, make_client: MakeClient) -> None:
    died = threading.Event()

    def wake() -> None:
        if not died.is_set():
            died.set()
            raise SystemExit  # no Exception: nothing in the thread may catch it

    client = make_client(shared_broker, "cam-1", wake=wake)
    client.ready()
    deadline = time.monotonic() + 60
    while client.mqtt.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not client.mqtt.alive
    assert not client.mqtt.connected
    client.mqtt.start()
    client.ready()
    assert client.mqtt.alive


def test_a_server_that_speaks_tls_but_not_mqtt_is_given_up_after_the_time_out(
    server_identity: Identity, make_client: MakeClient
) -> None:
    with Impostor(server_identity) as impostor:
        client = make_client(("127.0.0.1", impostor.port), "cam-1", limits=Limits(connect_timeout_s=0.5))
        lost = client.expect(Lost, timeout_s=60)
        assert lost.error.reason is Reason.BROKER_UNREACHABLE
        assert "CONNECT" in lost.error.message


def test_a_broker_that_refuses_says_why(server_identity: Identity, make_client: MakeClient) -> None:
    # MQTT 5.0, 3.2.2.2: 0x97 quota exceeded
    with Impostor(server_identity, [bytes([0x20, 3, 0, 0x97, 0])]) as impostor:
        lost = make_client(("127.0.0.1", impostor.port), "cam-1").expect(Lost)
        assert lost.error.reason is Reason.BROKER_REFUSED
        assert "0x97" in lost.error.message


def test_messages_in_flight_respect_the_brokers_receive_maximum(
    server_identity: Identity, make_client: MakeClient
) -> None:
    # receive maximum (0x21) = 2
    connack = bytes([0x20, 6, 0, 0, 3, 0x21, 0, 2])
    with Impostor(server_identity, [connack]) as impostor:
        client = make_client(("127.0.0.1", impostor.port), "cam-1", start=False)
        for number in range(6):
            client.mqtt.publish(Message("t", b"message %d" % number))
        client.mqtt.start()
        client.ready()
        client.quiet(0.3)
        assert impostor.heard[0].count(b"message ") == 2
        assert client.mqtt.waiting() == 6


class Relay:
    """Stands between a client and its broker, and reads nothing more of the client once `blocked`."""

    def __init__(self, broker: Broker) -> None:
        self.blocked = threading.Event()
        self._broker = broker
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection((self._broker.host, self._broker.port))
        self._sockets += [near, far]
        threading.Thread(target=self._pass_on, args=(far, near, threading.Event()), daemon=True).start()
        self._pass_on(near, far, self.blocked)

    def _pass_on(self, source: socket.socket, sink: socket.socket, blocked: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while select.select([source], [], [], 600) and not blocked.is_set() and (data := source.recv(4096)):
                sink.sendall(data)


def _handed_over(client: Client) -> int:
    return client.mqtt.counters.by_purpose.get("other", [0, 0])[1]


def test_what_a_slow_way_has_not_taken_yet_stays_where_a_request_overtakes_it(
    shared_broker: Broker, make_client: MakeClient
) -> None:
    relay = Relay(shared_broker)
    try:
        device = make_client((shared_broker.host, relay.port), "cam-1")
        device.ready()
        relay.blocked.set()
        for _ in range(20):
            assert device.mqtt.publish(Message(EVT, bytes(48_000))) is Sent.QUEUED
        deadline, left = time.monotonic() + 60, 0
        # until something has left our queue, and then for as long as more does
        while time.monotonic() < deadline and (not left or _handed_over(device) > left):
            left = _handed_over(device)
            time.sleep(0.5)
        assert 0 < left < 320_000, "of 960 kB"
    finally:
        relay.close()


def test_nagle_is_off(shared_broker: Broker, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[tuple[int, int, object]] = []
    original = socket.socket.setsockopt

    def record(sock: socket.socket, level: int, option: int, value: object) -> None:
        options.append((level, option, value))
        original(sock, level, option, value)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "setsockopt", record)
    make_client(shared_broker, "cam-1").expect(Connected)
    assert (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) in options


def test_every_byte_is_counted_under_its_purpose(shared_broker: Broker, make_client: MakeClient) -> None:
    operator = make_client(shared_broker, "ota_operator", "edge/v1/edge/+/evt", purpose=lambda topic: "telemetry")
    device = make_client(shared_broker, "cam-1")
    operator.ready()
    device.ready()
    message = Message(
        EVT, bytes(5000), expiry_s=60, correlation=b"12345", user=(("a", "1"), ("key", "ü")), purpose="x", token="t"
    )
    base_out, base_in = device.mqtt.counters.out_bytes, operator.mqtt.counters.in_bytes
    device.mqtt.publish(message)
    device.expect(Acknowledged)
    operator.expect(Received)
    time.sleep(0.05)
    assert device.mqtt.counters.by_purpose["x"] == [0, message.packet_bytes()]
    assert device.mqtt.counters.out_bytes - base_out == message.packet_bytes()
    arrived = operator.mqtt.counters.by_purpose["telemetry"][0]
    assert arrived == message.packet_bytes()
    assert operator.mqtt.counters.in_bytes - base_in == arrived


def test_closing_sends_what_waits(shared_broker: Broker, make_client: MakeClient) -> None:
    operator = make_client(shared_broker, "ota_operator", "edge/v1/edge/+/evt")
    operator.ready()
    device = make_client(shared_broker, "cam-1")
    device.ready()
    for number in range(100):
        device.mqtt.publish(Message(EVT, b"%d" % number))
    device.mqtt.close(5)
    assert device.mqtt.publish(Message(EVT, b"late")) is Sent.CLOSED
    assert [operator.expect(Received).payload for _ in range(100)] == [b"%d" % n for n in range(100)]
    assert not device.mqtt.running


@pytest.mark.parametrize("topic", ["", "a/+/b", "#", "a\0b"])
def test_a_topic_that_cannot_be_published_on_is_the_callers_mistake(topic: str, make_client: MakeClient) -> None:
    client = make_client(("127.0.0.1", 1), "cam-1", start=False)
    with pytest.raises(ValueError, match="no topic"):
        client.mqtt.publish(Message(topic, b"x"))
