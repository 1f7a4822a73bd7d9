"""Messages to and from a broker, and the two bounded queues they wait in.

No network and no paho in here. The inbox is filled by the network thread and emptied by whoever consumes; the outbox
the other way round. Invariants: both are bounded in messages and bytes; what does not fit is counted; a message of
QoS 1 leaves the outbox only when the broker has acknowledged it.
"""

from __future__ import annotations

import collections
import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ota.errors import BrokerError

Properties = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Message:
    """Something to publish.

    Attributes:
        qos: 0 is sent at once or not at all; 1 waits for the connection and is repeated until acknowledged.
        retain: state rather than history: a newer one for the same topic replaces one still waiting.
        expiry_s: seconds after which the broker throws it away undelivered; None keeps it.
        correlation, user: MQTT 5 correlation data and user properties.
        purpose: under which name its bytes are counted.
        token: not empty to be told by `Acknowledged`; QoS 1 only.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    expiry_s: int | None = None
    correlation: bytes | None = None
    user: Properties = ()
    purpose: str = "other"
    token: str = ""

    def packet_bytes(self) -> int:
        """Length of the PUBLISH packet (MQTT 5, 3.3) that carries this message."""
        return publish_bytes(self.topic, len(self.payload), self.qos, self.expiry_s, self.correlation, self.user)


@dataclass(frozen=True, slots=True)
class Received:
    """A message from the broker. `packet_bytes` is the length of the packet that carried it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    correlation: bytes | None
    user: Properties
    packet_bytes: int


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted connection `number` (counted from 1) and the subscriptions are on their way.

    `max_packet_bytes` is the largest packet this broker takes.
    """

    number: int
    session_present: bool
    max_packet_bytes: int


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The broker has taken note of the subscriptions of connection `number`, and refused `refused` of them.

    From now on what is published is delivered, as far as the ACL allows: brokers grant what they will not deliver.
    """

    number: int
    refused: int


@dataclass(frozen=True, slots=True)
class Lost:
    """An attempt failed or a connection ended; the next attempt starts after `retry_in_s`."""

    number: int
    error: BrokerError
    retry_in_s: float


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The broker took (`code` below 128) or refused the message with `token`."""

    token: str
    code: int


Event = Connected | Subscribed | Lost | Received | Acknowledged


class Sent(enum.Enum):
    """What became of a message handed in for publishing; only `QUEUED` may still arrive."""

    QUEUED = "queued"
    TOO_LARGE = "too_large"
    QUEUE_FULL = "queue_full"
    OFFLINE = "offline"
    CLOSED = "closed"


def publish_bytes(
    topic: str,
    payload_bytes: int,
    qos: int,
    expiry_s: int | None = None,
    correlation: bytes | None = None,
    user: Properties = (),
) -> int:
    """Length in bytes of a PUBLISH packet with these fields (MQTT 5.0, 2.2 and 3.3)."""
    properties = 0 if expiry_s is None else 5
    properties += 0 if correlation is None else 3 + len(correlation)
    properties += sum(5 + len(key.encode()) + len(value.encode()) for key, value in user)
    body = 2 + len(topic.encode()) + (2 if qos else 0) + _varint_bytes(properties) + properties + payload_bytes
    return 1 + _varint_bytes(body) + body


def _varint_bytes(value: int) -> int:
    return 1 if value < 128 else 2 if value < 16_384 else 3 if value < 2_097_152 else 4


class Inbox:
    """Events in order of arrival, for one consumer in any thread.

    Messages beyond `limit_messages` or `limit_bytes` are dropped, newest first, and counted: the consumer is behind,
    and what waits longest is answered first. Connection events are always kept; the newest of each kind is enough.

    Args:
        limit_messages: messages that may wait.
        limit_bytes: bytes of their packets: topic and properties take memory as payload does.
        wake: called in the network thread after every event; must return at once and not raise.
    """

    def __init__(
        self, limit_messages: int = 256, limit_bytes: int = 8 * 1024 * 1024, wake: Callable[[], None] | None = None
    ) -> None:
        self._limit_messages = limit_messages
        self._limit_bytes = limit_bytes
        self._wake = wake
        self._events: collections.deque[Event] = collections.deque()
        self._messages = 0
        self._bytes = 0
        self._ready = threading.Condition()
        self.dropped = 0

    def put(self, event: Event) -> None:
        """Append `event`, or count it as dropped."""
        with self._ready:
            if isinstance(event, Received):
                full = self._bytes + event.packet_bytes > self._limit_bytes
                if self._messages >= self._limit_messages or full:
                    self.dropped += 1
                    return
                self._messages += 1
                self._bytes += event.packet_bytes
            elif len(self._events) >= 2 * self._limit_messages:
                self._forget_oldest_notice()
            self._events.append(event)
            self._ready.notify()
        if self._wake is not None:
            self._wake()

    def get(self, timeout_s: float) -> Event | None:
        """The oldest event, waiting up to `timeout_s` for one."""
        with self._ready:
            if not self._events:
                self._ready.wait(timeout_s)
            return self._take() if self._events else None

    def drain(self) -> list[Event]:
        """All waiting events, without waiting."""
        with self._ready:
            return [self._take() for _ in range(len(self._events))]

    def _take(self) -> Event:
        event = self._events.popleft()
        if isinstance(event, Received):
            self._messages -= 1
            self._bytes -= event.packet_bytes
        return event

    def _forget_oldest_notice(self) -> None:
        for index, event in enumerate(self._events):
            if not isinstance(event, Received):
                del self._events[index]
                self.dropped += 1
                return


class Outbox:
    """Messages waiting for the broker or for its acknowledgement.

    QoS 0 overtakes QoS 1 (requests and blocks are not held up by telemetry) and is dropped with the connection.
    When full, new messages are refused rather than old ones dropped: only the caller knows which of its messages
    matter least. The last quarter is kept for QoS 0 and retained state: history that leaves slowly must not keep a
    device from asking for blocks, or from saying that it is there. Safe to use from several threads.
    """

    def __init__(self, limit_messages: int, limit_bytes: int) -> None:
        self._limit_messages = limit_messages
        self._limit_bytes = limit_bytes
        self._at_once: collections.deque[Message] = collections.deque()
        self._waiting: collections.deque[Message] = collections.deque()
        self._in_flight: dict[int, Message] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, message: Message) -> bool:
        """Append `message`; False when it does not fit."""
        size = len(message.payload)
        with self._lock:
            if message.retain:
                self._forget_superseded(message.topic)
            count = len(self._at_once) + len(self._waiting) + len(self._in_flight)
            messages, most = self._limit_messages, self._limit_bytes
            if message.qos and not message.retain:
                messages, most = messages - messages // 4, most - most // 4
            if count >= messages or self._bytes + size > most:
                return False
            self._bytes += size
            (self._waiting if message.qos else self._at_once).append(message)
            return True

    def next(self, max_in_flight: int) -> Message | None:
        """The next message for the network; of QoS 1 only while fewer than `max_in_flight` are unacknowledged."""
        with self._lock:
            if self._at_once:
                message = self._at_once.popleft()
                self._bytes -= len(message.payload)
                return message
            if self._waiting and len(self._in_flight) < max_in_flight:
                return self._waiting.popleft()
            return None

    def sent(self, packet_id: int, message: Message) -> None:
        """`message` of QoS 1 went out under `packet_id` and waits for its acknowledgement."""
        with self._lock:
            self._in_flight[packet_id] = message

    def settled(self, packet_id: int) -> Message | None:
        """The broker answered for `packet_id`; returns the message unless the id is unknown."""
        with self._lock:
            message = self._in_flight.pop(packet_id, None)
            if message is not None:
                self._bytes -= len(message.payload)
            return message

    def discard(self, message: Message) -> None:
        """`message` of QoS 1, taken by `next`, will not be sent after all."""
        with self._lock:
            self._bytes -= len(message.payload)

    def connection_lost(self) -> int:
        """Put unacknowledged messages back in front; returns how many of QoS 0 were dropped."""
        with self._lock:
            self._waiting.extendleft(reversed(self._in_flight.values()))
            self._in_flight.clear()
            lost = len(self._at_once)
            self._at_once.clear()
            # counted anew: a message may have been taken by `next` when the connection broke
            self._bytes = sum(len(message.payload) for message in self._waiting)
            return lost

    def take_all(self) -> list[Message]:
        """Empty it: the messages of QoS 1 that nobody has acknowledged, in order. For a client that has ended."""
        with self._lock:
            left = [*self._in_flight.values(), *self._waiting]
            self._in_flight.clear()
            self._waiting.clear()
            self._at_once.clear()
            self._bytes = 0
            return left

    def __len__(self) -> int:
        with self._lock:
            return len(self._at_once) + len(self._waiting) + len(self._in_flight)

    def _forget_superseded(self, topic: str) -> None:
        for queue in (self._at_once, self._waiting):
            for index, message in enumerate(queue):
                if message.retain and message.topic == topic:
                    self._bytes -= len(message.payload)
                    del queue[index]
                    return
