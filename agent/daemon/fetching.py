"""From where and when this device fetches: the transports in their order, and the gate that agent.toml describes.

Only put together here: what the policy means is `ota.client.policy`'s, what a transport does its own. Not here: when to
look for a release (`updates`), except that a closed update window is worth a look when it opens.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from agent.config import UpdateConfig
from ota.brokertls import Tls
from ota.client.policy import Gate, Metered, Policy, windows
from ota.client.ports import Transport, UpdateEvent
from ota.client.transports.address import parse_address
from ota.client.transports.mqtt import MqttTransport
from ota.errors import Reason

if TYPE_CHECKING:
    from ota.client.transports.https import HttpsTransport

# the clock that opens a window is read to the second; a look a moment too early would wait for the next one
_AFTER_OPENING_S = 2.0
_KBIT_BYTES = 125.0


def _local_now() -> datetime.datetime:
    time.tzset()  # somebody may have set the time zone since the start
    return datetime.datetime.now().astimezone()


class Fetching:
    """The ways to the fleet's repository.

    Args:
        config: the `[update]` table.
        https: the web server that the enrolment names, where the table names none; empty for none.
        device: id of this device.
        tls: the identity in force, asked for at every new connection; None while there is none.
        clock: local wall-clock time.
    """

    def __init__(
        self,
        config: UpdateConfig,
        https: str,
        device: str,
        tls: Callable[[], Tls] | None,
        *,
        clock: Callable[[], datetime.datetime] = _local_now,
    ) -> None:
        policy = Policy(
            windows=windows(config.windows),
            metered=config.metered,
            on_metered=Metered(config.on_metered),
            rate_bytes_per_s=config.rate_kbit_s * _KBIT_BYTES,
        )
        self._clock = clock
        self.gate = Gate(policy, clock, time.monotonic)
        address = config.https or https
        self._https: HttpsTransport | None = None
        if address and tls is not None:
            from ota.client.transports.https import HttpsTransport  # memory that a fleet without one does not need

            self._https = HttpsTransport(parse_address(address), device, tls)

    @property
    def beside_broker(self) -> bool:
        """Whether a look can succeed without the broker."""
        return self._https is not None

    def transports(self, mqtt: MqttTransport | None) -> list[Transport]:
        """The ways in order of preference."""
        if mqtt is not None and self._https is not None:
            mqtt.beside_another()
        ways: tuple[Transport | None, ...] = (mqtt, self._https)
        return [way for way in ways if way is not None]

    def note(self, events: Iterable[UpdateEvent], poke: Callable[[float], None]) -> None:
        """Ask for a look at the opening of the next window when one of `events` waits for it."""
        if any(event.reason is Reason.OUTSIDE_WINDOW for event in events):
            poke(self.gate.policy.opens_in_s(self._clock()) + _AFTER_OPENING_S)

    def close(self) -> None:
        """Give connections and threads back."""
        if self._https is not None:
            self._https.close()

    def with_https(self, flows: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
        """Bytes by purpose, with what came from the web server counted among `updates`."""
        counted = {purpose: dict(flow) for purpose, flow in flows.items()}
        if self._https is not None:
            updates = counted.setdefault("updates", {"in": 0, "out": 0})
            updates["in"] += self._https.counts.body_bytes
        return counted

    def status(self) -> dict[str, Any]:
        """Whether payloads may be fetched now, and over which web server."""
        opens_in_s = self.gate.policy.opens_in_s(self._clock())
        return {
            "https": "" if self._https is None else str(self._https.address),
            "window_opens_in_s": round(opens_in_s),
            "metered": self.gate.policy.metered,
            "on_metered": self.gate.policy.on_metered.value,
            "rate_bytes_per_s": self.gate.policy.rate_bytes_per_s,
        }
