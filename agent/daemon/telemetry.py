"""Results, drops, events and metrics, gathered into few messages: one publish costs more than thirty results.

Records wait encoded in memory, by class, and leave as JSON batches below a size. It is not a store: what waits is lost
with the process. Invariants: a record leaves in exactly one batch, and only when the batch was taken; memory is
bounded, and what is dropped for it is the oldest of the least important class and is counted in the next batch; times
are wall clock and monotonic clock, the latter good only together with the boot id.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.daemon.histogram import Histogram
from agent.protocol import Result

VERSION = 1
ALARM, EVENT, SAMPLE = 0, 1, 2
CLASSES = (ALARM, EVENT, SAMPLE)
# room for everything of a batch but its records
_HEAD_BYTES = 1024
STAGES = ("wait", "preprocess", "inference", "postprocess", "latency")
RESULT_FIELDS = ("seq", "t_frame_ns", "wall_ms", "latency_us", "items")
DROP_FIELDS = ("first_seq", "last_seq", "reason", "t_ns", "wall_ms")
Group = tuple[str, str]
"""What may share a batch: kind of record, and line or nothing."""
_TOPIC_OF = {ALARM: "evt", EVENT: "evt", SAMPLE: "tele"}


@dataclass(frozen=True, slots=True)
class TelemetryLimits:
    """Bounds.

    Attributes:
        waiting_bytes: encoded records in memory, all classes together.
        batch_bytes: one message's payload.
        alarms_bytes: of `waiting_bytes`, kept for alarms alone.
        flush_batches: batches handed out by one flush: what gathered offline leaves paced.
    """

    waiting_bytes: int = 2 * 1024 * 1024
    batch_bytes: int = 48 * 1024
    alarms_bytes: int = 64 * 1024
    flush_batches: int = 8


@dataclass(frozen=True, slots=True)
class Clocks:
    """Where times come from: wall clock and monotonic clock in nanoseconds, and the id of this boot."""

    wall_ns: Callable[[], int]
    mono_ns: Callable[[], int]
    boot_id: str


@dataclass(frozen=True, slots=True)
class Batch:
    """One message: the last level of its topic and its JSON. It is sent with QoS 1."""

    suffix: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Ready:
    """A batch that was not taken yet, and how many records of which class are lost without it."""

    batch: Batch
    level: int
    records: int


class _Waiting:
    """Encoded records of one class, in order of arrival within each group; a batch holds one group."""

    def __init__(self) -> None:
        self._groups: dict[Group, collections.deque[tuple[int, bytes]]] = {}
        self._order = 0
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._groups)

    def append(self, group: Group, encoded: bytes) -> None:
        self._order += 1
        self._groups.setdefault(group, collections.deque()).append((self._order, encoded))
        self.bytes += len(encoded)

    def oldest(self) -> Group:
        """The group of the record that waits longest."""
        return min(self._groups, key=lambda group: self._groups[group][0][0])

    def peek(self, group: Group) -> bytes | None:
        queue = self._groups.get(group)
        return queue[0][1] if queue else None

    def pop(self, group: Group) -> bytes:
        queue = self._groups[group]
        _, encoded = queue.popleft()
        if not queue:
            del self._groups[group]
        self.bytes -= len(encoded)
        return encoded


class Telemetry:
    """Gathers records and hands them out in batches; used from one thread."""

    def __init__(self, clocks: Clocks, limits: TelemetryLimits | None = None, *, results: bool = True) -> None:
        """`results` False gathers figures and events but no record per frame."""
        self._clocks = clocks
        self._limits = limits or TelemetryLimits()
        self._results = results
        self._waiting = {level: _Waiting() for level in CLASSES}
        self._ready: _Ready | None = None
        self._number = 0
        self._lost: dict[int, int] = dict.fromkeys(CLASSES, 0)
        self._unsaid: dict[int, int] = dict.fromkeys(CLASSES, 0)
        self._stages: dict[str, dict[str, Histogram]] = {}
        self._counts: dict[str, collections.Counter[str]] = {}

    # --- in ----------------------------------------------------------------------------------------------------------

    def result(self, line: str, result: Result) -> None:
        """Note what a model said of one frame."""
        latency_us = max(0, result.t_done_ns - result.t_frame_ns) // 1000
        stages = self._histograms(line)
        for stage, value_us in zip(STAGES, [*result.stages_us[:4], latency_us], strict=False):
            stages[stage].add(value_us)
        self._count(line, "results")
        if self._results:
            row = [result.seq, result.t_frame_ns, self._wall_ms(result.t_frame_ns), latency_us, result.items]
            if not self._append(SAMPLE, ("results", line), row):
                # the frame is accounted for even if what was seen in it cannot be sent
                self._append(SAMPLE, ("results", line), [*row[:4], None])

    def dropped(self, line: str, seqs: Sequence[int], reason: str) -> None:
        """Note frames that nobody will answer."""
        now_ns = self._clocks.mono_ns()
        self._count(line, f"dropped_{reason}", len(seqs))
        if self._results:
            for first, last in _ranges(seqs):
                self._append(SAMPLE, ("dropped", line), [first, last, reason, now_ns, self._wall_ms(now_ns)])

    def event(self, kind: str, facts: Mapping[str, Any], *, alarm: bool = False) -> None:
        """Note something that happened once; `alarm` for alarms and the outcome of updates, which are dropped last."""
        now_ns = self._clocks.mono_ns()
        record = {"kind": kind, "t_ns": now_ns, "wall_ms": self._wall_ms(now_ns), "facts": dict(facts)}
        self._append(ALARM if alarm else EVENT, ("events", ""), record)

    def metrics(self, facts: Mapping[str, Any]) -> None:
        """Note the figures of every line since the start, with `facts` (load, temperature, bytes by purpose …)."""
        now_ns = self._clocks.mono_ns()
        lines = {line: {"counts": self.counts(line), "stages_ms": self.stages_ms(line)} for line in self._stages}
        record = {"t_ns": now_ns, "wall_ms": self._wall_ms(now_ns), "lines": lines, "facts": dict(facts)}
        self._append(SAMPLE, ("metrics", ""), record)

    # --- figures -----------------------------------------------------------------------------------------------------

    def stages_ms(self, line: str) -> dict[str, dict[str, float]]:
        """p50, p95 and p99 in ms of every stage of a line since the start; `latency` is capture to result."""
        return {
            stage: {f"p{share}": round(histogram.quantile(share / 100) / 1000, 3) for share in (50, 95, 99)}
            for stage, histogram in self._stages.get(line, {}).items()
            if histogram.count
        }

    def counts(self, line: str) -> dict[str, int]:
        """Results and drops by reason of a line, since the start."""
        return dict(self._counts.get(line, {}))

    @property
    def waiting_bytes(self) -> int:
        """Encoded bytes in memory."""
        return sum(waiting.bytes for waiting in self._waiting.values()) + (
            len(self._ready.batch.payload) if self._ready else 0
        )

    @property
    def lost(self) -> dict[int, int]:
        """Records dropped for want of memory, by class, since the start."""
        return dict(self._lost)

    # --- out ---------------------------------------------------------------------------------------------------------

    def flush(self, publish: Callable[[Batch], bool], room_bytes: int | None = None) -> int:
        """Hand out what waits, most important first, until nothing is left, `publish` returns False or it is enough.

        A batch that was not taken is offered again, unchanged, by the next flush. What alone is larger than
        `room_bytes` cannot be sent at all and counts as lost, so that it keeps nothing else from leaving. Returns how
        many batches were taken.
        """
        most_bytes = self._limits.batch_bytes if room_bytes is None else min(self._limits.batch_bytes, room_bytes)
        if self._ready is not None and len(self._ready.batch.payload) > most_bytes:
            # made for a broker that takes larger packets
            self._lose(self._ready.level, self._ready.records)
            self._ready = None
        taken = 0
        while taken < self._limits.flush_batches and (ready := self._ready or self._next(most_bytes)) is not None:
            self._ready = ready
            if not publish(ready.batch):
                break
            self._ready = None
            taken += 1
        return taken

    def _next(self, most_bytes: int) -> _Ready | None:
        for level in CLASSES:
            waiting = self._waiting[level]
            while waiting:
                group = waiting.oldest()
                if len(waiting.peek(group) or b"") <= most_bytes - _HEAD_BYTES:
                    return self._batch(level, group, most_bytes)
                waiting.pop(group)
                self._lose(level)
        return None

    def _batch(self, level: int, group: Group, most_bytes: int) -> _Ready:
        """The records of a group that fit, oldest first; one does."""
        waiting = self._waiting[level]
        head = self._head(group)
        rows = [waiting.pop(group)]
        size = len(head) + len(rows[0]) + 2
        while (encoded := waiting.peek(group)) is not None and size + len(encoded) + 1 <= most_bytes:
            rows.append(waiting.pop(group))
            size += len(encoded) + 1
        return _Ready(Batch(_TOPIC_OF[level], head + b",".join(rows) + b"]}"), level, len(rows))

    def _head(self, group: Group) -> bytes:
        """Everything of a batch up to the first record."""
        kind, line = group
        self._number += 1
        fields: dict[str, Any] = {"v": VERSION, "boot": self._clocks.boot_id, "n": self._number}
        # one reading of both clocks, so that a reader can place monotonic times even after the wall clock was set
        fields |= {"mono_ns": self._clocks.mono_ns(), "wall_ns": self._clocks.wall_ns()}
        if any(self._unsaid.values()):
            fields["lost"] = {str(level): count for level, count in self._unsaid.items() if count}
            self._unsaid = dict.fromkeys(CLASSES, 0)
        if line:
            fields["line"] = line
        if kind in _FIELDS_OF:
            fields["fields"] = _FIELDS_OF[kind]
        return _encode(fields)[:-1] + f',"{kind}":['.encode()

    def _append(self, level: int, group: Group, record: Any) -> bool:
        """Keep a record, or drop less important ones for it, or it; False when it cannot be sent at all."""
        try:
            encoded = _encode(record)
        except (ValueError, RecursionError):
            # NaN, half a character, a thousand brackets: a worker says what it wants
            encoded = b""
        if not encoded or len(encoded) > self._limits.batch_bytes - _HEAD_BYTES:
            self._lose(level)
            return False
        while self._over(level, len(encoded)):
            if not self._drop_below(level):
                self._lose(level)
                return True
        self._waiting[level].append(group, encoded)
        return True

    def _over(self, level: int, size: int) -> bool:
        limit = self._limits.waiting_bytes - (0 if level == ALARM else self._limits.alarms_bytes)
        return self.waiting_bytes + size > limit

    def _drop_below(self, level: int) -> bool:
        """Drop the oldest record of the least important class that is not more important than `level`."""
        for candidate in reversed(CLASSES):
            if candidate < level:
                return False
            waiting = self._waiting[candidate]
            if waiting:
                waiting.pop(waiting.oldest())
                self._lose(candidate)
                return True
        return False

    def _lose(self, level: int, records: int = 1) -> None:
        self._lost[level] += records
        self._unsaid[level] += records

    def _histograms(self, line: str) -> dict[str, Histogram]:
        stages = self._stages.get(line)
        if stages is None:
            stages = self._stages[line] = {stage: Histogram() for stage in STAGES}
        return stages

    def _count(self, line: str, what: str, count: int = 1) -> None:
        self._counts.setdefault(line, collections.Counter())[what] += count

    def _wall_ms(self, mono_ns: int) -> int:
        return (self._clocks.wall_ns() - self._clocks.mono_ns() + mono_ns) // 1_000_000


_FIELDS_OF = {"results": RESULT_FIELDS, "dropped": DROP_FIELDS}


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _ranges(seqs: Iterable[int]) -> list[tuple[int, int]]:
    """`seqs` as runs of consecutive numbers (first, last)."""
    runs: list[tuple[int, int]] = []
    for seq in sorted(seqs):
        if runs and seq == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], seq)
        else:
            runs.append((seq, seq))
    return runs
