"""Samples into windows: what every sensor's source has in common.

Numbers come in, one row a sample and one column a channel; windows of `window` samples go out, one every `hop`. All
storage is made once. What is missing between two samples is never papered over: a gap begins the window anew and is
counted. Invariants: only finite numbers get in; a window holds samples that follow each other.
"""

from __future__ import annotations

import math
import os
import select
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from agent.worker.sources import Frame


LARGEST = 3.4e38
"""What a sample stays below, of either sign: a little less than what a float32 holds."""


class Windows:
    """Collects samples.

    Args:
        window, hop: in samples; a hop longer than the window leaves samples out.
        channels: numbers in a sample.
        rate_hz: samples per second; what the gaps are measured with.
        slack_s: how much later than its time a sample may come; more is a gap.

    Attributes:
        gaps: how often samples were missing in between.
        complete: whether a window waits to be taken.
    """

    def __init__(self, window: int, hop: int, channels: int, rate_hz: float, slack_s: float = math.inf) -> None:
        self.window, self.hop, self.channels = window, hop, channels
        self.gaps = 0
        self._period_ns = 1e9 / rate_hz
        self._slack_ns = slack_s * 1e9
        # twice as long as a window: what is kept is moved to the front only once in a while, never onto itself
        self._rows = np.zeros((2 * window, channels), np.float32)
        self._first = 0
        self._held = 0
        self._skip = 0
        self._last_ns: int | None = None
        self._next_ns: int | None = None

    @property
    def complete(self) -> bool:
        return self._held == self.window

    def add(self, row: Sequence[float], t_ns: int) -> None:
        """Add one sample, measured at `t_ns`: finite numbers, one per channel. A complete window is taken first."""
        self._arrives(1, t_ns)
        if self._skip:
            self._skip -= 1
            return
        self._rows[self._first + self._held] = row
        self._held += 1

    def extend(self, rows: Frame, t_ns: int) -> int:
        """Add samples that follow each other, the last measured at `t_ns`, until a window is complete.

        Returns how many were taken; the rest is to be given again, with the same time, once the window was taken.
        """
        if self._next_ns is None:
            self._arrives(len(rows), t_ns)
        skipped = min(self._skip, len(rows))
        self._skip -= skipped
        taken = min(self.window - self._held, len(rows) - skipped)
        place = self._first + self._held
        self._rows[place : place + taken] = rows[skipped : skipped + taken]
        self._held += taken
        rest = len(rows) - skipped - taken
        self._last_ns = round(t_ns - rest * self._period_ns)
        self._next_ns = t_ns if rest else None
        return skipped + taken

    def restart(self) -> None:
        """Samples are missing here: begin the window anew."""
        self.gaps += 1
        self.clear()

    def clear(self) -> None:
        """Begin anew where nothing went wrong: the source was opened again, or began from its start."""
        self._first = self._held = self._skip = 0
        self._last_ns = self._next_ns = None

    def take(self, slot: Frame | None) -> int:
        """Write the complete window into `slot`, or throw it away for None; the time of its last sample."""
        if slot is not None:
            np.copyto(slot, self._rows[self._first : self._first + self.window])
        t_ns = self._last_ns or 0
        self._held = max(0, self.window - self.hop)
        self._skip = max(0, self.hop - self.window)
        self._first += self.window - self._held
        if self._first + self.window > len(self._rows):
            self._rows[: self._held] = self._rows[self._first : self._first + self._held]
            self._first = 0
        return t_ns

    def _arrives(self, count: int, t_ns: int) -> None:
        if self._last_ns is not None:
            late_ns = t_ns - self._last_ns - count * self._period_ns
            if late_ns > self._slack_ns or t_ns < self._last_ns:
                self.restart()
        self._last_ns = t_ns


class Alarm:
    """Ends a wait from another thread."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.rung = False

    def ring(self) -> None:
        """End the wait in progress, and every later one."""
        self.rung = True
        os.eventfd_write(self._fd, 1)

    def wait(self, timeout_s: float | None, *fds: int) -> bool:
        """Wait until one of `fds` can be read, or for a time; False when the alarm was rung."""
        select.select([self._fd, *fds], [], [], timeout_s)
        return not self.rung

    def close(self) -> None:
        """Release it."""
        os.close(self._fd)


def patience_s(options: Mapping[str, Any]) -> float:
    """How long a window may take to come: its own time and `stale_s` more."""
    span = max(options["window"], options["hop"]) / options["rate_hz"]
    return float(span + options["stale_s"])


def losses(windows: Windows, **others: int) -> str:
    """What a person should know of a sensor: one line, empty while all is well."""
    counts = {"gaps": windows.gaps, **others}
    return ", ".join(f"{what.replace('_', ' ')}: {count}" for what, count in counts.items() if count)
