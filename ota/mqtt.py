"""An MQTT 5 client over mutual TLS that keeps itself connected: the one adapter around paho-mqtt.

What paho 2 leaves to its user and this module and `ota.mqttconnection` do: an exception in a callback or in the parser
costs the connection and not the thread; nothing above the broker's maximum packet size is sent (the broker would hang
up, and the message be sent again, for ever); queues are bounded; incoming packets are capped; TCP_NODELAY is set;
reconnecting has full jitter, does not trust a broker that accepts and kicks, and slows down when another client uses
our identity. One thread owns the socket and is the only caller of paho.
It is not a policy of topics or payloads, and it never connects without TLS.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable

from ota.brokertls import Tls
from ota.errors import BrokerError, Reason
from ota.mailbox import Acknowledged, Connected, Event, Inbox, Lost, Message, Outbox, Received, Sent, Subscribed
from ota.mqttconnection import LARGEST_PACKET_BYTES, Connection
from ota.mqttsettings import Counters, Limits, Settings, Subscription, Will
from ota.pace import Reconnect, ReconnectPolicy

__all__ = [
    "Acknowledged", "Connected", "Counters", "Event", "Inbox", "Limits", "Lost", "Message", "Mqtt", "Received",
    "Reconnect", "ReconnectPolicy", "Sent", "Settings", "Subscribed", "Subscription", "Tls", "Will",
]  # fmt: skip

_WILDCARDS = frozenset("+#\0")


class Mqtt:
    """A client that connects, reconnects and delivers events into `inbox` until closed.

    Args:
        settings: broker, identity, subscriptions, limits.
        inbox: where events go.
        reconnect: delays between attempts.
        clock: monotonic seconds.
        first_number: attempts to connect are counted on from here, for a client that takes the place of another.
    """

    def __init__(
        self,
        settings: Settings,
        inbox: Inbox,
        *,
        reconnect: Reconnect,
        clock: Callable[[], float],
        first_number: int = 0,
    ) -> None:
        self._settings = settings
        self._inbox = inbox
        self._reconnect = reconnect
        self._clock = clock
        self._outbox = Outbox(settings.limits.outbox_messages, settings.limits.outbox_bytes)
        self._thread: threading.Thread | None = None
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._beat_s = clock()
        self._number = first_number
        self._closing_s: float | None = None
        self._hurry = False
        self._held = False
        self._connected = False
        self._max_out_bytes = LARGEST_PACKET_BYTES
        self.counters = Counters()

    # --- any thread --------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """Which broker, and as whom."""
        return self._settings

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and nothing has gone wrong since."""
        return self._connected

    @property
    def max_packet_bytes(self) -> int:
        """Largest packet that the broker of the current or last connection takes."""
        return self._max_out_bytes

    @property
    def number(self) -> int:
        """Number of the current or last attempt to connect, from 1."""
        return self._number

    @property
    def running(self) -> bool:
        """Whether there is a network thread; it ends only by `close`, or by a fault that nothing could contain."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the network thread runs and turned its loop lately; says nothing about the broker."""
        return self.running and self._clock() - self._beat_s <= self._settings.limits.stall_s

    def start(self) -> None:
        """Start the network thread, or a new one in place of one that died; there is no way back from `close`."""
        if self.running or self._closing():
            return
        self._beat_s = self._clock()
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._thread.start()

    def close(self, drain_s: float = 2.0) -> None:
        """Send what waits, for at most `drain_s`, say good-bye and stop; the will is not published."""
        patience_s = drain_s + 1.0 if self._connected else 0.5
        self._closing_s = self._clock() + drain_s
        self._wake()
        if self._thread is not None:
            # an attempt to connect in progress is not waited for: its thread ends by itself and holds nobody up
            self._thread.join(patience_s)
            if not self._thread.is_alive():
                self._wake_in.close()
                self._wake_out.close()

    def retry_now(self) -> None:
        """Do not wait for the end of the current delay: something about network or configuration changed."""
        self._hurry = True
        self._wake()

    def hold(self, held: bool) -> None:
        """While held, a connection that ends is not made anew: another client with this identity is on its way, and
        the two would take the session from each other."""
        self._held = held
        self._wake()

    def publish(self, message: Message) -> Sent:
        """Hand over a message; never blocks. Anything but `Sent.QUEUED` means it will not arrive.

        Raises:
            ValueError: the topic is empty or holds a wildcard; a mistake of the caller.
        """
        if not message.topic or not _WILDCARDS.isdisjoint(message.topic):
            raise ValueError(f"no topic to publish on: {message.topic!r}")
        if self._closing_s is not None:
            return Sent.CLOSED
        if message.packet_bytes() > self._max_out_bytes:
            self.counters.oversize_out += 1
            return Sent.TOO_LARGE
        if message.qos == 0 and not self._connected:
            self.counters.dropped_at_once += 1
            return Sent.OFFLINE
        if not self._outbox.put(message):
            self.counters.queue_full += 1
            return Sent.QUEUE_FULL
        self._wake()
        return Sent.QUEUED

    def unsent(self) -> list[Message]:
        """After `close`: the messages of QoS 1 that nobody acknowledged, for whoever takes this client's place."""
        return self._outbox.take_all()

    def waiting(self) -> int:
        """Messages not yet sent or not yet acknowledged."""
        return len(self._outbox)

    def _wake(self) -> None:
        # a full pipe wakes the thread already; a closed one has none to wake
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")

    # --- network thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing():
            self._number += 1
            connection = Connection(self._settings, self._number, self._outbox, self.counters, self)
            try:
                error = connection.run()
            except BrokerError as e:
                error = e
            except Exception as e:  # noqa: BLE001 - paho's parser raises whatever a hostile packet makes it raise
                self.counters.faults += 1
                error = BrokerError(Reason.BROKER_LOST, f"connection given up: {type(e).__name__}: {e}", retry=True)
            finally:
                self._connected = False
                connection.abandon()
                self.counters.dropped_at_once += self._outbox.connection_lost()
            if self._closing():
                return
            taken_over = error.reason is Reason.SESSION_TAKEN_OVER
            delay_s = self._reconnect.lost(self._clock(), taken_over=taken_over)
            self.counters.losses += 1
            self.counters.takeovers += taken_over
            self._inbox.put(Lost(self._number, error, delay_s))
            self._sleep(delay_s)

    def _closing(self) -> bool:
        return self._closing_s is not None

    def _sleep(self, delay_s: float) -> None:
        until_s = self._clock() + delay_s
        while not self._closing() and (self._held or not self._hurry):
            left_s = until_s - self._clock()
            if left_s <= 0 and not self._held:
                break
            self.wait(-1, False, 5.0 if self._held else min(left_s, 5.0))
        self._hurry = False

    def wait(self, file: int, want_write: bool, timeout_s: float) -> tuple[bool, bool]:
        """Wait for `file` (-1 for none) or a wake-up; returns whether it can be read and written. Network thread."""
        self._beat_s = self._clock()
        poll = select.poll()
        poll.register(self._wake_out, select.POLLIN)
        if file >= 0:
            poll.register(file, select.POLLIN | (select.POLLOUT if want_write else 0))
        ready = dict(poll.poll(timeout_s * 1000))
        if self._wake_out.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_out.recv(4096)
        got = ready.get(file, 0)
        # errors and hang-ups are read, so that paho meets them
        return bool(got & ~select.POLLOUT), bool(got & select.POLLOUT)

    def deliver(self, event: Event) -> None:
        """Note what an event means for this client and put it into the inbox. Network thread."""
        if isinstance(event, Connected):
            self.counters.connections += 1
            self._max_out_bytes = event.max_packet_bytes
            self._reconnect.connected(self._clock())
            self._connected = True
        elif isinstance(event, Received):
            self.counters.count(self._settings.purpose(event.topic), received=event.packet_bytes)
        self._inbox.put(event)

    def now(self) -> float:
        """Monotonic seconds."""
        return self._clock()

    def closing_at(self) -> float | None:
        """When the connection must be over at the latest; None while nobody wants to close it."""
        return self._closing_s
