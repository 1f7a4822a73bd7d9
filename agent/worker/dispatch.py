"""Which frame goes to which reader: every decision of a source process, without a socket, a clock or a pixel.

Rules:
1. A line exists from its first active reader on. From then on every frame is offered to it once, in order.
2. A reader holds at most one frame, its lease. It gets one only after it asked (a credit), and only while it is active.
3. Frames that wait are pending, at most `queue_frames` a line. `live`: a frame that finds the queue full throws the
   older ones out (`backlog`, or `no_reader` when the line has none) and stays. `every`: the source is told to wait.
4. A switch moves the line to another reader at the next undelivered frame; the old reader keeps its lease and is ended
   when it has returned it.
5. A reader that is lost drops its lease; what is pending waits for the next reader. A line whose active reader is
   detached on request ends, and its pending frames with it. Without any line the source rests.
6. A slot is free when it is neither pending on a line nor leased to a reader.
7. A line may follow another: it is offered not what comes, but what a reader of the other gives back with something
   found in it, together with that. One such frame may be pending: `live`, a newer one throws it out; `every`, the other
   line waits for it, and around a switch of that the order may be another. A line that follows keeps no source awake.
Invariants: every frame offered to a line is exactly once delivered or dropped, and delivered frames of a line go out in
order; pending frames of lines that do not follow lie in the last `queue_frames` frames, so `slots_needed` slots always
suffice.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.errors import AgentError, Reason
from agent.worker.sources import LIVE

MAX_READERS = 8

BACKLOG = "backlog"
NO_READER = "no_reader"
WORKER_LOST = "worker_lost"
STOPPED = "stopped"


def slots_needed(queue_frames: int) -> int:
    """Slots with which a frame being decoded always has one: pending, leased, pending on lines that follow, itself."""
    return queue_frames + 2 * MAX_READERS + 1


class Notify(NamedTuple):
    """Tell `reader` of a frame; it now holds `slot`. `found` is what the line it follows found in it; a `followed`
    reader shall say what it found when it gives the slot back."""

    reader: int
    seq: int
    t_ns: int
    slot: int
    found: bytes = b""
    followed: bool = False


@dataclass(frozen=True)
class Drop:
    """Frames of `line` that nobody will answer."""

    line: str
    seqs: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Ended:
    """Nothing more will come for `reader`: end its socket."""

    reader: int


@dataclass(frozen=True)
class Moved:
    """From `first_seq` on the frames of `line` go to `reader`."""

    line: str
    reader: int
    first_seq: int


Effect = Notify | Drop | Ended | Moved


class _Frame(NamedTuple):
    seq: int
    t_ns: int
    slot: int
    found: bytes = b""


@dataclass
class _Reader:
    line: str
    after: str
    asked: bool = False
    lease: _Frame | None = None
    followed: bool = False
    ending: bool = False


@dataclass
class _Line:
    after: str = ""
    active: int | None = None
    newest: int = -1
    pending: deque[_Frame] = field(default_factory=deque)


class Dispatch:
    """State of one source's frames and readers.

    Args:
        policy: `live` or `every`.
        queue_frames: most pending frames of a line, at least 1.
    """

    def __init__(self, policy: str, queue_frames: int) -> None:
        self._live = policy == LIVE
        self._queue_frames = queue_frames
        self._uses = [0] * slots_needed(queue_frames)
        self._readers: dict[int, _Reader] = {}
        self._lines: dict[str, _Line] = {}
        self._next_seq = 0
        self.started = False
        """Whether an active reader has ever asked for a frame: the source's clock runs from then on."""

    @property
    def next_seq(self) -> int:
        """Number of the next frame."""
        return self._next_seq

    @property
    def idle(self) -> bool:
        """Whether every frame was delivered and returned, or dropped."""
        return not any(self._uses)

    @property
    def at_rest(self) -> bool:
        """Whether nothing can be done for a reader before the next frame: none is pending, and nobody is to leave."""
        if not self.started:
            return False
        # loops here and below, which run for each frame: a generator's frame of its own would cost more than they do
        for line in self._lines.values():
            if line.pending or line.after:
                return False
        for reader in self._readers.values():  # noqa: SIM110
            if reader.ending:
                return False
        return True

    def free_slot(self) -> int | None:
        """Where the next frame may be decoded to; None when the source has to wait: nobody listens, or `every`.

        The lowest free slot is the one used last: its pages exist and are in the cache.
        """
        wanted = False
        for line in self._lines.values():
            if not line.after:
                if not self._live and len(line.pending) >= self._queue_frames:
                    return None
                wanted = True
        return self._uses.index(0) if wanted and 0 in self._uses else None

    def attach(self, reader: int, line: str, active: bool, after: str = "") -> list[Effect]:
        """A new reader, of a line that follows `after` where that is given. An active one takes over the line as by
        `switch`.

        Raises:
            AgentError: `bad_message` for a number in use, or one reader too many.
        """
        if reader in self._readers:
            raise AgentError(Reason.BAD_MESSAGE, f"reader {reader} is attached already")
        if len(self._readers) >= MAX_READERS:
            raise AgentError(Reason.BAD_MESSAGE, f"a source serves at most {MAX_READERS} readers")
        self._readers[reader] = _Reader(line, after)
        if not active:
            return []
        state = self._lines.setdefault(line, _Line(self._readers[reader].after))
        if state.active is not None:
            return self.switch(line, reader)
        state.active = reader
        return []

    def credit(self, reader: int, slot: int | None, found: bytes = b"") -> list[Effect]:
        """A reader asks for a frame, and gives `slot` back (None: its first request) with what it `found` there.

        Raises:
            AgentError: `bad_message` when it does not hold that slot, asks twice, or says what it found when nobody
                wanted to know; the caller loses the reader then.
        """
        state = self._readers[reader]
        held = None if state.lease is None else state.lease.slot
        if held != slot or state.asked:
            raise AgentError(Reason.BAD_MESSAGE, f"reader {reader} returns slot {slot} but holds {held}")
        if found and not state.followed:
            raise AgentError(Reason.BAD_MESSAGE, f"reader {reader} says more than it was asked")
        effects: list[Effect] = []
        if state.lease is not None:
            if found:
                effects += self._pass_on(state.line, state.lease, found)
            self._release(state.lease)
            state.lease, state.followed = None, False
        if state.ending:
            return [*effects, Ended(reader)]
        state.asked = True
        line = self._lines.get(state.line)
        if line is None or line.active != reader:
            return effects
        if line.pending:
            effects += self._pump(line)
        if line.after:
            effects += self._pump_before(line)
        else:
            self.started = True
        return effects

    def offer(self, slot: int, t_ns: int) -> list[Effect]:
        """The next frame lies in `slot`, which `free_slot` named."""
        frame = _Frame(self._next_seq, t_ns, slot)
        self._next_seq += 1
        effects: list[Effect] = []
        for name, line in self._lines.items():
            if line.after:
                continue
            if len(line.pending) >= self._queue_frames:
                effects += self._flush(name, line, BACKLOG if line.active is not None else NO_READER)
            self._uses[slot] += 1
            line.pending.append(frame)
            effects += self._pump(line)
        return effects

    def switch(self, line: str, reader: int) -> list[Effect]:
        """From the next undelivered frame on the line goes to `reader`.

        Raises:
            AgentError: `bad_message` when `reader` is not one of the line's, or on its way out.
        """
        new = self._readers.get(reader)
        if new is None or new.line != line or new.ending:
            raise AgentError(Reason.BAD_MESSAGE, f"reader {reader} is not attached to line {line[:40]!r}")
        state = self._lines.setdefault(line, _Line(self._readers[reader].after))
        old = state.active
        state.active = reader
        first_seq = state.pending[0].seq if state.pending else self._next_seq
        effects: list[Effect] = [Moved(line, reader, first_seq)]
        if old is not None and old != reader:
            self._readers[old].ending = True
            if self._readers[old].lease is None:
                effects.append(Ended(old))
        if new.asked and not state.after:
            self.started = True
        return effects + self._pump(state) + self._pump_before(state)

    def lost(self, reader: int) -> list[Effect]:
        """A reader's socket ended: what it held is dropped, what is pending waits for the next one."""
        return self._forget(reader, WORKER_LOST)

    def detach(self, reader: int, reason: str) -> list[Effect]:
        """Forget a reader on request; with its active reader the line ends, and its pending frames with it.

        A reader that is not attached was lost a moment ago: nothing is left to do.
        """
        if reader not in self._readers:
            return []
        name = self._readers[reader].line
        line = self._lines.get(name)
        ends_line = line is not None and line.active == reader
        effects = self._forget(reader, reason)
        if line is not None and ends_line:
            effects += self._flush(name, line, NO_READER)
            del self._lines[name]
            effects += self._pump_before(line)
        return effects

    def stop(self) -> list[Effect]:
        """No more frames: pending ones are dropped, readers end when they have returned what they hold."""
        effects: list[Effect] = []
        for name, line in self._lines.items():
            effects += self._flush(name, line, STOPPED)
        self._lines.clear()
        for number, reader in self._readers.items():
            if not reader.ending:
                reader.ending = True
                if reader.lease is None:
                    effects.append(Ended(number))
        return effects

    def _forget(self, reader: int, reason: str) -> list[Effect]:
        state = self._readers.pop(reader)
        line = self._lines.get(state.line)
        if line is not None and line.active == reader:
            line.active = None
        if state.lease is None:
            return []
        self._release(state.lease)
        return [Drop(state.line, (state.lease.seq,), reason)]

    def _flush(self, name: str, line: _Line, reason: str) -> list[Effect]:
        dropped = tuple(line.pending)
        line.pending.clear()
        for frame in dropped:
            self._release(frame)
        return [Drop(name, tuple(frame.seq for frame in dropped), reason)] if dropped else []

    def _pump(self, line: _Line) -> list[Effect]:
        """Hand the oldest pending frame to the active reader if it asked."""
        if line.active is None or not line.pending:
            return []
        reader = self._readers[line.active]
        if not reader.asked:
            return []
        followers = self._following(reader.line)
        if not self._live and any(follower.pending for _, follower in followers):
            return []
        frame = line.pending.popleft()
        reader.asked = False
        reader.lease = frame  # the use moves from the queue to the lease
        reader.followed = bool(followers)
        return [Notify(line.active, frame.seq, frame.t_ns, frame.slot, frame.found, reader.followed)]

    def _pump_before(self, line: _Line) -> list[Effect]:
        """Go on with the line that `line` follows: it may have waited for it."""
        return self._pump(self._lines[line.after]) if line.after in self._lines else []

    def _following(self, name: str) -> list[tuple[str, _Line]]:
        return [(follower, line) for follower, line in self._lines.items() if line.after == name]

    def _pass_on(self, name: str, frame: _Frame, found: bytes) -> list[Effect]:
        """Offer a frame that a reader of line `name` gives back to the lines that follow."""
        effects: list[Effect] = []
        for follower, line in self._following(name):
            if self._live and frame.seq < line.newest:
                # two workers of the other line had frames at once, and the one that was put out of charge was slower
                effects.append(Drop(follower, (frame.seq,), BACKLOG))
                continue
            line.newest = frame.seq
            if self._live:
                effects += self._flush(follower, line, BACKLOG if line.active is not None else NO_READER)
            self._uses[frame.slot] += 1
            line.pending.append(_Frame(frame.seq, frame.t_ns, frame.slot, found))
            effects += self._pump(line)
        return effects

    def _release(self, frame: _Frame) -> None:
        self._uses[frame.slot] -= 1
