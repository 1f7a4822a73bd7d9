"""What an MQTT client is told, and what it counts: values without behaviour, and without paho."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from ota.brokertls import Tls


@dataclass(frozen=True, slots=True)
class Subscription:
    """A topic filter. `retained` asks for the retained messages at every subscribing, else none are sent."""

    filter: str
    qos: int = 1
    retained: bool = False


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained, `delay_s` after this client vanished without a word."""

    topic: str
    payload: bytes
    delay_s: int = 10


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one client.

    Attributes:
        keepalive_s: silence after which the broker is asked whether it is there; lost after as much again.
        connect_timeout_s: for TCP, for TLS and for the broker's answer, each.
        max_packet_bytes: largest packet accepted from the broker.
        user_properties: of one message; one with more is dropped, because each costs twenty times its bytes.
        outbox_messages, outbox_bytes: messages that wait to be sent or acknowledged; history fills three quarters.
        unsent_bytes: what the kernel holds of them, where nothing overtakes any more; 0 leaves that to the kernel.
        in_flight: messages of QoS 1 sent and not yet acknowledged; the broker may lower it.
        stall_s: without a turn of its loop for this long, the network thread counts as dead.
    """

    keepalive_s: int = 60
    connect_timeout_s: float = 10.0
    max_packet_bytes: int = 256 * 1024
    user_properties: int = 16
    outbox_messages: int = 256
    outbox_bytes: int = 4 * 1024 * 1024
    unsent_bytes: int = 32 * 1024
    in_flight: int = 20
    stall_s: float = 90.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Which broker, as whom, and what to hear.

    Attributes:
        session_expiry_s: how long the broker keeps subscriptions and queued messages for us; 0 starts clean.
        will: makes the will of connection `number`, in the network thread; None for no will.
        purpose: name under which an incoming topic's bytes are counted.
    """

    host: str
    port: int
    tls: Tls
    client_id: str
    subscriptions: tuple[Subscription, ...] = ()
    session_expiry_s: int = 0
    will: Callable[[int], Will] | None = None
    purpose: Callable[[str], str] = field(default=lambda topic: "other")
    limits: Limits = Limits()


@dataclass(slots=True)
class Counters:
    """What happened since the start; every number only grows.

    `in_bytes` and `out_bytes` are all bytes above TLS; `by_purpose` splits the messages among them as [in, out], the
    rest is the protocol's own: connects, acknowledgements, pings.
    """

    connections: int = 0
    losses: int = 0
    takeovers: int = 0
    faults: int = 0
    malformed: int = 0
    oversize_out: int = 0
    oversize_in: int = 0
    refused: int = 0
    refused_subscriptions: int = 0
    queue_full: int = 0
    dropped_at_once: int = 0
    in_bytes: int = 0
    out_bytes: int = 0
    by_purpose: dict[str, list[int]] = field(default_factory=dict)

    def plus(self, other: Counters) -> Counters:
        """The sum of two clients' counters, as a new value."""
        total = Counters()
        for one in (self, other):
            for item in fields(one):
                if item.name != "by_purpose":
                    setattr(total, item.name, getattr(total, item.name) + getattr(one, item.name))
            for purpose, (received, sent) in list(one.by_purpose.items()):
                total.count(purpose, received=received, sent=sent)
        return total

    def count(self, purpose: str, *, received: int = 0, sent: int = 0) -> None:
        """Add bytes to a purpose."""
        pair = self.by_purpose.setdefault(purpose, [0, 0])
        pair[0] += received
        pair[1] += sent
