"""The operator's side over MQTT: a dashboard that keeps everything devices say, and a way to command one."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho


def client(keys: Path, identity: str) -> paho.Client:
    """An MQTT 5 client with one of the repository's identities, not connected."""
    made = paho.Client(paho.CallbackAPIVersion.VERSION2, identity, protocol=paho.MQTTv5)
    files = (str(keys / name) for name in ("ca.pem", f"{identity}.pem", f"{identity}.key"))
    made.tls_set(*files, tls_version=ssl.PROTOCOL_TLS_CLIENT)
    return made


def tell(keys: Path, port: int, device: str, command: Mapping[str, Any]) -> None:
    """Send `command` to a device as the operator."""
    operator = client(keys, "ota_operator")
    operator.connect("127.0.0.1", port)
    operator.loop_start()
    operator.publish(f"edge/v1/edge/{device}/cmd", json.dumps(command), qos=1).wait_for_publish(10)
    operator.disconnect()
    operator.loop_stop()


class Listener:
    """Subscribed as `ota_dashboard` to every device of the tenant `edge`."""

    def __init__(self, keys: Path, port: int) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self._client = client(keys, "ota_dashboard")
        self._client.on_connect = lambda client, *_: client.subscribe("edge/v1/edge/+/#", qos=1)
        self._client.on_message = self._heard
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _heard(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        suffix = message.topic.split("/", 4)[4]
        if suffix.startswith("blk/"):
            return
        with self._changed:
            self.messages.append((suffix, json.loads(message.payload)))
            self._changed.notify_all()

    def first(self, what: str, fits: Callable[[str, dict[str, Any]], bool], timeout_s: float = 15.0) -> dict[str, Any]:
        """The first message for which `fits(suffix, body)`.

        Raises:
            AssertionError: naming `what`, when none came.
        """

        def found() -> dict[str, Any] | None:
            return next((body for suffix, body in self.messages if fits(suffix, body)), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, timeout_s), f"heard no {what}"
        body = found()
        assert body is not None
        return body
