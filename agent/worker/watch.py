"""What a model worker does around a frame's answer: the motion gate before it, the line's rules after it.

Rules see the answers of every frame; where the gate holds a frame back the last answer stands. A snapshot is the very
frame with which an event began, as a JPEG in a memfd of its own; sealing it is the daemon's business.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cv2

from agent import memfd, protocol
from agent.worker.motion import MotionGate
from agent.worker.rules import Began, Rules, parse_rules

if TYPE_CHECKING:
    from agent.worker.channel import Channel
    from agent.worker.reader import Lent
    from agent.worker.sources import Frame

JPEG_QUALITY = 85


class Watch:
    """Gate and rules of one line on one ring.

    Args:
        link: to the daemon.
        wish: what the daemon asked for.
        shape: of the ring's frames; only pictures can be gated, kept, or have zones.

    Raises:
        AgentError: `bad_message`.
    """

    def __init__(self, link: Channel, wish: protocol.SetRules, shape: Sequence[int]) -> None:
        self._link = link
        self._pictures = len(shape) == 3
        height, width = shape[:2] if self._pictures else (1, 1)
        self._rules = Rules(parse_rules(wish.rules), width, height)
        self._gate = MotionGate(wish.motion, wish.refresh_s) if wish.motion > 0 and self._pictures else None
        self._items: Sequence[dict[str, Any]] = ()

    def holds_back(self, lent: Lent) -> bool:
        """Whether the frame shows nothing new. It is accounted for then."""
        if self._gate is None or self._gate.passes(lent.frame, lent.t_ns):
            return False
        self._link.send(protocol.Unchanged(lent.seq, lent.t_ns))
        self._look(lent)
        return True

    def answered(self, lent: Lent, items: Sequence[dict[str, Any]]) -> None:
        """The model said `items` of the frame, which is still lent."""
        self._items = items
        self._look(lent)

    def _look(self, lent: Lent) -> None:
        for what in self._rules.look(self._items, lent.t_ns):
            if isinstance(what, Began):
                self._tell(protocol.RuleBegan(what.rule.name, lent.seq, lent.t_ns, dict(what.item)), what, lent.frame)
            else:
                self._link.send(protocol.RuleEnded(what.rule.name, lent.seq, lent.t_ns, what.duration_s))

    def _tell(self, message: protocol.RuleBegan, began: Began, frame: Frame) -> None:
        if not (began.rule.snapshot and self._pictures):
            self._link.send(message)
            return
        ok, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        if not ok:
            self._link.send(message)
            return
        fd = memfd.of_bytes("snapshot", data.tobytes())
        try:
            self._link.send(message, (fd,))
        finally:
            os.close(fd)
