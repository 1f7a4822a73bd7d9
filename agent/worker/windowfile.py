"""A sensor's window in a file: NumPy's own format, so that golden vectors and `infer` take it in a picture's place.

Invariants: version 1.0 of the format, float32 or float64 [samples, channels] in C order, no pickle; its header may not
promise more than its bytes hold; every number is finite.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import AgentError, Reason
from agent.worker.images import MAX_IMAGE_BYTES, decode_image

if TYPE_CHECKING:
    from agent.worker.sources import Frame

MAGIC = b"\x93NUMPY\x01\x00"
_DTYPES: Mapping[bytes, np.dtype[Any]] = {b"<f4": np.dtype("<f4"), b"<f8": np.dtype("<f8")}
# what numpy.save writes and nothing else: NumPy's own reader evaluates it, and fails on hostile ones in many ways
_HEADER = re.compile(
    rb"\{'descr': '(<f[48])', 'fortran_order': False, 'shape': \(([0-9]{1,9}), ([0-9]{1,9})\), \} *\n", re.ASCII
)
_HEADER_AT = 10


def decode_frame(data: bytes | memoryview) -> Frame:
    """What a source would have given: a picture as `decode_image` reads it, or the window of an .npy file, float32.

    Raises:
        AgentError: `image_unreadable`.
    """
    return _window(bytes(data)) if bytes(data[:6]) == MAGIC[:6] else decode_image(data)


def encode_window(window: NDArray[Any]) -> bytes:
    """The .npy file of a window, as `decode_frame` reads it."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(window, np.float32), (1, 0), allow_pickle=False)
    return out.getvalue()


def _window(data: bytes) -> Frame:
    if len(data) > MAX_IMAGE_BYTES or data[:8] != MAGIC:
        raise _bad(f"a window of {len(data)} bytes, or of another version than 1.0")
    start = _HEADER_AT + int.from_bytes(data[8:_HEADER_AT], "little")
    header = _HEADER.fullmatch(data[_HEADER_AT:start])
    if header is None:
        raise _bad(f"an array that is no window: {data[_HEADER_AT:start][:80]!r}")
    dtype, samples, channels = _DTYPES[header[1]], int(header[2]), int(header[3])
    if samples * channels * dtype.itemsize != len(data) - start:
        raise _bad(f"a window of {samples} samples of {channels} channels in {len(data) - start} bytes")
    with np.errstate(over="ignore"):  # beyond a float32 it is infinite, and refused
        window: Frame = np.frombuffer(data, dtype, offset=start).reshape(samples, channels).astype(np.float32)
    if not window.size or not np.isfinite(window).all():
        raise _bad("a window that is empty, or with numbers that are none")
    return window


def _bad(message: str) -> AgentError:
    return AgentError(
        Reason.IMAGE_UNREADABLE,
        message,
        hint="write it with numpy.save: float32, [samples, channels], in C order",
    )
