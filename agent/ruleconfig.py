"""The `[[rule]]` tables and the `[capture]` table of `agent.toml`.

What a rule means is written in `agent.worker.rules`; here its keys are checked and its defaults filled in.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from agent.configtable import Table

ANCHORS = ("foot", "centre")
MAX_RULES = 32
MAX_CORNERS = 32
_NAME_CHARS = 64
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class RuleConfig:
    """One rule of one line; see `agent.worker.rules`."""

    name: str
    line: str
    label: str
    above: float
    below: float
    zone: tuple[tuple[float, float], ...]
    anchor: str
    count: int
    for_s: float
    gap_s: float
    cool_down_s: float
    snapshot: bool

    def to_json(self) -> dict[str, Any]:
        """As a worker is told."""
        told = {key: getattr(self, key) for key in self.__slots__ if key not in ("line", "zone")}
        return {**told, "zone": [list(corner) for corner in self.zone]}


@dataclass(frozen=True, slots=True)
class CaptureConfig:
    """What may be kept of pictures. `operator_key` is the raw X25519 public key they are sealed to, empty for none."""

    operator_key: bytes = b""
    max_mb: float = 64.0
    max_per_hour: int = 60


def parse_rule(table: Table) -> RuleConfig:
    """Check one `[[rule]]` table.

    Raises:
        ConfigError: `bad_config`, naming the key.
    """
    name = table.text("name", None)
    if not 0 < len(name) <= _NAME_CHARS or not name.isprintable():
        raise table.bad(f"name {name!r} is not a printable text of 1 to {_NAME_CHARS} characters", "choose another")
    above = table.number("above", 0.5, -1e9, 1e9)
    rule = RuleConfig(
        name=name,
        line=table.text("line", None),
        label=table.text("label", ""),
        above=above,
        below=table.number("below", above, -1e9, 1e9),
        zone=_zone(table),
        anchor=table.choice("anchor", "foot", ANCHORS),
        count=int(table.number("count", 1, 1, 200)),
        for_s=table.number("for_s", 0, 0, 86400),
        gap_s=table.number("gap_s", 0.5, 0, 3600),
        cool_down_s=table.number("cool_down_s", 0, 0, 86400),
        snapshot=table.flag("snapshot", False),
    )
    if rule.below > rule.above:
        raise table.bad(f"below = {rule.below:g} is over above = {rule.above:g}", "it ends at a lower score")
    table.finish()
    return rule


def parse_capture(table: Table) -> CaptureConfig:
    """Check the `[capture]` table.

    Raises:
        ConfigError: `bad_config`, naming the key.
    """
    text = table.text("operator_key", "")
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b"?"
    if text and len(key) != _KEY_BYTES:
        raise table.bad("operator_key is no key", "edge-ota capture-key REPO prints one")
    most = int(table.number("max_per_hour", 60, 1, 100_000))
    config = CaptureConfig(key, table.number("max_mb", 64, 1, 1 << 20), most)
    table.finish()
    return config


def _zone(table: Table) -> tuple[tuple[float, float], ...]:
    corners = table.pairs("zone")
    if corners and not 3 <= len(corners) <= MAX_CORNERS:
        raise table.bad(f"zone has {len(corners)} corners", f"give 3 to {MAX_CORNERS}")
    if any(not 0 <= number <= 1 for corner in corners for number in corner):
        raise table.bad("zone is not in shares of the frame", "give [x, y] from 0 to 1, [0, 0] is the upper left")
    return corners
