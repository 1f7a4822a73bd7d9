"""The ring of frames: one memfd that a source writes and every reader maps read-only.

It holds pixels alone: which slot holds which frame travels through the readers' sockets, never through shared memory.
Invariants: after `RingWriter` exists, nobody else can map the memfd writable, resize it or change its seals; a reader's
mapping can neither write nor be cut short under it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from agent import memfd
from agent.errors import AgentError, Reason

if TYPE_CHECKING:
    from agent.worker.sources import Frame

F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the fcntl module has no name for it
MAX_RING_BYTES = 1 << 30
_PAGE = 4096
_NO_RESIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def slot_bytes(height: int, width: int, channels: int) -> int:
    """Length of one slot: the frame, rounded up to whole pages."""
    return -(-height * width * channels // _PAGE) * _PAGE


class RingWriter:
    """The source's side.

    Pages of a slot are taken from the system when it is first used, so a ring costs what was needed at once so far.

    Args:
        slots: how many frames fit.
        height, width, channels: of every frame, uint8.

    Raises:
        AgentError: `bad_message` when the ring would be larger than `MAX_RING_BYTES`.
    """

    def __init__(self, slots: int, height: int, width: int, channels: int) -> None:
        self.slot_bytes = slot_bytes(height, width, channels)
        length = slots * self.slot_bytes
        if not 0 < length <= MAX_RING_BYTES:
            raise AgentError(
                Reason.BAD_MESSAGE,
                f"{slots} frames of {width}x{height} need {length} bytes, more than {MAX_RING_BYTES}",
                hint="use a smaller queue_frames or smaller frames",
            )
        self.fd = memfd.create("frames", length)
        mapping = mmap.mmap(self.fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The order is the point: our mapping exists, from here on there is no second writable one.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | _NO_RESIZE)
        self.frames = _views(mapping, slots, self.slot_bytes, height, width, channels)

    def close_fd(self) -> None:
        """Close the descriptor; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_ring(fd: int, slots: int, slot_length: int, height: int, width: int, channels: int) -> list[Frame]:
    """Map a ring for reading: one read-only view per slot. The descriptor stays the caller's.

    Raises:
        AgentError: `bad_message` when the memfd is not sealed as a ring or does not hold these slots.
    """
    if min(slots, slot_length, height, width, channels) < 1 or height * width * channels > slot_length:
        raise AgentError(Reason.BAD_MESSAGE, f"{slots} slots of {slot_length} bytes hold no {width}x{height} frames")
    length = slots * slot_length
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as e:
        raise AgentError(Reason.BAD_MESSAGE, "the ring is not a memfd") from e
    if seals & _NO_RESIZE != _NO_RESIZE or os.fstat(fd).st_size != length or length > MAX_RING_BYTES:
        raise AgentError(Reason.BAD_MESSAGE, f"the ring is not a sealed memfd of {length} bytes")
    mapping = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ)
    return _views(mapping, slots, slot_length, height, width, channels)


def _views(mapping: mmap.mmap, slots: int, slot_length: int, height: int, width: int, channels: int) -> list[Frame]:
    size = height * width * channels
    return [
        np.frombuffer(mapping, np.uint8, size, slot * slot_length).reshape(height, width, channels)
        for slot in range(slots)
    ]
