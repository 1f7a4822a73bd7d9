"""The operator's side of the demo: a plain MQTT client that hears what the device says and accounts for every frame."""

from __future__ import annotations

import collections
import json
import ssl
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho


class Observer:
    """Subscribes to everything of one device and keeps it in memory."""

    def __init__(self, keys: Path, port: int, tenant: str, device: str) -> None:
        self.results: dict[int, tuple[float, list[Any]]] = {}
        self.answers: collections.Counter[int] = collections.Counter()
        self.dropped: dict[int, str] = {}
        self.events: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._topic = f"edge/v1/{tenant}/{device}/#"
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, "ota_dashboard", protocol=paho.MQTTv5)
        self._client.tls_set(str(keys / "ca.pem"), str(keys / "ota_dashboard.pem"), str(keys / "ota_dashboard.key"),
                             tls_version=ssl.PROTOCOL_TLS_CLIENT)  # fmt: skip
        self._client.on_connect = lambda client, *_: client.subscribe(self._topic, qos=1)
        self._client.on_message = self._heard
        subscribed = threading.Event()
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        if not subscribed.wait(10):
            raise TimeoutError("the broker did not take the observer's subscription within 10 s")

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _heard(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        suffix = message.topic.rpartition("/")[2]
        if suffix not in ("tele", "evt"):
            return
        body = json.loads(message.payload)
        with self._changed:
            for seq, _t, _wall, latency_us, items in body.get("results", ()):
                self.answers[seq] += 1
                self.results[seq] = (latency_us / 1000, items or [])
            for first, last, reason, *_ in body.get("dropped", ()):
                for seq in range(first, last + 1):
                    self.answers[seq] += 1
                    self.dropped[seq] = reason
            for event in body.get("events", ()):
                self.events.append({"kind": event["kind"], "wall_ms": event["wall_ms"], **event["facts"]})
            self._changed.notify_all()

    def wait(self, what: str, ready: Callable[[], Any], timeout_s: float) -> Any:
        """The first true value of `ready`, asked after every message.

        Raises:
            TimeoutError: naming `what`.
        """
        with self._changed:
            value = None

            def got() -> bool:
                nonlocal value
                value = ready()
                return bool(value)

            if not self._changed.wait_for(got, timeout_s):
                raise TimeoutError(f"{what} did not happen within {timeout_s:g} s; last events: {self.events[-3:]}")
            return value

    def update_ended(self, version: str, timeout_s: float) -> dict[str, Any]:
        """How the update to `version` ended."""

        def ended() -> dict[str, Any] | None:
            return next((e for e in self._updates(version) if e.get("outcome") not in (None, "up_to_date")), None)

        event: dict[str, Any] = self.wait(f"the end of the update to {version}", ended, timeout_s)
        return event

    def verdicts(self, version: str) -> list[Mapping[str, Any]]:
        """Verdicts of the last trial of `version`."""
        found = [e for e in self.events if e["kind"] == "verdicts" and e["version"] == version]
        return found[-1]["verdicts"] if found else []

    def answered_through(self, seq: int, timeout_s: float) -> None:
        """Wait until every frame up to `seq` is answered or dropped."""
        try:
            self.wait(f"the answer to frame {seq}", lambda: all(self.answers[i] for i in range(seq + 1)), timeout_s)
        except TimeoutError as e:
            silent = [i for i in range(seq + 1) if not self.answers[i]]
            raise TimeoutError(f"{len(silent)} frames up to {seq} have no answer: {silent[:10]}") from e

    def last_seq(self) -> int:
        """The newest frame heard of; -1 before the first."""
        with self._changed:
            return max(self.answers, default=-1)

    def drops_between(self, first: int, last: int) -> list[tuple[int, str]]:
        """Dropped frames of [first, last) with their reasons."""
        with self._changed:
            return sorted((seq, reason) for seq, reason in self.dropped.items() if first <= seq < last)

    def _updates(self, version: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["kind"] == "update" and e.get("version") == version]
