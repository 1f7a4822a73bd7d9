"""Rules over a line's results: when an event begins and when it ends. Pure: values and frame times in, events out.

A rule is met by a frame in which at least `count` items fit: their label, their score, and where they stand.
1. Hysteresis: an item has to reach `above` while the rule is idle, and only `below` from then on.
2. Minimum duration: the event begins when the rule has been met for `for_s`; `gap_s` without it are forgiven.
3. It ends when the rule has not been met for `gap_s`, at the time when it was last met.
4. Cool-down: for `cool_down_s` after an end nothing begins.
5. A zone is a polygon in shares of the frame. What counts is the middle of a box's lower edge, where a thing stands, or
   its centre; an item without a box fits no zone.
Invariants: an end follows every beginning, one each; a rule that is taken away, or whose frames end, just stops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from agent.errors import AgentError, Reason

MAX_RULES = 32
MAX_CORNERS = 32
FOOT = "foot"
CENTRE = "centre"

Point = tuple[float, float]
Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; times in seconds, scores as the line's results have them. An empty `label` fits every item."""

    name: str
    label: str = ""
    above: float = 0.5
    below: float = 0.5
    zone: tuple[Point, ...] = ()
    anchor: str = FOOT
    count: int = 1
    for_s: float = 0.0
    gap_s: float = 0.0
    cool_down_s: float = 0.0
    snapshot: bool = False


@dataclass(frozen=True, slots=True)
class Began:
    """An event begins. `item` is the fitting item with the highest score."""

    rule: Rule
    item: Item


@dataclass(frozen=True, slots=True)
class Ended:
    """It is over; `duration_s` from the first to the last frame that met the rule."""

    rule: Rule
    duration_s: float


class _Phase(Enum):
    IDLE = "idle"
    RISING = "rising"
    ACTIVE = "active"


@dataclass
class _State:
    phase: _Phase = _Phase.IDLE
    since_ns: int = 0
    met_ns: int = 0
    quiet_until_ns: int | None = None


class Rules:
    """The rules of one line at work.

    Args:
        rules: at most `MAX_RULES`.
        width, height: of the frames that results refer to.
    """

    def __init__(self, rules: Sequence[Rule], width: int, height: int) -> None:
        self._size = (width, height)
        self._states = [(rule, _State()) for rule in rules]

    def look(self, items: Sequence[Item], t_ns: int) -> list[Began | Ended]:
        """What the results of the frame at `t_ns` (CLOCK_MONOTONIC) begin and end."""
        found: list[Began | Ended] = []
        for rule, state in self._states:
            limit = rule.above if state.phase is _Phase.IDLE else rule.below
            fitting = [item for item in items if self._fits(rule, item, limit)]
            if len(fitting) >= rule.count:
                self._met(rule, state, fitting, t_ns, found)
            elif state.phase is not _Phase.IDLE and t_ns - state.met_ns >= rule.gap_s * 1e9:
                self._missed(rule, state, found)
        return found

    def _met(self, rule: Rule, state: _State, fitting: list[Item], t_ns: int, found: list[Began | Ended]) -> None:
        if state.phase is _Phase.IDLE:
            if state.quiet_until_ns is not None and t_ns < state.quiet_until_ns:
                return
            state.phase, state.since_ns = _Phase.RISING, t_ns
        state.met_ns = t_ns
        if state.phase is _Phase.RISING and t_ns - state.since_ns >= rule.for_s * 1e9:
            state.phase = _Phase.ACTIVE
            found.append(Began(rule, max(fitting, key=_score)))

    def _missed(self, rule: Rule, state: _State, found: list[Began | Ended]) -> None:
        if state.phase is _Phase.ACTIVE:
            found.append(Ended(rule, round((state.met_ns - state.since_ns) / 1e9, 3)))
            state.quiet_until_ns = state.met_ns + round(rule.cool_down_s * 1e9)
        state.phase = _Phase.IDLE

    def _fits(self, rule: Rule, item: Item, limit: float) -> bool:
        if (rule.label and item.get("label") != rule.label) or _score(item) < limit:
            return False
        if not rule.zone:
            return True
        box = item.get("box")
        if box is None:
            return False
        x, y = (box[0] + box[2]) / 2, box[3] if rule.anchor == FOOT else (box[1] + box[3]) / 2
        return inside((x / self._size[0], y / self._size[1]), rule.zone)


def inside(point: Point, polygon: Sequence[Point]) -> bool:
    """Whether a point lies in a polygon, by how often a ray from it to the right crosses an edge (Shimrat, 1962)."""
    x, y = point
    odd = False
    for (ax, ay), (bx, by) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
        if (ay > y) != (by > y) and x < (bx - ax) * (y - ay) / (by - ay) + ax:
            odd = not odd
    return odd


def parse_rules(items: Iterable[Any]) -> tuple[Rule, ...]:
    """The rules of a `SetRules` message.

    Raises:
        AgentError: `bad_message`.
    """
    try:
        rules = []
        for item in items:
            zone = tuple((float(x), float(y)) for x, y in item["zone"])
            rules.append(Rule(**{**item, "zone": zone}))
    except (TypeError, KeyError, ValueError) as e:
        raise AgentError(Reason.BAD_MESSAGE, f"not a rule: {e}") from e
    if len(rules) > MAX_RULES:
        raise AgentError(Reason.BAD_MESSAGE, f"{len(rules)} rules, more than {MAX_RULES}")
    return tuple(rules)


def _score(item: Item) -> float:
    score = item.get("score", 0.0)
    if score is None:  # an anomaly that cannot be put in numbers is no small one
        return math.inf
    return score if isinstance(score, (int, float)) else 0.0
