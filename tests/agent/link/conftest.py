"""A broker, and an operator who listens and commands."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ota.mqtt import Inbox, Mqtt, Received, Reconnect, ReconnectPolicy, Settings, Subscribed, Subscription, Tls
from tests.fakes.broker import Authority, Broker


class Operator:
    """A client of the broker as the ACL's `ota_operator`."""

    def __init__(self, mqtt: Mqtt, inbox: Inbox) -> None:
        self.mqtt = mqtt
        self._inbox = inbox
        self._kept: list[Received] = []

    def next(self, suffix: str, timeout_s: float = 60.0) -> bytes:
        """Payload of the next message on a topic that ends in `suffix`; others are kept for whoever asks for them.

        Topics have no order among each other: a result may come before the answer that a test awaits first.
        """
        for place, kept in enumerate(self._kept):
            if kept.topic.endswith(f"/{suffix}"):
                return self._kept.pop(place).payload
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            event = self._inbox.get(left)
            if isinstance(event, Received):
                if event.topic.endswith(f"/{suffix}"):
                    return event.payload
                self._kept.append(event)
        raise AssertionError(f"nothing on {suffix} within {timeout_s} s")

    def wait_connected(self) -> None:
        """Wait until the broker has taken note of its subscriptions."""
        deadline = time.monotonic() + 60
        while (left := deadline - time.monotonic()) > 0:
            if isinstance(self._inbox.get(left), Subscribed):
                return
        raise AssertionError("the operator cannot connect")


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def broker(tmp_path: Path, authority: Authority) -> Iterator[Broker]:
    server = authority.issue("broker", hosts=["127.0.0.1"])
    with Broker(tmp_path / "broker", server) as running:
        yield running


MakeOperator = Callable[[Broker], Operator]


@pytest.fixture
def make_operator(authority: Authority) -> Iterator[MakeOperator]:
    """Connects an operator to a broker."""
    made: list[Operator] = []

    def make(broker: Broker) -> Operator:
        made.append(_operator(broker, authority))
        return made[-1]

    yield make
    for operator in made:
        operator.mqtt.close(0.2)


@pytest.fixture
def operator(broker: Broker, make_operator: MakeOperator) -> Operator:
    return make_operator(broker)


def _operator(broker: Broker, authority: Authority) -> Operator:
    identity = authority.issue("ota_operator")
    inbox = Inbox(limit_messages=100_000, limit_bytes=100_000_000)
    suffixes = ("status", "reported", "evt", "tele")
    settings = Settings(
        broker.host,
        broker.port,
        Tls(identity.ca, identity.certificate, identity.key),
        "ota_operator",
        subscriptions=tuple(Subscription(f"edge/v1/edge/+/{suffix}", retained=True) for suffix in suffixes),
        session_expiry_s=600,
    )
    policy = ReconnectPolicy(first_s=0.05, longest_s=0.2)
    mqtt = Mqtt(settings, inbox, reconnect=Reconnect(policy, random.Random(1)), clock=time.monotonic)
    mqtt.start()
    made = Operator(mqtt, inbox)
    made.wait_connected()
    return made
