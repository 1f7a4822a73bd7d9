"""Encoded pictures into frames. Invariant: bytes and pixels are bounded before anything is decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from agent.errors import AgentError, Reason

if TYPE_CHECKING:
    from agent.worker.sources import Frame

MAX_IMAGE_BYTES = 32 << 20


def decode_image(data: bytes | memoryview) -> Frame:
    """A PNG, JPEG … as uint8 [height, width, 3] BGR. OpenCV bounds the pixels (`OPENCV_IO_MAX_IMAGE_PIXELS`).

    Raises:
        AgentError: `image_unreadable`.
    """
    if not 0 < len(data) <= MAX_IMAGE_BYTES:
        raise _unreadable(f"an image of {len(data)} bytes")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as e:
        raise _unreadable(f"OpenCV refuses the image: {e.err}") from e
    if image is None:
        raise _unreadable("OpenCV knows no image in these bytes")
    return np.asarray(image, np.uint8)


def _unreadable(message: str) -> AgentError:
    return AgentError(Reason.IMAGE_UNREADABLE, message, hint="give a whole PNG or JPEG file")
