"""What the daemon says and hears over the broker.

Retained `status` with a will, retained `reported`, telemetry batches, requests for blocks; commands and hints in. The
connection itself is `ota.mqtt`'s. Invariants: everything that arrives is a wish or a byte to be verified, never an
order to install; a message that cannot be read is answered or counted, and costs the loop nothing else; the uplink's
trouble is a condition that `status` shows, never the end of the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.daemon import commands
from agent.daemon.commands import Command, Gate, Hint, Refusal
from agent.daemon.seen import Seen
from agent.daemon.telemetry import Batch, Telemetry
from agent.daemon.topics import INPUT, Topics
from agent.daemon.uplink import Uplink
from agent.errors import AgentError
from ota.client.transports.mqtt import MqttTransport
from ota.errors import BrokerError, OtaError
from ota.mqtt import (
    Connected,
    Event,
    Limits,
    Lost,
    Message,
    Received,
    ReconnectPolicy,
    Sent,
    Settings,
    Subscribed,
    Subscription,
    Tls,
    Will,
)
from ota.pace import TokenBucket
from ota.strictjson import canonical

log = logging.getLogger(__name__)

_TELEMETRY_EXPIRY_S = 7 * 86_400
_REQUEST_EXPIRY_S = 30
_HINTS_PER_MINUTE = 6.0
_HINT_BURST = 3
_HELD_BACK_S = 60 / _HINTS_PER_MINUTE
_OVERHEAD = "keepalive"
_SHORT_LIVED_ALARM = 3


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Where the broker is, who we are, and how often to speak.

    Attributes:
        session_expiry_s: how long the broker keeps commands for us while we are away.
        flush_s: longest wait of telemetry before it is sent.
        will_delay_s: absence after which the broker says that we are gone.
    """

    host: str
    port: int
    topics: Topics
    tls: Tls
    session_expiry_s: int = 86_400
    flush_s: float = 1.0
    will_delay_s: int = 10
    limits: Limits = field(default_factory=Limits)
    reconnect: ReconnectPolicy = field(default_factory=ReconnectPolicy)


@dataclass(frozen=True, slots=True)
class Orders:
    """What the daemon does when asked; all return at once and leave the work to a task.

    `command` carries out an admitted command or raises AgentError or OtaError to refuse it; `hint` is told after how
    many seconds to check for updates; `sample` gets what was published for one of the device's inputs.
    """

    command: Callable[[Command], None]
    hint: Callable[[Hint, float], None]
    sample: Callable[[str, Received], None] = lambda name, message: None


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process of which boot speaks: with the connection's number it tells an old will from a new status."""

    boot_id: str
    instance: str


class Link:
    """The daemon's side of the connection. Everything but the network thread inside `ota.mqtt` runs in one event loop.

    Args:
        orders: what to do with commands and hints.
        telemetry: emptied once in `settings.flush_s` while connected; answers to commands go through it.
        clock: monotonic seconds. wall: Unix seconds.
        seen: remembers the commands that were carried out; in memory alone when None.
    """

    def __init__(
        self,
        settings: LinkSettings,
        identity: Identity,
        orders: Orders,
        telemetry: Telemetry,
        *,
        rng: random.Random,
        clock: Callable[[], float],
        wall: Callable[[], float],
        seen: Seen | None = None,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._orders = orders
        self._telemetry = telemetry
        self._rng = rng
        self._clock = clock
        self._wall = wall
        self._gate = Gate(seen=seen)
        self._hints = TokenBucket(_HINTS_PER_MINUTE / 60, _HINT_BURST)
        self._held_until_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived = asyncio.Event()
        self._mqtt = Uplink(
            self._mqtt_settings, settings.tls, policy=settings.reconnect, rng=rng, clock=clock, wake=self._wake
        )
        self._state = "starting"
        self._error: BrokerError | None = None
        self._since = wall()
        self._reported: bytes | None = None
        self._reported_sent = False
        self._revived = 0
        self._connected_at_s: float | None = None
        self._short_lived = 0
        self.ignored = 0
        self.transport = MqttTransport(self, clock=clock, first_rid=rng.getrandbits(32))

    # --- what the daemon uses ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the link up until cancelled; then say `offline` and close."""
        self._loop = asyncio.get_running_loop()
        self._mqtt.start()
        flush_at_s = self._clock()
        try:
            while True:
                self._arrived.clear()
                for event in self._mqtt.events():
                    self._handle(event)
                self._watch()
                if self._clock() >= flush_at_s:
                    flush_at_s = self._clock() + self._settings.flush_s
                    self._flush()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, flush_at_s - self._clock())):
                        await self._arrived.wait()
        finally:
            self._flush()
            self._say("offline", self._mqtt.number)
            await self._mqtt.close()
            self._enter("stopped", None)

    @property
    def connected(self) -> bool:
        """Whether messages can be sent now."""
        return self._mqtt.connected

    @property
    def tls(self) -> Tls:
        """The identity that the broker accepted last, or is shown next."""
        return self._mqtt.tls

    @property
    def alive(self) -> bool:
        """Whether the network thread does its work, connected or not; for the watchdog."""
        return self._mqtt.alive

    def report(self, document: Mapping[str, Any]) -> None:
        """Make `document` the retained `reported` state; sent when it changed and there is a connection."""
        encoded = canonical(document)
        if encoded != self._reported:
            self._reported = encoded
            self._reported_sent = False
            self._send_reported()

    def retry_now(self) -> None:
        """Connect without waiting for the end of the back-off."""
        self._mqtt.retry_now()

    async def try_tls(self, tls: Tls) -> BrokerError | None:
        """Go over to the identity `tls` if the broker accepts it on a second connection; else why it did not, and
        the link is as it was."""
        return await self._mqtt.try_tls(tls)

    def request(self, payload: bytes) -> bool:
        """Publish a request for a block (`ota.client.transports.mqtt.BlockLink`)."""
        return self._publish("blk/get", payload, qos=0, expiry_s=_REQUEST_EXPIRY_S)

    def status(self) -> dict[str, Any]:
        """The link as `edge-agent status` shows it: state, why, since when, bytes by purpose."""
        error = self._error
        return {
            "state": self._state,
            "broker": f"{self._settings.host}:{self._settings.port}",
            "since": self._since,
            "reason": None if error is None else error.reason.value,
            "message": "" if error is None else error.message,
            "hint": "" if error is None else error.hint,
            "waiting": self._mqtt.waiting(),
            "bytes": self.bytes_by_purpose(),
            "counts": self._counts(),
        }

    def bytes_by_purpose(self) -> dict[str, dict[str, int]]:
        """Bytes above TLS since the start, in and out, by purpose; what no message explains is `keepalive`."""
        counters = self._mqtt.counters
        flows = {purpose: {"in": pair[0], "out": pair[1]} for purpose, pair in list(counters.by_purpose.items())}
        explained_in = sum(flow["in"] for flow in flows.values())
        explained_out = sum(flow["out"] for flow in flows.values())
        # a message is counted when it is handed over, its bytes when they left
        flows[_OVERHEAD] = {
            "in": max(0, counters.in_bytes - explained_in),
            "out": max(0, counters.out_bytes - explained_out),
        }
        return flows

    # --- events ------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        if isinstance(event, Received):
            self._received(event)
        elif isinstance(event, Connected):
            self._enter("connecting", None)
            self._connected_at_s = self._clock()
            self._reported_sent = self._reported_sent and event.session_present
            self._send_reported()
            self.transport.reconnected()
        elif isinstance(event, Subscribed):
            # only now does `online` mean that commands arrive
            self._enter("connected", None)
            self._say("online", event.number)
        elif isinstance(event, Lost):
            self._lost(event)

    def _lost(self, event: Lost) -> None:
        self._enter("waiting", event.error)
        log.warning("link: %s; next attempt in %.1f s", event.error.message, event.retry_in_s)
        if self._connected_at_s is None:
            return
        lived_s, self._connected_at_s = self._clock() - self._connected_at_s, None
        self._short_lived = self._short_lived + 1 if lived_s < self._settings.reconnect.stable_s else 0
        if self._short_lived and self._short_lived % _SHORT_LIVED_ALARM == 0:
            # brokers that do not say "session taken over" just close the older of two connections
            facts = {
                "reason": event.error.reason.value,
                "message": f"{self._short_lived} connections in a row ended early: {event.error.message}",
                "hint": "another device may use this identity; if it was stolen, revoke its certificate",
            }
            self._telemetry.event("alarm", facts, alarm=True)

    def _received(self, message: Received) -> None:
        suffix = self._settings.topics.suffix(message.topic)
        if suffix == "blk/data":
            self.transport.received(message.correlation, message.user, message.payload)
        elif suffix == "cmd":
            self._command(message)
        elif suffix == "hint":
            self._hint(message)
        elif suffix is not None and suffix.startswith(INPUT):
            self._orders.sample(suffix.removeprefix(INPUT), message)
        else:
            self.ignored += 1

    def _command(self, message: Received) -> None:
        admitted = self._gate.admit(message.payload, retained=message.retain, wall_s=self._wall(), now_s=self._clock())
        if admitted is None:
            return
        if isinstance(admitted, Refusal):
            self._answer(admitted.id, "refused", admitted.reason.value, admitted.message)
            return
        try:
            self._orders.command(admitted)
        except (AgentError, OtaError) as e:
            self._answer(admitted.id, "refused", e.reason.value, e.message)
        else:
            self._answer(admitted.id, "accepted", None, "")

    def _answer(self, number: str, state: str, reason: str | None, message: str) -> None:
        facts = {"id": number, "state": state, "reason": reason, "message": message}
        self._telemetry.event("command", facts)

    def _hint(self, message: Received) -> None:
        hint = None if message.retain else commands.parse_hint(message.payload)
        if hint is None:
            self.ignored += 1
            return
        now_s = self._clock()
        # the whole fleet hears it at once
        delay_s = self._rng.uniform(0, hint.spread_s)
        if not self._hints.take(1, now_s):
            # a flood is one look, later; what the last hint is about must not wait for the next poll
            self.ignored += 1
            delay_s = max(delay_s, _HELD_BACK_S)
            if now_s < self._held_until_s <= now_s + delay_s:
                return
            self._held_until_s = now_s + delay_s
        self._orders.hint(hint, delay_s)

    # --- out ---------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._mqtt.connected:
            self._telemetry.flush(self._publish_batch, self._mqtt.room_bytes)

    def _publish_batch(self, batch: Batch) -> bool:
        return self._publish(batch.suffix, batch.payload, qos=1, expiry_s=_TELEMETRY_EXPIRY_S)

    def _publish(
        self, suffix: str, payload: bytes, *, qos: int, retain: bool = False, expiry_s: int | None = None
    ) -> bool:
        topic = self._settings.topics.of(suffix)
        purpose = self._settings.topics.purpose(topic)
        message = Message(topic, payload, qos=qos, retain=retain, expiry_s=expiry_s, purpose=purpose)
        return self._mqtt.publish(message) is Sent.QUEUED

    def _say(self, state: str, number: int) -> None:
        self._publish("status", self._status_payload(state, number), qos=1, retain=True)

    def _send_reported(self) -> None:
        if self._reported is not None and not self._reported_sent and self._mqtt.connected:
            self._reported_sent = self._publish("reported", self._reported, qos=1, retain=True)

    def _status_payload(self, state: str, number: int) -> bytes:
        session = {"boot": self._identity.boot_id, "instance": self._identity.instance, "number": number}
        return canonical({"v": 1, "state": state, "session": session})

    # --- upkeep ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        if not self._mqtt.running:
            self._revived += 1
            log.error("link: the network thread ended; starting another")
            self._mqtt.start()

    def _enter(self, state: str, error: BrokerError | None) -> None:
        if state != self._state:
            self._since = self._wall()
        self._state, self._error = state, error

    def _counts(self) -> dict[str, int]:
        counters, gate, transport = self._mqtt.counters, self._gate, self.transport.counts
        return {
            "connections": counters.connections,
            "losses": counters.losses,
            "takeovers": counters.takeovers,
            "faults": counters.faults,
            "revived": self._revived,
            "oversize": counters.oversize_out + counters.oversize_in,
            "refused": counters.refused,
            "malformed": counters.malformed + transport.malformed,
            "unasked_blocks": transport.unknown + transport.oversize,
            "inbox_dropped": self._mqtt.dropped,
            "commands_repeated": gate.duplicates,
            "commands_flooded": gate.flooded,
            "ignored": self.ignored,
        }

    def _wake(self) -> None:
        """Called in the network thread."""
        if self._loop is not None:
            # the loop may have been closed while the thread ends
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    def _mqtt_settings(self, tls: Tls) -> Settings:
        settings, topics = self._settings, self._settings.topics
        return Settings(
            settings.host,
            settings.port,
            tls,
            topics.device,
            subscriptions=tuple(Subscription(topic, qos=qos) for topic, qos in topics.heard),
            session_expiry_s=settings.session_expiry_s,
            will=lambda number: Will(
                topics.of("status"), self._status_payload("offline", number), settings.will_delay_s
            ),
            purpose=topics.purpose,
            limits=settings.limits,
        )
