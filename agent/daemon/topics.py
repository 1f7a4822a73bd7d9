"""Names on the broker: building topics and reading them back. Pure.

`edge/v1/<tenant>/<device>/…`: at most seven levels, the device always the fourth, so that the broker's ACL can bind
it to the certificate. Invariant: every id is checked here before it becomes part of a topic or leaves one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from agent.errors import ConfigError, Reason
from agent.sensorconfig import TOPIC_PATTERN
from ota.release import DEVICE_PATTERN

TENANT_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
# A device of this name would own the fleet's own branch.
FLEET = "fleet"
SUFFIXES = ("status", "reported", "cmd", "evt", "tele", "log", "blk/get", "blk/data")

# Below it lie the names of what is published for a device: samples of sensors that speak MQTT themselves.
INPUT = "in/"

# Names under which bytes are counted (ota.mqtt.Counters.by_purpose).
_PURPOSES = {
    "status": "state",
    "reported": "state",
    "cmd": "commands",
    "evt": "telemetry",
    "tele": "telemetry",
    "log": "telemetry",
    "blk/get": "updates",
    "blk/data": "updates",
}


@dataclass(frozen=True, slots=True)
class Topics:
    """Topics of one device. `inputs` names those below `in/` from which its sources take samples.

    Raises:
        ConfigError: `bad_config` when tenant, device or an input is not in its grammar.
    """

    tenant: str
    device: str
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not TENANT_PATTERN.fullmatch(self.tenant):
            raise ConfigError(
                Reason.BAD_CONFIG, f"tenant {self.tenant[:40]!r} is not allowed", hint="use a-z 0-9 and -, at most 32"
            )
        if not DEVICE_PATTERN.fullmatch(self.device) or self.device == FLEET:
            raise ConfigError(
                Reason.BAD_CONFIG,
                f"device id {self.device[:60]!r} is not allowed",
                hint="use a-z 0-9 and -, at most 48",
            )
        for name in self.inputs:
            if not TOPIC_PATTERN.fullmatch(name):
                raise ConfigError(
                    Reason.BAD_CONFIG, f"input {name[:60]!r} is not allowed", hint="use a-z 0-9 _ and -, at most 32"
                )

    def of(self, suffix: str) -> str:
        """The device's topic that ends in `suffix`, one of `SUFFIXES`.

        Raises:
            KeyError: there is no such topic; a mistake of the caller.
        """
        if suffix not in SUFFIXES:
            raise KeyError(suffix)
        return f"edge/v1/{self.tenant}/{self.device}/{suffix}"

    @property
    def hint(self) -> str:
        """The topic on which the whole fleet is told that something may be new."""
        return f"edge/v1/{self.tenant}/{FLEET}/hint"

    @property
    def heard(self) -> tuple[tuple[str, int], ...]:
        """What the device subscribes to, each with its QoS. A sample that was missed is not worth repeating."""
        inputs = tuple((f"edge/v1/{self.tenant}/{self.device}/{INPUT}{name}", 0) for name in self.inputs)
        return ((self.of("cmd"), 1), (self.of("blk/data"), 0), (self.hint, 1), *inputs)

    def suffix(self, topic: str) -> str | None:
        """What `topic` ends in if it is one of this device's (`in/…` for one of its inputs), `hint` for the fleet's,
        else None."""
        if topic == self.hint:
            return "hint"
        head = f"edge/v1/{self.tenant}/{self.device}/"
        suffix = topic.removeprefix(head)
        known = suffix in SUFFIXES or (suffix.startswith(INPUT) and suffix.removeprefix(INPUT) in self.inputs)
        return suffix if suffix != topic and known else None

    def purpose(self, topic: str) -> str:
        """Name under which the bytes of a message on `topic` are counted."""
        suffix = self.suffix(topic)
        if suffix is not None and suffix.startswith(INPUT):
            return "samples"
        return "commands" if suffix == "hint" else _PURPOSES.get(suffix or "", "other")


@dataclass(frozen=True, slots=True)
class Origin:
    """Which device said something, as an operator's program reads it off a topic."""

    tenant: str
    device: str
    suffix: str


def parse(topic: str) -> Origin | None:
    """Read any device's topic; None when it is none, or an id in it is not in its grammar."""
    levels = topic.split("/")
    if len(levels) not in (5, 6) or levels[:2] != ["edge", "v1"]:
        return None
    tenant, device, suffix = levels[2], levels[3], "/".join(levels[4:])
    if not TENANT_PATTERN.fullmatch(tenant) or not DEVICE_PATTERN.fullmatch(device) or device == FLEET:
        return None
    return Origin(tenant, device, suffix) if suffix in SUFFIXES else None
