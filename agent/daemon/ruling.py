"""What the daemon makes of a line's rules: events for the operator, and a sealed picture where a rule asks for one.

Invariant: every beginning that is told is followed by one end, whatever the workers say: around a swap two of them
speak, and a model may have taken over either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agent import protocol
from agent.daemon.captures import Captures
from agent.daemon.worker import one_line
from agent.lineconfig import LineConfig
from agent.ruleconfig import RuleConfig

_MAX_LABEL_CHARS = 80
_MOST = 1e15


class Ruling:
    """The rules of one line, and which of their events last at the moment.

    Args:
        captures: None where no picture is ever kept.
        tell: told (kind, facts) of each event.
    """

    def __init__(
        self,
        line: LineConfig,
        rules: Sequence[RuleConfig],
        captures: Captures | None,
        tell: Callable[[str, dict[str, object]], None],
    ) -> None:
        self._line = line
        self._rules = {rule.name: rule for rule in rules if rule.line == line.name}
        self._captures = captures
        self._tell = tell
        self._lasting: dict[str, tuple[int, str]] = {}
        self._first = 0

    @property
    def wish(self) -> protocol.SetRules | None:
        """What a worker of the line is told before its first frame; None when it shall just look at each."""
        if not self._rules and not self._line.motion:
            return None
        return protocol.SetRules(
            [rule.to_json() for rule in self._rules.values()], self._line.motion, self._line.refresh_s
        )

    def heard(self, packet: protocol.Packet, worker: int) -> bool:
        """Take a message about a rule from the worker of that number; False when it is about something else, or a rule
        nobody set."""
        message = packet.message
        if not isinstance(message, (protocol.RuleBegan, protocol.RuleEnded)) or message.rule not in self._rules:
            return False
        told_by, _ = self._lasting.get(message.rule, (self._first, ""))
        if worker < max(told_by, self._first):
            return True  # the successor of this worker has the word already
        if isinstance(message, protocol.RuleBegan):
            self._ended(message.rule, None)
            self._began(message, worker, packet.fds)
        elif worker == told_by:
            self._ended(message.rule, message.duration_s)
        return True

    def interrupted(self, successor: int) -> None:
        """Workers of lower numbers than `successor`'s have nothing more to say: what they told of ends, because their
        successor begins anew. The numbers of workers rise."""
        self._first = successor
        for rule, (worker, _) in list(self._lasting.items()):
            if worker < successor:
                self._ended(rule, None)

    def lasting(self) -> dict[str, str]:
        """Rules whose event lasts, each with the name of its capture or nothing."""
        return {rule: capture for rule, (_, capture) in self._lasting.items()}

    def _began(self, message: protocol.RuleBegan, worker: int, fds: Sequence[int]) -> None:
        facts = {"line": self._line.name, "rule": message.rule, **_told(message.item)}
        capture = ""
        if len(fds) == 1 and self._captures is not None and self._rules[message.rule].snapshot:
            capture = self._captures.keep(fds[0], facts)
        self._lasting[message.rule] = (worker, capture)
        self._tell("rule_began", {**facts, "capture": capture})

    def _ended(self, rule: str, duration_s: float | None) -> None:
        if self._lasting.pop(rule, None) is not None:
            self._tell("rule_ended", {"line": self._line.name, "rule": rule, "duration_s": duration_s})


def _told(item: dict[str, Any]) -> dict[str, object]:
    """What of a worker's item may be repeated: a worker that a model took over may write anything there."""
    label, score, box = item.get("label"), item.get("score"), item.get("box")
    facts: dict[str, object] = {}
    if isinstance(label, str):
        facts["label"] = one_line(label)[:_MAX_LABEL_CHARS]
    if _is_number(score):
        facts["score"] = score
    if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
        facts["box"] = box
    return facts


def _is_number(value: object) -> bool:
    # an integer may have thousands of digits here; no comparison with NaN holds
    return isinstance(value, (int, float)) and -_MOST < value < _MOST
