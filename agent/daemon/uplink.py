"""The one connection of a device, and how another certificate takes it over.

A broker that makes the certificate's name the client id (packaging/mosquitto) lets one name have one connection: the
second one with a new certificate ends the first. So the trial is that take-over: a second client connects with the new
identity while the first still serves; a broker that refuses it leaves the first alone; one that accepts it moves the
session, with what it had queued, to the second. When the second then does not last, a client with the old identity
takes over again. docs/decisions/0013 says more.
Not here: which identity is tried and what becomes of it (`agent.daemon.renewal`), what is said (`agent.daemon.link`).
Invariants: at every moment one client is the current one and keeps itself connected; a QoS 1 message handed over is
published by it or by the next; whoever reads `events` sees a take-over as a reconnection and nothing else.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ota.errors import BrokerError, Reason
from ota.mqtt import (
    Connected,
    Counters,
    Event,
    Inbox,
    Lost,
    Message,
    Mqtt,
    Received,
    Reconnect,
    ReconnectPolicy,
    Sent,
    Settings,
    Subscribed,
    Tls,
)

# a PUBLISH packet around a payload: fixed header 5, the longest topic 96, packet id 2, expiry 6, rounded up
_ENVELOPE_BYTES = 128


@dataclass(frozen=True, slots=True)
class _Client:
    """A client with its identity and its inbox."""

    tls: Tls
    mqtt: Mqtt
    inbox: Inbox


@dataclass(slots=True)
class _Trial:
    """A second client on its way. `arrived` are its events so far, `held` the first one's loss that it may have
    caused, `ended` the outcome: an error, or None for accepted."""

    client: _Client
    ended: asyncio.Future[BrokerError | None]
    arrived: list[Event] = field(default_factory=list)
    held: Lost | None = None


class Uplink:
    """A connection that keeps itself up, under an identity that can be exchanged. All of it runs in one event loop.

    Args:
        settings: what a client with that identity is told.
        wake: called in network threads when there are events.
    """

    def __init__(
        self,
        settings: Callable[[Tls], Settings],
        tls: Tls,
        *,
        policy: ReconnectPolicy,
        rng: random.Random,
        clock: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._rng = rng
        self._clock = clock
        self._wake = wake
        self._client = self._make(tls, 0)
        self._trial: _Trial | None = None
        self._watched: asyncio.Future[BrokerError | None] | None = None
        self._late: list[Event] = []
        self._spent = Counters()
        self._retiring: set[asyncio.Task[None]] = set()

    # --- the current client ------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether messages can be sent now."""
        return self._client.mqtt.connected

    @property
    def running(self) -> bool:
        """Whether there is a network thread."""
        return self._client.mqtt.running

    @property
    def tls(self) -> Tls:
        """The identity in force."""
        return self._client.tls

    @property
    def alive(self) -> bool:
        """Whether the network thread does its work."""
        return self._client.mqtt.alive

    @property
    def number(self) -> int:
        """Number of the current or last attempt to connect; it grows over take-overs."""
        return self._client.mqtt.number

    @property
    def counters(self) -> Counters:
        """What happened since the start, under every identity."""
        total = self._spent.plus(self._client.mqtt.counters)
        return total if self._trial is None else total.plus(self._trial.client.mqtt.counters)

    @property
    def dropped(self) -> int:
        """Messages that came faster than they were taken."""
        return self._client.inbox.dropped

    @property
    def room_bytes(self) -> int:
        """Bytes of payload that one packet to this broker surely has room for."""
        return self._client.mqtt.max_packet_bytes - _ENVELOPE_BYTES

    def start(self) -> None:
        """Start the network thread, or another in place of one that died."""
        self._client.mqtt.start()

    def publish(self, message: Message) -> Sent:
        """As `Mqtt.publish`."""
        return self._client.mqtt.publish(message)

    def waiting(self) -> int:
        """Messages not yet sent or not yet acknowledged."""
        return self._client.mqtt.waiting()

    def retry_now(self) -> None:
        """Connect without waiting for the end of the back-off."""
        self._client.mqtt.retry_now()

    async def close(self) -> None:
        """Send what waits, and end every connection."""
        if self._trial is not None:
            self._abandon(self._trial)
        await asyncio.to_thread(self._client.mqtt.close)
        await asyncio.gather(*self._retiring)

    def events(self) -> list[Event]:
        """What has happened, in order; a take-over shows as `Connected` and `Subscribed`."""
        found, self._late = self._late, []
        trial = self._trial
        for event in self._client.inbox.drain():
            if isinstance(event, Lost) and trial is not None and _may_be_ours(event):
                trial.held = event
                continue
            if isinstance(event, Connected) and trial is not None and trial.held is not None:
                # it was no take-over: the first client is back by itself
                found.append(trial.held)
                trial.held = None
            if isinstance(event, Lost) and self._watched is not None and not self._watched.done():
                self._watched.set_result(event.error)
            found.append(event)
        if trial is not None:
            found += self._follow(trial)
        return found

    # --- the trial ---------------------------------------------------------------------------------------------------

    async def try_tls(self, tls: Tls, *, timeout_s: float = 30.0, hold_s: float = 5.0) -> BrokerError | None:
        """Connect a second time, with the identity `tls`; the connection is that one's when the broker accepts it and
        it lasts `hold_s`. `events` has to be asked meanwhile.

        Returns:
            None for success; else why not, and the connection is under the identity that it had.
        """
        former = self._client.tls
        trial = _Trial(self._make(tls, self._client.mqtt.number), asyncio.get_running_loop().create_future())
        self._trial = trial
        self._client.mqtt.hold(True)
        trial.client.mqtt.start()
        try:
            async with asyncio.timeout(timeout_s):
                error = await trial.ended
        except TimeoutError:
            error = BrokerError(Reason.BROKER_UNREACHABLE, f"no answer within {timeout_s:g} s", retry=True)
        finally:
            if self._trial is trial:
                self._late += self._abandon(trial)
                self._wake()
        if error is None:
            error = await self._last(hold_s)
            if error is not None:
                self._change(self._make(former, self._client.mqtt.number))
                self._client.mqtt.start()
        return error

    async def _last(self, hold_s: float) -> BrokerError | None:
        """Why the current client lost its connection within `hold_s`; None when it did not."""
        self._watched = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(hold_s):
                return await self._watched
        except TimeoutError:
            return None
        finally:
            self._watched = None

    def _follow(self, trial: _Trial) -> list[Event]:
        """What the trial means for whoever reads `events`: nothing, until the broker has accepted it."""
        for event in trial.client.inbox.drain():
            if isinstance(event, Lost):
                if not trial.ended.done():
                    trial.ended.set_result(event.error)
                return self._abandon(trial)
            trial.arrived.append(event)
        if not any(isinstance(event, Subscribed) for event in trial.arrived):
            return []
        self._trial = None
        self._change(trial.client)
        if not trial.ended.done():
            trial.ended.set_result(None)
        return trial.arrived

    def _abandon(self, trial: _Trial) -> list[Event]:
        """End the trial; the first client comes back at once if it had lost its session to it."""
        self._trial = None
        self._client.mqtt.hold(False)
        self._retire(trial.client)
        # a broker may have queued messages for us on the second connection already
        left: list[Event] = [event for event in trial.arrived if isinstance(event, Received)]
        if trial.held is not None:
            left.append(trial.held)
        if trial.held is not None or any(isinstance(event, Connected) for event in trial.arrived):
            self._client.mqtt.retry_now()
        return left

    def _change(self, client: _Client) -> None:
        former, self._client = self._client, client
        self._retire(former)

    def _retire(self, client: _Client) -> None:
        task = asyncio.get_running_loop().create_task(self._end(client))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _end(self, client: _Client) -> None:
        await asyncio.to_thread(client.mqtt.close, 0.0)
        self._spent = self._spent.plus(client.mqtt.counters)
        self._late += [event for event in client.inbox.drain() if isinstance(event, Received)]
        for message in client.mqtt.unsent():
            # retained state is said anew after every connection; an older one must not come behind it
            if not message.retain:
                self._client.mqtt.publish(message)
        self._wake()

    def _make(self, tls: Tls, first_number: int) -> _Client:
        inbox = Inbox(wake=self._wake)
        mqtt = Mqtt(
            self._settings(tls),
            inbox,
            reconnect=Reconnect(self._policy, self._rng),
            clock=self._clock,
            first_number=first_number,
        )
        return _Client(tls, mqtt, inbox)


def _may_be_ours(event: Lost) -> bool:
    """Brokers that do not say "session taken over" just close the older connection."""
    return event.error.reason in (Reason.SESSION_TAKEN_OVER, Reason.BROKER_LOST)
