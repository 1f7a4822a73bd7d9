"""Samples that arrive on the broker, on their way to the source processes that make windows of them.

A source process has no network, so the daemon hears for it: `edge/v1/<tenant>/<device>/in/<topic>`. It reads a payload
only as far as it must to bound and check it, and hands rows over a few times a second at most, so that neither a flood
nor a slow process costs more than samples. Invariants: a payload is capped before it is parsed; at most `MAX_WAITING`
numbers wait for a source, then the oldest rows are dropped and counted; whoever loses a sample says so with empty rows,
because a window must not span it. A retained message is of no known age and never a sample.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from agent.sourceconfig import SourceConfig
from ota import strictjson
from ota.errors import OtaError
from ota.mqtt import Received

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 16 * 1024
MAX_WAITING = 32 * 1024
MAX_FEED_NUMBERS = 2000
"""What surely fits into one message to a worker."""
PAUSE_S = 0.02
_LARGEST = 3.4e38  # of a float32, a little less

Rows = list[list[float]]


class Fed(Protocol):
    """A source that takes what the daemon hears for it. `samples` is for the status: what came of it."""

    config: SourceConfig
    samples: Mapping[str, int]

    def feed(self, t_ns: int, rows: Rows) -> bool:
        """Hand over rows, the last measured at `t_ns`, none where samples are missing; False while nobody is there."""


def parse_samples(payload: bytes, channels: int) -> Rows | None:
    """The samples of a payload: a number, a list of numbers (sample by sample), a list of samples, or one of these as
    the only member `values` of an object. None for anything else."""
    try:
        value = strictjson.loads(payload, max_bytes=MAX_PAYLOAD_BYTES, what="samples")
    except OtaError:
        return None
    if isinstance(value, dict):
        if value.keys() != {"values"}:
            return None
        value = value["values"]
    values = value if isinstance(value, list) else [value]
    if not values:
        return None
    if all(isinstance(row, list) and len(row) == channels for row in values):
        rows = values
    elif len(values) % channels == 0:
        rows = [values[start : start + channels] for start in range(0, len(values), channels)]
    else:
        return None
    fits = all(type(one) in (int, float) and -_LARGEST < one < _LARGEST for row in rows for one in row)
    return rows if fits else None


class TopicSources:
    """Everything that the device's sources hear on the broker.

    Args:
        sources: all of them; those of kind `topic` are served.
        clock_ns: CLOCK_MONOTONIC.
    """

    def __init__(self, sources: Iterable[Fed], clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._inlets: dict[str, list[_Inlet]] = {}
        for source in sources:
            if source.config.kind == "topic":
                self._inlets.setdefault(str(source.config.options["topic"]), []).append(_Inlet(source))

    @property
    def names(self) -> tuple[str, ...]:
        """Last levels of the topics that are listened to."""
        return tuple(self._inlets)

    def heard(self, name: str, message: Received) -> None:
        """Take what was published on `in/<name>`; called in the event loop."""
        t_ns = self._clock_ns()
        for inlet in self._inlets.get(name, ()):
            inlet.heard(message, t_ns)


@dataclass(slots=True)
class _Batch:
    """Rows of one message, the last measured at `t_ns`; `missing`: samples are missing before them."""

    t_ns: int
    rows: Rows
    missing: bool


class _Inlet:
    """What one source hears."""

    def __init__(self, source: Fed) -> None:
        self.name = source.config.name
        self.counts = {"heard": 0, "refused": 0, "dropped": 0}
        source.samples = self.counts
        self._source = source
        self._channels = int(source.config.options["channels"])
        self._period_ns = 1e9 / source.config.options["rate_hz"]
        self._most_rows = MAX_FEED_NUMBERS // self._channels
        self._waiting: deque[_Batch] = deque()
        self._rows = 0
        self._missing = False
        self._pause: asyncio.TimerHandle | None = None
        self._refusing = False

    def heard(self, message: Received, t_ns: int) -> None:
        self.counts["heard"] += 1
        rows = None if message.retain else parse_samples(message.payload, self._channels)
        if rows is None:
            self._refuse(message)
            return
        self._refusing = False
        self._waiting.append(_Batch(t_ns, rows, self._missing))
        self._missing = False
        self._rows += len(rows)
        while self._rows * self._channels > MAX_WAITING:
            oldest = self._waiting.popleft()
            self._rows -= len(oldest.rows)
            self.counts["dropped"] += len(oldest.rows)
            self._waiting[0].missing = True
        if self._pause is None:
            self._flush()

    def _refuse(self, message: Received) -> None:
        self.counts["refused"] += 1
        if message.retain:
            return  # no sample was lost by it
        self._missing = True
        if not self._refusing:  # once, until there is a good one again
            self._refusing = True
            log.warning(
                "source %s: a message of %d bytes holds no samples of %d numbers",
                self.name,
                len(message.payload),
                self._channels,
            )

    def _flush(self) -> None:
        """Hand over what waits, as far as fits into a few messages to the process, and pause."""
        self._pause = None
        if not self._waiting:
            return
        batch = self._waiting.popleft()
        if batch.missing:
            self._source.feed(batch.t_ns, [])
        rows = list(batch.rows)
        while self._waiting and not self._waiting[0].missing:
            if len(rows) + len(self._waiting[0].rows) > self._most_rows:
                break
            batch = self._waiting.popleft()
            rows += batch.rows
        self._rows -= len(rows)
        for start in range(0, len(rows), self._most_rows):
            part = rows[start : start + self._most_rows]
            later = len(rows) - start - len(part)
            if not self._source.feed(batch.t_ns - round(later * self._period_ns), part):
                self.counts["dropped"] += len(part)
                self._missing = True
        self._pause = asyncio.get_running_loop().call_later(PAUSE_S, self._flush)
