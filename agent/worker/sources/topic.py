"""Samples that the daemon hears on the broker and hands over: the source process itself has no network.

What a message may look like is the daemon's business (`agent.daemon.topicsource`); rows of the wrong width are refused
here once more. Invariants: at most `MAX_WAITING` samples wait, beyond that the oldest are dropped and counted, and the
window begins anew; silence is never an end, only stale.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agent.errors import AgentError, Reason
from agent.worker.sources import Pace
from agent.worker.sources.samples import Windows, losses, patience_s

if TYPE_CHECKING:
    from agent.worker.sources import Frame

MAX_WAITING = 1 << 16
NEVER_S = 1e8
"""Nothing here can hang in a driver: waiting is a condition variable."""


class Topic:
    """Samples that somebody else hears.

    Args:
        options: as `agent.sensorconfig` parses them.
    """

    blocks: Literal[True] = True
    dtype = "float32"
    hung_s = NEVER_S

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._windows = Windows(
            options["window"], options["hop"], options["channels"], options["rate_hz"], options["gap_s"]
        )
        self.shape: tuple[int, ...] = (options["window"], options["channels"])
        self.pace = Pace("live", options["rate_hz"] / options["hop"], True, options["queue_frames"])
        self.stale_s = patience_s(options)
        self.feed: Callable[[int, Sequence[Any]], None] | None = self._feed
        self.detail = ""
        self.dropped = 0
        self._news = threading.Condition()
        self._waiting: deque[tuple[int, Frame]] = deque()
        self._count = 0
        self._missed = False
        self._ended = False

    def wait_into(self, slot: Frame | None) -> int | None:
        """See `LiveSource.wait_into`."""
        windows = self._windows
        while not windows.complete:
            with self._news:
                while not self._waiting and not self._ended:
                    self._news.wait()
                if self._ended:
                    return None
                t_ns, rows = self._waiting.popleft()
                missed, self._missed = self._missed, False
                if missed or not len(rows):
                    windows.restart()
                # not without the lock: what is dropped meanwhile lies behind the rest of this block
                taken = windows.extend(rows, t_ns) if len(rows) else 0
                self._count -= taken
                if taken < len(rows):
                    self._waiting.appendleft((t_ns, rows[taken:]))
                self.detail = losses(windows, samples_dropped=self.dropped)
        return windows.take(slot)

    def reopen(self) -> None:
        """See `LiveSource.reopen`: it cannot break."""

    def interrupt(self) -> None:
        """See `LiveSource.interrupt`."""
        with self._news:
            self._ended = True
            self._news.notify()

    def close(self) -> None:
        """See `LiveSource.close`."""

    def _feed(self, t_ns: int, rows: Sequence[Any]) -> None:
        """Take samples, the last measured at `t_ns`; none of them: some are missing here.

        Raises:
            AgentError: `bad_message` when they are no rows of as many finite numbers as there are channels.
        """
        try:
            block = np.array(rows, np.float32)
        except (ValueError, TypeError, OverflowError) as e:
            raise AgentError(Reason.BAD_MESSAGE, "rows that are no numbers") from e
        if not rows:
            block = block.reshape(0, self.shape[1])
        if block.ndim != 2 or block.shape[1] != self.shape[1] or len(block) > MAX_WAITING:
            raise AgentError(Reason.BAD_MESSAGE, f"rows of the shape {list(block.shape)}")
        if not math.isfinite(float(block.sum(dtype=np.float64))):
            raise AgentError(Reason.BAD_MESSAGE, "a number that is none")
        with self._news:
            self._waiting.append((t_ns, block))
            self._count += len(block)
            while self._count > MAX_WAITING:
                _, oldest = self._waiting.popleft()
                self._count -= len(oldest)
                self.dropped += len(oldest)
                self._missed = True
            self._news.notify()
