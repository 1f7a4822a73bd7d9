"""Whether a ring that a source offers is one that its readers can take.

A source that a stream has taken over must not make a sound model fail, which would be blamed on the model's release.
It maps nothing; the reader's own checks stand.
"""

from __future__ import annotations

import fcntl
import math
import os

from agent import protocol
from agent.errors import AgentError, Reason

MAX_RING_BYTES = 1 << 30
MAX_RANK = 4
ITEM_BYTES = {"uint8": 1, "int16": 2, "float32": 4}
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def check_ring(opened: protocol.SourceOpened, ring: int, *, pictures: bool) -> None:
    """Check the memfd `ring` against what was said of it; `pictures`: frames have to be uint8 [height, width, 3].

    Raises:
        AgentError: `bad_message`.
    """
    shape, item = opened.shape, ITEM_BYTES.get(opened.dtype, 0)
    known = item > 0 and 0 < len(shape) <= MAX_RANK and min(*shape, opened.slots, opened.slot_bytes) > 0
    fits = known and math.prod(shape) * item <= opened.slot_bytes
    length = opened.slots * opened.slot_bytes
    if not fits or length > MAX_RING_BYTES or (pictures and (opened.dtype, shape[2:]) != ("uint8", [3])):
        raise _refused(f"{opened.slots} slots of {opened.slot_bytes} bytes for {opened.dtype[:20]} {shape[:8]}")
    try:
        seals = fcntl.fcntl(ring, fcntl.F_GET_SEALS)
    except OSError as e:
        raise _refused("no memfd") from e
    if seals & _SEALS != _SEALS or os.fstat(ring).st_size != length:
        raise _refused(f"not sealed, or not of {length} bytes")


def _refused(what: str) -> AgentError:
    return AgentError(Reason.BAD_MESSAGE, f"the source process offers a ring that is none: {what}")
