"""A sensor that speaks MQTT: what a gateway publishes becomes windows, scores, and a rule's event; all of it real."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent import client, config
from ota.mqtt import Inbox, Message, Mqtt, Reconnect, ReconnectPolicy, Settings, Tls
from tests.demo.fleet import ROOT, Fleet, command
from tests.fakes.broker import Broker
from tests.integration.console import until, watching

LINE = ROOT / "models" / "vibration"
CONFIG = """\
state_dir = "state"
run_dir = "run"
[[source]]
name = "pump"
kind = "topic"
topic = "pump"
channels = 3
rate_hz = 3200
window = 1024
[[line]]
name = "vibration"
source = "pump"
explore = "never"
delegates = ["litert:xnnpack"]
[[rule]]
name = "shakes"
line = "vibration"
above = 0.00382
for_s = 0.1
gap_s = 30
[telemetry]
interval_s = 0.1
[update]
probation_scale = 0.002
"""
TOPIC = "edge/v1/edge/belt-01/in/pump"
ROWS = 128


class Gateway:
    """Publishes one recorded window again and again, as a gateway beside the machine would."""

    def __init__(self, keys: Path, port: int) -> None:
        self.window = "healthy"
        self._ended = threading.Event()
        tls = Tls(*(str(keys / name) for name in ("ca.pem", "ota_sensors.pem", "ota_sensors.key")))
        settings = Settings("127.0.0.1", port, tls, "ota_sensors")
        policy = ReconnectPolicy(first_s=0.05, longest_s=0.2)
        self.mqtt = Mqtt(settings, Inbox(), reconnect=Reconnect(policy, random.Random(1)), clock=time.monotonic)
        self.mqtt.start()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        recorded = {name: np.load(LINE / "golden" / f"{name}.npy") for name in ("healthy", "inner_race")}
        while not self._ended.wait(0.32):
            samples = recorded[self.window]
            for start in range(0, len(samples), ROWS):
                rows = [[round(float(v), 4) for v in row] for row in samples[start : start + ROWS]]
                self.mqtt.publish(Message(TOPIC, json.dumps(rows).encode(), qos=1))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self.mqtt.close(0.2)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    made = Fleet(tmp_path)
    yield made
    made.stop()


def test_what_a_gateway_publishes_is_scored_on_the_device_and_a_fault_is_told_as_an_event(fleet: Fleet) -> None:
    fleet.make_repository()
    command("edge-ota", "identity", "repo", "ota_sensors", folder=fleet.folder)
    fleet.release(LINE / "1.1.0" / "spec.toml")
    port = fleet.start_broker()
    fleet.enroll(CONFIG)
    fleet.start_server()
    fleet.publish("vibration", "1.1.0")
    fleet.start_agent()
    with contextlib.ExitStack() as stack:
        gateway = Gateway(fleet.keys, port)
        stack.callback(gateway.close)
        observer = stack.enter_context(watching(fleet))
        where = config.load(fleet.folder / "agent.toml")

        def status() -> dict:
            with contextlib.suppress(Exception):  # not up yet
                return client.ask(where, "GET", "/status")
            return {}

        until("an answer of the daemon", status)
        fleet.grant("vibration", "1.1.0")
        end = observer.update_ended("1.1.0", 120)
        assert end["outcome"] == "committed", end
        first = observer.last_seq()
        observer.wait("a score of healthy windows", lambda: observer.last_seq() > first + 4, 60)
        healthy = [items[0] for seq, (_, items) in sorted(observer.results.items()) if seq > first and items]
        assert {item["label"] for item in healthy} == {"normal"}
        gateway.window = "inner_race"
        observer.wait("the rule", lambda: [e for e in observer.events if e["kind"] == "rule_began"], 60)
        source = status()["sources"]["pump"]
        assert source["state"] == "streaming"
        assert source["samples"]["heard"] > 8
        assert source["samples"]["refused"] == 0
        gateway.mqtt.publish(Message(TOPIC, b"not a sample", qos=1))
        until("a refused message", lambda: status()["sources"]["pump"]["samples"]["refused"])
        gateway.close()
        until("stale", lambda: status()["sources"]["pump"]["state"] == "stale")
