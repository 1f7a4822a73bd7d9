"""What the broker may ask of this device, checked before anything acts on it. Clocks are numbers handed in.

A command is a wish, never an authority: `check` looks for updates as the device does anyway, `rollback` goes to a
release this device has committed before, `report` says how it is. What to install only signed metadata says.
Invariants: sizes are checked before parsing; a retained or expired command, and one seen before, does nothing; more
commands than the quota are counted and not answered, so that a flood cannot make this device flood.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from agent.daemon.seen import Seen
from agent.errors import Reason
from ota import strictjson
from ota.errors import OtaError, StoreError
from ota.pace import TokenBucket
from ota.release import LINE_PATTERN

VERSION = 1
MAX_COMMAND_BYTES = 4096
MAX_HINT_BYTES = 512
MAX_SPREAD_S = 7 * 86_400

_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KEYS = {
    "check": frozenset({"v", "id", "action", "expires_at", "line"}),
    "rollback": frozenset({"v", "id", "action", "expires_at", "line"}),
    "report": frozenset({"v", "id", "action", "expires_at"}),
}
_MAX_TIME_S = 1 << 40


@dataclass(frozen=True, slots=True)
class Check:
    """Look for updates now, of `line` or (None) of every line."""

    id: str
    line: str | None


@dataclass(frozen=True, slots=True)
class Rollback:
    """Go back to the release that `line` ran before."""

    id: str
    line: str


@dataclass(frozen=True, slots=True)
class Report:
    """Publish the reported document again."""

    id: str


Command = Check | Rollback | Report


@dataclass(frozen=True, slots=True)
class Refusal:
    """A command that will not be carried out. `id` is empty when none could be read."""

    id: str
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Hint:
    """Something may be new: check within `spread_s`, `line` first when it is named."""

    line: str | None
    spread_s: int


@dataclass(frozen=True, slots=True)
class GateLimits:
    """Commands taken at once and per minute."""

    burst: int = 20
    per_minute: float = 30.0


class Gate:
    """Decides about every command that arrives.

    Args:
        seen: remembers what was carried out; in memory alone when None.
    """

    def __init__(self, limits: GateLimits | None = None, seen: Seen | None = None) -> None:
        self._limits = limits or GateLimits()
        self._bucket = TokenBucket(self._limits.per_minute / 60, self._limits.burst)
        self._seen = Seen() if seen is None else seen
        self.duplicates = 0
        self.flooded = 0

    def admit(self, payload: bytes, *, retained: bool, wall_s: float, now_s: float) -> Command | Refusal | None:
        """The command to carry out, the refusal to answer with, or None: neither act nor answer.

        Args:
            payload: as received.
            retained: whether the broker had stored it.
            wall_s, now_s: wall clock (Unix seconds) and monotonic clock.
        """
        if not self._bucket.take(1, now_s):
            self.flooded += 1
            # the first one over is told, so that the sender can know
            return Refusal("", Reason.COMMAND_FLOOD, "too many commands") if self.flooded % 100 == 1 else None
        try:
            body = strictjson.loads(payload, max_bytes=MAX_COMMAND_BYTES, what="command")
        except OtaError as e:
            return Refusal("", Reason.BAD_MESSAGE, e.message)
        command = parse(body)
        if isinstance(command, Refusal):
            return command
        if retained:
            return Refusal(command.id, Reason.COMMAND_RETAINED, "a stored command may be of any age")
        if body["expires_at"] <= wall_s:
            return Refusal(command.id, Reason.COMMAND_EXPIRED, f"expired {wall_s - body['expires_at']:.0f} s ago")
        if command.id in self._seen:
            self.duplicates += 1
            return None
        try:
            self._seen.add(command.id, body["expires_at"], wall_s)
        except StoreError as e:
            return Refusal(command.id, Reason.STATE_UNWRITABLE, e.message)
        return command


def parse(body: Any) -> Command | Refusal:
    """Check the parsed JSON of a command; everything but time and repetition."""
    if not isinstance(body, dict) or body.get("v") != VERSION or isinstance(body.get("v"), bool):
        return Refusal("", Reason.BAD_MESSAGE, f"not a command of version {VERSION}")
    number = body.get("id")
    if not isinstance(number, str) or not _ID_PATTERN.fullmatch(number):
        return Refusal("", Reason.BAD_MESSAGE, "id is not 1 to 64 letters, digits, - and _")
    action = body.get("action")
    if not isinstance(action, str) or action not in _KEYS:
        return Refusal(number, Reason.UNKNOWN_COMMAND, f"action {str(action)[:40]!r} is unknown")
    if unknown := body.keys() - _KEYS[action]:
        return Refusal(number, Reason.BAD_MESSAGE, f"{action} has no field {sorted(unknown)[0][:40]!r}")
    expires = body.get("expires_at")
    if not isinstance(expires, int) or isinstance(expires, bool) or not 0 <= expires < _MAX_TIME_S:
        return Refusal(number, Reason.BAD_MESSAGE, "expires_at is not a time in Unix seconds")
    line = body.get("line")
    if line is not None and (not isinstance(line, str) or not LINE_PATTERN.fullmatch(line)):
        return Refusal(number, Reason.BAD_MESSAGE, "line is not the name of a line")
    if action == "check":
        return Check(number, line)
    if action == "report":
        return Report(number)
    if line is None:
        return Refusal(number, Reason.BAD_MESSAGE, "rollback needs a line")
    return Rollback(number, line)


def parse_hint(payload: bytes) -> Hint | None:
    """Read a hint; None for anything else."""
    try:
        body = strictjson.loads(payload, max_bytes=MAX_HINT_BYTES, what="hint")
    except OtaError:
        return None
    if not isinstance(body, dict) or body.keys() != {"v", "line", "spread_s"} or body["v"] != VERSION:
        return None
    line, spread_s = body["line"], body["spread_s"]
    if line is not None and (not isinstance(line, str) or not LINE_PATTERN.fullmatch(line)):
        return None
    if not isinstance(spread_s, int) or isinstance(spread_s, bool) or not 0 <= spread_s <= MAX_SPREAD_S:
        return None
    return Hint(line, spread_s)
