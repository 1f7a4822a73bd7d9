"""A model worker's end of a ring: maps the frames and speaks notice and credit with the source.

Invariant: the reader touches a slot only between the notice that lent it and the credit that returns it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from agent import protocol
from agent.worker import ring

if TYPE_CHECKING:
    from agent.worker.sources import Frame


BLANK_GREY = 114


class Lent(NamedTuple):
    """A frame this reader may read until it gives `slot` back. `t_ns` is CLOCK_MONOTONIC; `found` what the line before
    found in it; `followed` whether another line waits for what is found here."""

    seq: int
    t_ns: int
    slot: int
    frame: Frame
    found: bytes = b""
    followed: bool = False


class RingReader:
    """An attached ring.

    Args:
        message: geometry of the ring.
        ring_fd: the ring; stays the caller's.
        notices_fd: the notice socket; becomes the reader's once this returns.
        join: makes that socket of it.

    Raises:
        AgentError: `bad_message` when the ring is not what the message says.
    """

    def __init__(
        self,
        message: protocol.AttachRing,
        ring_fd: int,
        notices_fd: int,
        join: Callable[[int], socket.socket] = lambda fd: socket.socket(fileno=fd),
    ) -> None:
        self._frames = ring.map_ring(ring_fd, message.slots, message.slot_bytes, message.dtype, message.shape)
        self._sock = join(notices_fd)
        self._sock.setblocking(True)
        self._notice = bytearray(protocol.NOTICE.size + protocol.MAX_FOUND_BYTES + 1)
        self.answered = 0
        self.last_seq = -1

    def fileno(self) -> int:
        """Descriptor of the notice socket, for a selector."""
        return self._sock.fileno()

    def blank(self) -> Frame:
        """An array like the ring's frames, mid-grey or zero, for a run before the first frame."""
        like = self._frames[0]
        return np.full_like(like, BLANK_GREY if like.dtype == np.uint8 else 0)

    def ask(self) -> bool:
        """Ask for the first frame; False when the source is gone."""
        return self._credit(protocol.FIRST_CREDIT)

    def receive(self) -> Lent | None:
        """The frame of the next notice; None at the end, and for anything that is no notice of this ring."""
        try:
            length = self._sock.recv_into(self._notice)
        except OSError:
            return None
        if not protocol.NOTICE.size <= length < len(self._notice):
            return None
        seq, t_ns, slot, flags = protocol.NOTICE.unpack_from(self._notice)
        if slot >= len(self._frames):
            return None
        found = bytes(self._notice[protocol.NOTICE.size : length])
        return Lent(seq, t_ns, slot, self._frames[slot], found, bool(flags & protocol.FOLLOWED))

    def give_back(self, lent: Lent, found: bytes = b"") -> bool:
        """Return a frame that was answered, with what was `found` in it for a line that follows, and ask for the next;
        False when the source is gone."""
        self.answered += 1
        self.last_seq = lent.seq
        return self._credit(lent.slot, found)

    def close(self) -> None:
        """End the connection to the source."""
        self._sock.close()

    def _credit(self, slot: int, found: bytes = b"") -> bool:
        try:
            return self._sock.send(protocol.CREDIT.pack(slot) + found) == protocol.CREDIT.size + len(found)
        except OSError:
            return False
