"""The source process: brings frames into the ring and moves notices and credits.

Thin: what goes where is decided in `dispatch`, what a frame is in `sources`, when a live source is lost in `liveness`.
A file is decoded here at its time; a source that blocks is waited for in one thread (`waiter`), so that readers and the
daemon are heard meanwhile. Everything else is one thread and one `select`.
Invariants: a reader's socket is drained before a request of the daemon is obeyed, so a death that the daemon already
knows of is never news to the dispatch; a full or broken notice socket counts as a lost reader, never blocks; once open,
the daemon hears of the source at least every `SAY_EVERY_NS`, so that silence means that this process hangs.
"""

from __future__ import annotations

import os
import random
import select
import socket
import time
from collections.abc import Mapping, Sequence

from agent import protocol
from agent.errors import AgentError, ConfigError, Reason, SourceError
from agent.worker import channel, dispatch, ring
from agent.worker.liveness import ENDED, OPENING, STREAMING, Liveness
from agent.worker.sources import LIVE, LiveSource, Source, SourceOpener
from agent.worker.waiter import Waiter

MAX_LATE_S = 0.5
"""A paced source that is later than this gives up the lost time instead of hurrying after it."""
SAY_EVERY_NS = 1_000_000_000
LEAVE_S = 1.0
MAX_CREDITS = 64
HUNG = 75  # EX_TEMPFAIL


def run(link: channel.Channel, kinds: Mapping[str, SourceOpener]) -> int:
    """Serve one source until the daemon ends it, or until nothing but another process helps."""
    channel.wake_on_time()
    process = SourceProcess(link, kinds)
    while process.turn():
        pass
    process.leave()
    return 0


class SourceProcess:
    """One source, its ring and its readers; driven by `turn`, or by `descriptors` and `act` of who waits for more."""

    def __init__(self, link: channel.Channel, kinds: Mapping[str, SourceOpener]) -> None:
        self._link = link
        self._kinds = kinds
        self._readers: dict[int, socket.socket] = {}
        self._numbers: dict[int, int] = {}  # descriptor to reader
        self._credit = bytearray(protocol.CREDIT.size + protocol.MAX_FOUND_BYTES + 1)
        self._source: Source | LiveSource | None = None
        self._waiter: Waiter | None = None
        self._waited: tuple[int, ...] = ()  # the waiter's descriptor, if there is one
        self._live: Liveness
        self._slot: int | None = None
        self._reopening = False
        self._frames = 0
        self._said_ns = 0
        self._said = ("", "")
        self._ended = ""
        self._late = False
        self._due_ns: int | None = None
        self._running = True
        self._leaving = False
        self._divisor = 1  # see SetPace
        self._skipped = 0

    def turn(self) -> bool:
        """Wait for the next thing to do and do it; False when the process shall end."""
        # select, not poll: its time-out has microseconds, and a frame should leave at its tick.
        ready, _, _ = select.select(self.descriptors(), [], [], self._timeout_s())
        return self.act(ready)

    def descriptors(self) -> list[int]:
        """What is waited for. While no frame waits for a reader, what readers give back can wait for the next frame: to
        be woken for it alone would cost a tenth of what a frame does."""
        if self._source is not None and self._running and self._dispatch.at_rest:
            return [self._link.fileno(), *self._waited]
        return [self._link.fileno(), *self._waited, *self._numbers]

    def act(self, ready: Sequence[int]) -> bool:
        """Do what the `ready` ones of `descriptors` and the clock ask for; False when the process shall end."""
        self._hear_once()
        if ready and self._link.fileno() in ready:
            # To the end, because a reader may have died since, and the daemon may know.
            for reader in list(self._readers):
                self._hear(reader)
            if not self._link.serve_one(self._obey):
                return False
        source = self._source
        if source is not None:
            if source.blocks:
                self._attend(source, bool(self._waited) and self._waited[0] in ready)
            else:
                self._advance(source)
            self._say(time.monotonic_ns())
        return not self._leaving

    def leave(self) -> None:
        """Release the source. One that does not come back from a call is left to the end of the process."""
        if self._source is None:
            return
        if self._source.blocks and self._waiter is not None and self._waiter.busy:
            self._source.interrupt()
            if not select.select(self._waited, [], [], LEAVE_S)[0]:
                os._exit(0)
        self._source.close()

    # --- what the daemon is told -------------------------------------------------------------------------------------

    def _say(self, now_ns: int) -> None:
        """Tell a change at once, and everything from time to time."""
        source = self._source
        assert source is not None
        if source.blocks:
            live = self._live
            state, reason, detail = live.state, live.reason, live.detail
            reconnects, last_ns = live.reconnects, live.last_ns
        else:
            # a file's clock starts with its first reader
            going = STREAMING if self._frames else OPENING
            state, reason, detail = (going, "", "") if self._running else (ENDED, "", self._ended)
            reconnects, last_ns = 0, self._due_ns or 0
        if (state, reason) == self._said and now_ns - self._said_ns < SAY_EVERY_NS:
            return
        self._said, self._said_ns = (state, reason), now_ns
        told = channel.one_line(detail or source.detail)
        self._link.send(protocol.SourceState(state, reason, told, self._frames, reconnects, last_ns))

    def _timeout_s(self) -> float | None:
        """Until time alone changes something."""
        source = self._source
        if source is None:
            return None
        now_ns = time.monotonic_ns()
        next_ns = self._said_ns + SAY_EVERY_NS
        if self._running:
            own_ns = self._live.next_ns() if source.blocks else self._next_frame_ns()
            if own_ns is not None:
                next_ns = min(next_ns, own_ns)
        return max(0.0, (next_ns - now_ns) / 1e9)

    # --- frames of a live source -------------------------------------------------------------------------------------

    def _attend(self, source: LiveSource, done: bool) -> None:
        """Take what the waiter brought, and let it wait again."""
        waiter, now_ns = self._waiter, time.monotonic_ns()
        if waiter is None:
            waiter = self._waiter = Waiter(source)
            self._waited = (waiter.fileno(),)
        elif done:
            waiter.take()
            self._arrived(waiter, now_ns)
        elif not self._live.looked(now_ns):
            # nobody can end a call that never returns but the kernel, with the whole process
            self._say(now_ns)
            source.interrupt()
            os._exit(HUNG)
        if self._running and not waiter.busy:
            self._order(waiter, source, now_ns)

    def _arrived(self, waiter: Waiter, now_ns: int) -> None:
        live, slot = self._live, self._slot
        if waiter.error is not None:
            live.broke(waiter.error, now_ns)
            # frames of another shape need another ring
            self._leaving = waiter.error.reason is Reason.SOURCE_CHANGED
        elif self._reopening:
            live.reopened()
        elif waiter.t_ns is None:
            live.ended("last frame")
            self._running = False
        else:
            live.arrived(waiter.t_ns)
            self._frames += 1
            if slot is not None:
                self._apply(self._dispatch.offer(slot, waiter.t_ns))

    def _order(self, waiter: Waiter, source: LiveSource, now_ns: int) -> None:
        """Wait for the next frame, or try to find a lost source again."""
        retry_ns = self._live.retry_ns
        self._reopening = retry_ns is not None
        if retry_ns is not None:
            if now_ns < retry_ns:
                return
            self._live.called(now_ns, waits=False)
            waiter.reopen()
            return
        self._slot = self._dispatch.free_slot() if self._dispatch.started and self._wanted(source) else None
        if self._slot is None and source.pace.policy != LIVE:
            return  # the readers decide
        # while nobody listens frames are thrown away: what waits in a driver's queue would be old when somebody does
        self._live.called(now_ns, waits=True)
        waiter.wait(None if self._slot is None else self._ring.frames[self._slot])

    def _wanted(self, source: LiveSource) -> bool:
        """Whether the next frame is one to deliver."""
        if self._divisor > 1 and source.pace.policy == LIVE:
            self._skipped = (self._skipped + 1) % self._divisor
            return self._skipped == 0
        return self._divisor != 0

    # --- frames of a file --------------------------------------------------------------------------------------------

    def _next_frame_ns(self) -> int | None:
        """When the next frame is due; None while only a message can change anything."""
        if not self._dispatch.started or self._divisor == 0 or self._dispatch.free_slot() is None:
            return None
        return self._due_ns or 0

    def _advance(self, source: Source) -> None:
        """Decode the next frame if its time has come and there is room for it."""
        if not self._running or not self._dispatch.started or self._divisor == 0:
            return
        slot = self._dispatch.free_slot()
        if slot is None:
            self._late = True
            return
        now = time.monotonic_ns()
        pace = source.pace
        if self._due_ns is None or not pace.paced:
            self._due_ns = now
        elif self._late or now - self._due_ns > MAX_LATE_S * 1e9:
            # A reader of `every` held us up, or the machine slept: go on from here.
            self._due_ns = max(self._due_ns, now)
        self._late = False
        if now < self._due_ns:
            return
        try:
            more = source.read_into(self._ring.frames[slot])
        except SourceError as e:
            self._link.fault(e)
            self._end(e.message)
            return
        if not more:
            self._end("last frame")
            return
        self._frames += 1
        # The frame's time is when it was due: a source that is late must not look fast.
        effects = self._dispatch.offer(slot, self._due_ns)
        self._apply(effects)
        if pace.paced:
            self._due_ns += round(1e9 * self._divisor / pace.fps)

    def _end(self, detail: str) -> None:
        self._running, self._ended = False, detail

    # --- readers -----------------------------------------------------------------------------------------------------

    def _hear_once(self) -> None:
        """Take one credit of each reader that has sent one."""
        for reader in tuple(self._readers):
            self._hear(reader, 1)

    def _hear(self, reader: int, most: int = MAX_CREDITS) -> None:
        """Take the credits that have arrived, an honest reader's one; notice when the reader is gone."""
        sock, data = self._readers.get(reader), self._credit
        while sock is not None and most > 0:
            most -= 1
            try:
                length = sock.recv_into(data)
            except BlockingIOError:
                return
            except OSError:
                length = 0
            if not protocol.CREDIT.size <= length < len(data):
                return self._lose(reader)
            (slot,) = protocol.CREDIT.unpack_from(data)
            found = bytes(data[protocol.CREDIT.size : length])
            try:
                effects = self._dispatch.credit(reader, None if slot == protocol.FIRST_CREDIT else slot, found)
            except AgentError:
                return self._lose(reader)
            self._apply(effects)
            sock = self._readers.get(reader)

    def _lose(self, reader: int) -> None:
        self._close(reader)
        self._apply(self._dispatch.lost(reader))

    def _close(self, reader: int) -> None:
        sock = self._readers.pop(reader)
        del self._numbers[sock.fileno()]
        sock.close()

    def _apply(self, effects: Sequence[dispatch.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, dispatch.Notify):
                try:
                    flags = protocol.FOLLOWED if effect.followed else 0
                    notice = protocol.NOTICE.pack(effect.seq, effect.t_ns, effect.slot, flags)
                    self._readers[effect.reader].send(notice + effect.found, socket.MSG_DONTWAIT)
                except OSError:
                    self._lose(effect.reader)
            elif isinstance(effect, dispatch.Drop):
                self._link.send(protocol.Dropped(effect.line, list(effect.seqs), effect.reason))
            elif isinstance(effect, dispatch.Moved):
                self._link.send(protocol.Switched(effect.line, effect.reader, effect.first_seq))
            elif effect.reader in self._readers:
                try:
                    self._readers[effect.reader].shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it closed first; its end is about to be heard

    # --- requests ----------------------------------------------------------------------------------------------------

    def _obey(self, packet: protocol.Packet) -> bool:
        message = packet.message
        if isinstance(message, protocol.OpenSource):
            self._open(message)
        elif isinstance(message, protocol.StopWorker):
            if self._source is not None:
                self._apply(self._dispatch.stop())
            return False
        elif self._source is None:
            raise AgentError(Reason.BAD_MESSAGE, f"{type(message).__name__} before OpenSource")
        elif isinstance(message, protocol.AttachReader):
            self._attach(message, packet)
        elif isinstance(message, protocol.Feed):
            if not self._source.blocks or self._source.feed is None:
                raise AgentError(Reason.BAD_MESSAGE, "this source hears for itself")
            self._source.feed(message.t_ns, message.rows)
        elif isinstance(message, protocol.SetPace):
            self._divisor = max(0, message.divisor)
        elif isinstance(message, protocol.SwitchReader):
            self._apply(self._dispatch.switch(message.line, message.reader))
        elif isinstance(message, protocol.DetachReader):
            effects = self._dispatch.detach(message.reader, message.reason)
            if message.reader in self._readers:
                self._close(message.reader)
            self._apply(effects)
        else:
            raise channel.unexpected(message, "source")
        return True

    def _open(self, message: protocol.OpenSource) -> None:
        if self._source is not None:
            raise AgentError(Reason.BAD_MESSAGE, "a source process opens one source")
        opener = self._kinds.get(message.kind)
        if opener is None:
            raise ConfigError(
                Reason.BAD_CONFIG,
                f"source {message.name[:40]!r} has the unknown kind {message.kind[:40]!r}",
                hint=f"known kinds: {', '.join(sorted(self._kinds))}",
            )
        source = opener(message.options)
        pace = source.pace
        slots = dispatch.slots_needed(pace.queue_frames)
        try:
            self._ring = ring.RingWriter(slots, source.dtype, source.shape)
        except AgentError:
            source.close()  # the daemon asks again
            raise
        self._dispatch = dispatch.Dispatch(pace.policy, pace.queue_frames)
        if source.blocks:
            self._live = Liveness(source.stale_s, source.hung_s, random.Random())
        self._source = source
        self._said_ns = time.monotonic_ns()
        opened = protocol.SourceOpened(source.dtype, list(source.shape), pace.fps, slots, self._ring.slot_bytes)
        self._link.send(opened, (self._ring.fd,))
        self._ring.close_fd()

    def _end_of(self, fd: int) -> socket.socket:
        """Our end of the way to a reader, which becomes ours."""
        return socket.socket(fileno=fd)

    def _attach(self, message: protocol.AttachReader, packet: protocol.Packet) -> None:
        (fd,) = packet.take(1)
        try:
            effects = self._dispatch.attach(message.reader, message.line, message.active, message.after)
        except AgentError:
            os.close(fd)
            raise
        sock = self._end_of(fd)
        sock.setblocking(False)
        self._readers[message.reader] = sock
        self._numbers[sock.fileno()] = message.reader
        self._apply(effects)
