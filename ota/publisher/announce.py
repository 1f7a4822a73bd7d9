"""Publishes one hint to a fleet and leaves. It carries no authority, and no answer is waited for but the broker's."""

from __future__ import annotations

import random
import time

from ota.brokertls import Tls
from ota.errors import BrokerError, OtaError, Reason
from ota.mailbox import Acknowledged, Inbox, Lost, Message
from ota.mqtt import Mqtt, Reconnect, ReconnectPolicy, Settings
from ota.release import LINE_PATTERN
from ota.strictjson import canonical

_HINT_EXPIRY_S = 3600
_MAX_SPREAD_S = 7 * 86_400


def send_hint(
    *,
    host: str,
    port: int,
    tls: Tls,
    tenant: str,
    client_id: str,
    line: str | None = None,
    spread_s: int = 0,
    timeout_s: float = 15.0,
) -> None:
    """Tell every device of `tenant` to check for updates within `spread_s` seconds.

    A hint carries no authority: a device that gets it does what it would have done anyway, only sooner.

    Args:
        tls: an operator's identity. Not the one of a running server: the hint would take over its connection.
        line: the line that changed, None for any.

    Raises:
        BrokerError: the broker cannot be reached within `timeout_s`, or refuses the message.
    """
    if line is not None and not LINE_PATTERN.fullmatch(line):
        raise OtaError(Reason.BAD_SPEC, f"{line[:40]!r} is not the name of a line")
    hint = {"v": 1, "line": line, "spread_s": max(0, min(spread_s, _MAX_SPREAD_S))}
    topic = f"edge/v1/{tenant}/fleet/hint"
    message = Message(topic, canonical(hint), expiry_s=_HINT_EXPIRY_S, purpose="hints", token="hint")
    _publish_once(Settings(host, port, tls, client_id), message, timeout_s)


def _publish_once(settings: Settings, message: Message, timeout_s: float) -> None:
    inbox = Inbox()
    reconnect = Reconnect(ReconnectPolicy(first_s=1.0, longest_s=2.0), random.Random())
    mqtt = Mqtt(settings, inbox, reconnect=reconnect, clock=time.monotonic)
    mqtt.publish(message)
    mqtt.start()
    error = BrokerError(
        Reason.BROKER_UNREACHABLE,
        f"{settings.host}:{settings.port}: no answer in {timeout_s:g} s",
        hint="is the broker running?",
        retry=True,
    )
    deadline_s = time.monotonic() + timeout_s
    try:
        while (left_s := deadline_s - time.monotonic()) > 0:
            event = inbox.get(left_s)
            if isinstance(event, Lost):
                error = event.error
                if error.reason is not Reason.BROKER_UNREACHABLE and error.reason is not Reason.BROKER_LOST:
                    break
            elif isinstance(event, Acknowledged) and event.code < 0x80:
                return
            elif isinstance(event, Acknowledged):
                error = BrokerError(
                    Reason.BROKER_REFUSED,
                    f"the broker refuses to publish on {message.topic} ({event.code:#x})",
                    hint=f"may {settings.client_id} publish there? See the broker's ACL",
                )
                break
        raise error
    finally:
        mqtt.close(0.0 if not mqtt.connected else 1.0)
