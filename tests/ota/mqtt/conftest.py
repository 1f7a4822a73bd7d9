"""A broker for the tests of this area, and clients that are closed when the test ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from ota.mqtt import (
    Connected,
    Event,
    Inbox,
    Limits,
    Mqtt,
    Reconnect,
    ReconnectPolicy,
    Settings,
    Subscribed,
    Subscription,
    Tls,
)
from tests.fakes.broker import Authority, Broker, Identity

E = TypeVar("E")
SOON = ReconnectPolicy(first_s=0.05, longest_s=0.2, takeover_s=0.2)


@dataclass
class Client:
    """A client under test and what it heard."""

    mqtt: Mqtt
    inbox: Inbox
    subscribes: bool

    def ready(self) -> Connected:
        """Wait until it is connected and its subscriptions are in force."""
        connected = self.expect(Connected)
        if self.subscribes:
            self.expect(Subscribed, where=lambda event: event.number == connected.number)
        return connected

    def expect(self, kind: type[E], timeout_s: float = 60.0, where: Callable[[E], bool] = lambda event: True) -> E:
        """The next event of `kind` that satisfies `where`; others are passed over."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            event = self.inbox.get(left)
            if isinstance(event, kind) and where(event):
                return event
        raise AssertionError(f"no {kind.__name__} within {timeout_s} s")

    def quiet(self, for_s: float = 0.4) -> list[Event]:
        """Everything that arrives within `for_s`."""
        events: list[Event] = []
        deadline = time.monotonic() + for_s
        while (left := deadline - time.monotonic()) > 0:
            event = self.inbox.get(left)
            if event is not None:
                events.append(event)
        return events


MakeClient = Callable[..., Client]


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def server_identity(authority: Authority) -> Identity:
    return authority.issue("broker", hosts=["localhost", "127.0.0.1"])


@pytest.fixture(scope="session")
def shared_broker(tmp_path_factory: pytest.TempPathFactory, server_identity: Identity) -> Iterator[Broker]:
    """One broker for all tests that leave it as they found it."""
    with Broker(tmp_path_factory.mktemp("broker"), server_identity) as broker:
        yield broker


@pytest.fixture
def own_broker(tmp_path: Path, server_identity: Identity) -> Iterator[Broker]:
    """A broker that the test may stop."""
    with Broker(tmp_path / "broker", server_identity) as broker:
        yield broker


@pytest.fixture
def make_client(authority: Authority) -> Iterator[MakeClient]:
    """Connects a client of the adapter: make_client(broker, "cam-1", "filter", …)."""
    clients: list[Client] = []

    def make(
        broker: Broker | tuple[str, int],
        name: str,
        *filters: str,
        identity: Identity | None = None,
        wake: Callable[[], None] | None = None,
        policy: ReconnectPolicy = SOON,
        limits: Limits | None = None,
        start: bool = True,
        **settings: object,
    ) -> Client:
        host, port = (broker.host, broker.port) if isinstance(broker, Broker) else broker
        identity = identity or authority.issue(name)
        inbox = Inbox(wake=wake)
        made = Settings(
            host,
            port,
            Tls(identity.ca, identity.certificate, identity.key),
            name,
            subscriptions=tuple(Subscription(f) for f in filters),
            limits=limits or Limits(connect_timeout_s=3.0),
            **settings,  # type: ignore[arg-type]
        )
        mqtt = Mqtt(made, inbox, reconnect=Reconnect(policy, random.Random(7)), clock=time.monotonic)
        client = Client(mqtt, inbox, bool(filters))
        clients.append(client)
        if start:
            mqtt.start()
        return client

    yield make
    for client in clients:
        client.mqtt.close(0.2)
