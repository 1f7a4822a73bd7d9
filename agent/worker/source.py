"""The source process: decodes frames into the ring at their time and moves notices and credits.

Thin: what goes where is decided in `dispatch`, what a frame is in `sources`. One thread, one `select`.
Invariants: a reader's socket is drained before a request of the daemon is obeyed, so a death that the daemon already
knows of is never news to the dispatch; a full or broken notice socket counts as a lost reader, never blocks.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Mapping, Sequence

from agent import protocol
from agent.errors import AgentError, ConfigError, Reason, SourceError
from agent.worker import channel, dispatch, ring
from agent.worker.sources import Source, SourceOpener

MAX_LATE_S = 0.5
STATE_EVERY_NS = 1_000_000_000
"""A paced source that is later than this gives up the lost time instead of hurrying after it."""


def run(link: channel.Channel, kinds: Mapping[str, SourceOpener]) -> int:
    """Serve one source until the daemon ends it."""
    process = _SourceProcess(link, kinds)
    while process.turn():
        pass
    return 0


class _SourceProcess:
    def __init__(self, link: channel.Channel, kinds: Mapping[str, SourceOpener]) -> None:
        self._link = link
        self._kinds = kinds
        self._readers: dict[int, socket.socket] = {}
        self._numbers: dict[int, int] = {}  # descriptor to reader
        self._source: Source | None = None
        self._frames = 0
        self._said_ns = 0
        self._late = False
        self._due_ns: int | None = None
        self._running = True

    def turn(self) -> bool:
        """Wait for the next thing to do and do it; False when the process shall end."""
        # select, not poll: its time-out has microseconds, and a frame should leave at its tick.
        ready, _, _ = select.select([self._link.fileno(), *self._numbers], [], [], self._timeout_s())
        for fd in ready:
            if fd in self._numbers:
                self._hear(self._numbers[fd])
        if self._link.fileno() in ready:
            # Again, because a reader may have died since, and the daemon may know.
            for reader in list(self._readers):
                self._hear(reader)
            if not self._link.serve_one(self._obey):
                return False
        self._advance()
        return True

    # --- frames ------------------------------------------------------------------------------------------------------

    def _timeout_s(self) -> float | None:
        """Until the next frame is due; None while only a message can change anything."""
        if self._source is None or not self._running or not self._dispatch.started:
            return None
        if self._dispatch.free_slot() is None:
            return None
        if self._due_ns is None:
            return 0.0
        return max(0.0, (self._due_ns - time.monotonic_ns()) / 1e9)

    def _advance(self) -> None:
        """Decode the next frame if its time has come and there is room for it."""
        if self._source is None or not self._running or not self._dispatch.started:
            return
        slot = self._dispatch.free_slot()
        if slot is None:
            self._late = True
            return
        now = time.monotonic_ns()
        pace = self._source.pace
        if self._due_ns is None or not pace.paced:
            self._due_ns = now
        elif self._late or now - self._due_ns > MAX_LATE_S * 1e9:
            # A reader of `every` held us up, or the machine slept: go on from here.
            self._due_ns = max(self._due_ns, now)
        self._late = False
        if now < self._due_ns:
            return
        try:
            more = self._source.read_into(self._ring.frames[slot])
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
            self._due_ns += round(1e9 / pace.fps)
        if now - self._said_ns >= STATE_EVERY_NS:
            self._said_ns = now
            self._link.send(protocol.SourceState("streaming", "", self._frames))

    def _end(self, detail: str) -> None:
        self._running = False
        self._link.send(protocol.SourceState("ended", channel.one_line(detail), self._frames))

    # --- readers -----------------------------------------------------------------------------------------------------

    def _hear(self, reader: int) -> None:
        """Take every credit that has arrived; notice when the reader is gone."""
        sock = self._readers.get(reader)
        while sock is not None:
            try:
                data = sock.recv(protocol.CREDIT.size + 1)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if len(data) != protocol.CREDIT.size:
                return self._lose(reader)
            (slot,) = protocol.CREDIT.unpack(data)
            try:
                effects = self._dispatch.credit(reader, None if slot == protocol.FIRST_CREDIT else slot)
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
                    self._readers[effect.reader].send(
                        protocol.NOTICE.pack(effect.seq, effect.t_ns, effect.slot, 0), socket.MSG_DONTWAIT
                    )
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
                self._source.close()
            return False
        elif self._source is None:
            raise AgentError(Reason.BAD_MESSAGE, f"{type(message).__name__} before OpenSource")
        elif isinstance(message, protocol.AttachReader):
            self._attach(message, packet)
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
        self._ring = ring.RingWriter(slots, source.dtype, source.shape)
        self._dispatch = dispatch.Dispatch(pace.policy, pace.queue_frames)
        self._source = source
        opened = protocol.SourceOpened(source.dtype, list(source.shape), pace.fps, slots, self._ring.slot_bytes)
        self._link.send(opened, (self._ring.fd,))
        self._ring.close_fd()

    def _attach(self, message: protocol.AttachReader, packet: protocol.Packet) -> None:
        (fd,) = packet.take(1)
        try:
            effects = self._dispatch.attach(message.reader, message.line, message.active)
        except AgentError:
            os.close(fd)
            raise
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        self._readers[message.reader] = sock
        self._numbers[sock.fileno()] = message.reader
        self._apply(effects)
