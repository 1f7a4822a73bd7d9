"""One connection to a broker: a paho client, its socket and its loop, from CONNECT to the end.

The only module that imports paho. paho is driven through its interface for external event loops, by one thread; a
client serves one connection and is thrown away with it, so that no state survives. Callbacks note and enqueue.
It is not what decides when to connect again: that is `ota.mqtt`.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from ota.brokertls import Guard, GuardedSocket, client_context, closed_early, connect_failure, guard_socket
from ota.deferred import deferred
from ota.errors import BrokerError, Reason
from ota.mailbox import Acknowledged, Connected, Event, Message, Outbox, Received, Subscribed, publish_bytes
from ota.mqttsettings import Counters, Settings

# proxies through PySocks and random client ids: no use of ours; the first brings http.client and email
with deferred("urllib.request", "uuid"):
    import paho.mqtt.client as paho

# MQTT 5.0, 2.4 reason codes
SESSION_TAKEN_OVER = 0x8E
PACKET_TOO_LARGE = 0x95
# MQTT 5.0, 2.1.4: the largest packet the length field can express; the limit of a broker that names none.
LARGEST_PACKET_BYTES = 268_435_460
_RETAINED_NEVER = 2
_MOST_LEFT = 64


class Owner(Protocol):
    """What a connection needs from the client that made it."""

    def wait(self, file: int, want_write: bool, timeout_s: float) -> tuple[bool, bool]:
        """Wait for the socket or a wake-up; returns whether the socket can be read and written."""
        ...

    def deliver(self, event: Event) -> None:
        """Take an event; must not raise."""
        ...

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def closing_at(self) -> float | None:
        """When the connection must be over at the latest; None while nobody wants to close it."""
        ...


class Connection:
    """Connection `number` of a client; `run` it once, then `abandon` it."""

    def __init__(self, settings: Settings, number: int, outbox: Outbox, counters: Counters, owner: Owner) -> None:
        self._settings = settings
        self._number = number
        self._outbox = outbox
        self._counters = counters
        self._owner = owner
        self._guard = Guard(settings.limits.max_packet_bytes, settings.limits.unsent_bytes)
        self._client: paho.Client | None = None
        self._end: BrokerError | None = None
        self._accepted: Connected | None = None
        self._in_flight = settings.limits.in_flight
        self._leaving = False
        self._answer_by_s = 0.0
        self._exact = frozenset(s.filter for s in settings.subscriptions)
        # whoever asks with wildcards hears topics that it cannot name
        self._tidies = settings.session_expiry_s > 0 and not any(set(f) & {"+", "#"} for f in self._exact)
        self._left: set[str] = set()

    def run(self) -> BrokerError:
        """Connect and serve until the connection ends; returns why it ended.

        Raises:
            BrokerError: there never was a connection.
        """
        settings = self._settings
        client = self._client = self._make_client()
        properties = _properties(PacketTypes.CONNECT)
        properties.MaximumPacketSize = settings.limits.max_packet_bytes
        properties.ReceiveMaximum = settings.limits.in_flight
        if settings.session_expiry_s:
            properties.SessionExpiryInterval = settings.session_expiry_s
        try:
            client.connect(
                _name(settings.host),
                settings.port,
                settings.limits.keepalive_s,
                clean_start=not settings.session_expiry_s,
                properties=properties,
            )
        except OSError as e:
            raise connect_failure(e, settings.host, settings.port) from e
        self._answer_by_s = self._owner.now() + settings.limits.connect_timeout_s
        while self._end is None:
            if self._accepted is None and self._owner.now() >= self._answer_by_s:
                return self._silent()
            self._turn(client)
        return self._end

    def abandon(self) -> None:
        """Close the socket without a word and book its bytes."""
        client, self._client = self._client, None
        if client is not None:
            sock = client.socket()
            if sock is not None:
                sock.close()
        self._book()

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _turn(self, client: paho.Client) -> None:
        """One turn: wait, read, write, subscribe, publish, keep alive."""
        sock = client.socket()
        if sock is None:
            self._end = self._end or self._dropped()
            return
        # bytes that TLS has already decrypted do not make the socket readable
        pending = isinstance(sock, GuardedSocket) and sock.pending() > 0
        readable, writable = self._owner.wait(
            sock.fileno(), client.want_write(), 0.0 if pending else self._patience_s()
        )
        was_accepted = self._accepted is not None
        if readable or pending:
            client.loop_read()
        if writable:
            client.loop_write()
        if self._accepted is not None and not was_accepted:
            self._begin(client, self._accepted)
        if self._accepted is not None:
            self._feed(client)
        client.loop_misc()
        self._leave(client)
        self._book()

    def _patience_s(self) -> float:
        """How long the loop may sleep: until the next thing that is due, and often enough to keep alive."""
        due_s = [min(5.0, self._settings.limits.keepalive_s / 4)]
        closing_s = self._owner.closing_at()
        if closing_s is not None:
            due_s.append(closing_s - self._owner.now())
        if self._accepted is None:
            due_s.append(self._answer_by_s - self._owner.now())
        return max(0.0, min(due_s))

    def _begin(self, client: paho.Client, connected: Connected) -> None:
        """Subscribe, then tell the owner: whatever it publishes now goes out after the subscriptions."""
        filters = [
            (s.filter, SubscribeOptions(qos=s.qos, retainHandling=0 if s.retained else _RETAINED_NEVER))
            for s in self._settings.subscriptions
        ]
        if filters:
            client.subscribe(filters)
        self._owner.deliver(connected)

    def _feed(self, client: paho.Client) -> None:
        """Publish while the socket takes it; what it does not take stays in our own, bounded queue."""
        while self._end is None and not self._leaving and not client.want_write():
            message = self._outbox.next(self._in_flight)
            if message is None:
                return
            self._publish(client, message)

    def _publish(self, client: paho.Client, message: Message) -> None:
        size = message.packet_bytes()
        if self._accepted is None or size > self._accepted.max_packet_bytes:
            # it was queued while the limit was unknown, or under a broker with a larger one
            self._counters.oversize_out += 1
            if message.qos:
                self._outbox.discard(message)
            if message.token:
                self._owner.deliver(Acknowledged(message.token, PACKET_TOO_LARGE))
            return
        properties = _properties(PacketTypes.PUBLISH)
        if message.expiry_s is not None:
            properties.MessageExpiryInterval = message.expiry_s
        if message.correlation is not None:
            properties.CorrelationData = message.correlation
        if message.user:
            properties.UserProperty = list(message.user)
        info = client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        self._book()
        if info.rc == paho.MQTT_ERR_QUEUE_SIZE:
            # packet ids have gone round and met one that is still unanswered
            raise BrokerError(Reason.BROKER_LOST, "the broker leaves messages unacknowledged", retry=True)
        if message.qos:
            self._outbox.sent(info.mid, message)
        self._counters.count(message.purpose, sent=size)

    def _leave(self, client: paho.Client) -> None:
        closing_s = self._owner.closing_at()
        if closing_s is None:
            return
        late = self._owner.now() >= closing_s
        if late and (self._leaving or self._accepted is None):
            self._end = BrokerError(Reason.BROKER_LOST, "closed")
        elif not self._leaving and self._accepted is not None and (late or not len(self._outbox)):
            self._leaving = True
            client.disconnect()

    def _book(self) -> None:
        guard = self._guard
        self._counters.in_bytes += guard.received_bytes
        self._counters.out_bytes += guard.sent_bytes
        self._counters.oversize_in += guard.oversize
        guard.received_bytes = guard.sent_bytes = guard.oversize = 0

    # --- paho's callbacks --------------------------------------------------------------------------------------------

    def _make_client(self) -> paho.Client:
        settings = self._settings
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
        )
        client.connect_timeout = settings.limits.connect_timeout_s
        client.max_inflight_messages_set(settings.limits.in_flight)
        client.tls_set_context(client_context(settings.tls))
        if settings.will is not None:
            will = settings.will(self._number)
            properties = _properties(PacketTypes.WILLMESSAGE)
            properties.WillDelayInterval = will.delay_s
            client.will_set(will.topic, will.payload, qos=1, retain=True, properties=properties)
        client.on_socket_open = lambda _client, _data, sock: guard_socket(sock, self._guard)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    def _on_connect(
        self, client: paho.Client, data: Any, flags: paho.ConnectFlags, code: ReasonCode, properties: Properties | None
    ) -> None:
        if code.is_failure:
            self._end = BrokerError(
                Reason.BROKER_REFUSED,
                f"{self._settings.host}:{self._settings.port}: the broker refuses: {code.getName()} ({code.value:#x})",
                hint="is this device enrolled with this broker?",
                retry=True,
            )
            return
        largest = getattr(properties, "MaximumPacketSize", LARGEST_PACKET_BYTES)
        self._in_flight = min(self._in_flight, getattr(properties, "ReceiveMaximum", 65535))
        self._accepted = Connected(self._number, flags.session_present, largest)

    def _on_disconnect(
        self,
        client: paho.Client,
        data: Any,
        flags: paho.DisconnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if self._end is not None:
            return
        if not flags.is_disconnect_packet_from_server:
            self._end = self._dropped()
        elif code.value == SESSION_TAKEN_OVER:
            self._end = BrokerError(
                Reason.SESSION_TAKEN_OVER,
                f"another client connected as {self._settings.client_id}",
                hint="is the same identity installed on two devices? If it was stolen, revoke its certificate",
                retry=True,
            )
        else:
            self._end = BrokerError(
                Reason.BROKER_LOST, f"the broker ended the connection: {code.getName()} ({code.value:#x})", retry=True
            )

    def _on_subscribe(
        self, client: paho.Client, data: Any, mid: int, codes: list[ReasonCode], properties: Properties | None
    ) -> None:
        refused = sum(code.is_failure for code in codes)
        self._counters.refused_subscriptions += refused
        self._owner.deliver(Subscribed(self._number, refused))

    def _on_message(self, client: paho.Client, data: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self._counters.malformed += 1
            return
        properties = message.properties
        correlation = getattr(properties, "CorrelationData", None)
        user = tuple(getattr(properties, "UserProperty", ()))
        payload = bytes(message.payload)
        self._book()
        if self._tidies and topic not in self._exact:
            self._leave_topic(client, topic)
        if len(user) > self._settings.limits.user_properties:
            self._counters.malformed += 1
            return
        expiry_s = getattr(properties, "MessageExpiryInterval", None)
        size = publish_bytes(topic, len(payload), message.qos, expiry_s, correlation, user)
        self._owner.deliver(Received(topic, payload, message.qos, message.retain, correlation, user, size))

    def _leave_topic(self, client: paho.Client, topic: str) -> None:
        """A session outlives the settings: what an earlier one subscribed to is paid for until somebody ends it."""
        if topic and len(self._left) < _MOST_LEFT and topic not in self._left and not set(topic) & {"+", "#"}:
            self._left.add(topic)
            client.unsubscribe(topic)

    def _on_publish(
        self, client: paho.Client, data: Any, mid: int, code: ReasonCode, properties: Properties | None
    ) -> None:
        message = self._outbox.settled(mid)
        if message is None:
            return
        self._counters.refused += code.is_failure
        if message.token:
            self._owner.deliver(Acknowledged(message.token, code.value))

    # --- how it ended ------------------------------------------------------------------------------------------------

    def _dropped(self) -> BrokerError:
        """The connection ended without a reason code."""
        if self._accepted is None:
            return closed_early(self._guard.error, self._settings.host, self._settings.port)
        cause = f": {self._guard.error}" if self._guard.error is not None else ""
        return BrokerError(Reason.BROKER_LOST, f"the connection to the broker ended{cause}", retry=True)

    def _silent(self) -> BrokerError:
        where = f"{self._settings.host}:{self._settings.port}"
        return BrokerError(
            Reason.BROKER_UNREACHABLE,
            f"{where}: TLS is up but nobody answers CONNECT",
            hint="is this an MQTT 5 broker?",
            retry=True,
        )


def _name(host: str) -> str:
    """`host` as socket and ssl take it without a codec for names in other scripts: 0.4 MB of tables. They take bytes as
    well as text; that paho declares text alone says nothing of what it hands on."""
    return cast(str, host.encode("ascii")) if host.isascii() else host


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]
