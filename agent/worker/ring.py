"""The ring of frames: one memfd that a source writes and every reader maps read-only.

It holds pixels alone: which slot holds which frame travels through the readers' sockets, never through shared memory.
Invariants: after `RingWriter` exists, nobody else can map the memfd writable, resize it or change its seals; a reader's
mapping can neither write nor be cut short under it.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from agent import memfd
from agent.errors import AgentError, Reason

if TYPE_CHECKING:
    from agent.worker.sources import Frame

F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the fcntl module has no name for it
MAX_RING_BYTES = 1 << 30
FRAME_DTYPES = ("uint8", "int16", "float32")
MAX_FRAME_RANK = 4
_PAGE = 4096
_NO_RESIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def slot_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Length of one slot: the frame, rounded up to whole pages."""
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // _PAGE) * _PAGE


class RingWriter:
    """The source's side.

    Pages of a slot are taken from the system when it is first used, so a ring costs what was needed at once so far.

    Args:
        slots: how many frames fit.
        dtype, shape: of every frame; a dtype of `FRAME_DTYPES`.

    Raises:
        AgentError: `bad_message` when the ring would be larger than `MAX_RING_BYTES`.
    """

    def __init__(self, slots: int, dtype: str, shape: Sequence[int]) -> None:
        self.slot_bytes = slot_bytes(dtype, shape)
        length = slots * self.slot_bytes
        if not 0 < length <= MAX_RING_BYTES:
            raise AgentError(
                Reason.BAD_MESSAGE,
                f"{slots} frames of {list(shape)} need {length} bytes, more than {MAX_RING_BYTES}",
                hint="use a smaller queue_frames or smaller frames",
            )
        self.fd = memfd.create("frames", length)
        mapping = mmap.mmap(self.fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The order is the point: our mapping exists, from here on there is no second writable one.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | _NO_RESIZE)
        self.frames = _views(mapping, slots, self.slot_bytes, dtype, shape)

    def close_fd(self) -> None:
        """Close the descriptor; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_ring(fd: int, slots: int, slot_length: int, dtype: str, shape: Sequence[int]) -> list[Frame]:
    """Map a ring for reading: one read-only view per slot. The descriptor stays the caller's.

    Raises:
        AgentError: `bad_message` when the memfd is not sealed as a ring or does not hold these slots.
    """
    known = dtype in FRAME_DTYPES and 0 < len(shape) <= MAX_FRAME_RANK and min(slots, slot_length, *shape) > 0
    if not known or slot_bytes(dtype, shape) > slot_length:
        raise AgentError(
            Reason.BAD_MESSAGE, f"{slots} slots of {slot_length} bytes hold no {dtype[:20]} frames of {list(shape)[:8]}"
        )
    length = slots * slot_length
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as e:
        raise AgentError(Reason.BAD_MESSAGE, "the ring is not a memfd") from e
    if seals & _NO_RESIZE != _NO_RESIZE or os.fstat(fd).st_size != length or length > MAX_RING_BYTES:
        raise AgentError(Reason.BAD_MESSAGE, f"the ring is not a sealed memfd of {length} bytes")
    mapping = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ)
    return _views(mapping, slots, slot_length, dtype, shape)


def _views(mapping: mmap.mmap, slots: int, slot_length: int, dtype: str, shape: Sequence[int]) -> list[Frame]:
    size = math.prod(shape)
    return [np.frombuffer(mapping, dtype, size, slot * slot_length).reshape(shape) for slot in range(slots)]
