"""What a camera and a network stream have in common: OpenCV waits for a frame, and decodes it into the caller's slot.

It does not know how either is opened. Invariants: a frame's time is taken when it arrived, before it is decoded;
nothing is copied or kept but what OpenCV itself does; a frame that nobody wants is not decoded to pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from agent.errors import Reason, SourceError
from agent.worker.sources import LIVE, Pace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.worker.sources import Frame

MAX_FPS = 1000.0
MAX_BAD = 50
"""Damaged pictures one after the other, after which the source is opened anew."""
HUNG_SLACK_S = 15.0


@dataclass(frozen=True)
class Terms:
    """What the options of every live picture source say.

    `name` is what people may read of it. `timeout_s` bounds one opening and one frame, as far as OpenCV can.
    """

    name: str
    queue_frames: int
    stale_s: float
    timeout_s: float


class Capture:
    """An open capture; see `LiveSource`.

    Args:
        terms: of this source.
        opener: opens it anew and returns the capture, open. Raises SourceError.

    Raises:
        SourceError: it does not open, or delivers no picture.
    """

    blocks: Literal[True] = True
    dtype = "uint8"

    def __init__(self, terms: Terms, opener: Callable[[], cv2.VideoCapture]) -> None:
        self._terms, self._opener = terms, opener
        self.detail, self._bad = "", 0
        self._capture = opener()
        ok, first = self._capture.read()
        if not ok or first.ndim != 3 or first.dtype != np.uint8:
            self._capture.release()
            raise SourceError(
                Reason.SOURCE_UNREADABLE, f"{terms.name} opens but gives no picture", hint="look at it with ffplay"
            )
        self.shape: tuple[int, ...] = first.shape
        self.pace = Pace(LIVE, self._own_fps(), paced=False, queue_frames=terms.queue_frames)
        self.stale_s = terms.stale_s
        self.hung_s = 3 * terms.timeout_s + HUNG_SLACK_S
        self.feed: Callable[[int, Sequence[Any]], None] | None = None

    def wait_into(self, slot: Frame | None) -> int | None:
        """See `LiveSource.wait_into`. A picture that was damaged on its way is skipped and counted."""
        for _ in range(MAX_BAD):
            t_ns = self._grab()
            if slot is None or self._retrieve(slot):
                return t_ns
            self._bad += 1
            self.detail = f"{self._bad} damaged pictures skipped"
        raise SourceError(Reason.SOURCE_UNREADABLE, f"{self._terms.name} sends nothing that can be decoded")

    def _grab(self) -> int:
        """Wait for a picture; when it arrived."""
        began_ns = time.monotonic_ns()
        came = self._capture.grab()
        t_ns = time.monotonic_ns()
        # when the wait is over FFmpeg first gives out the old frame that its decoder still held
        if not came or t_ns - began_ns >= self._terms.timeout_s * 1e9:
            raise SourceError(Reason.SOURCE_LOST, f"{self._terms.name} stopped sending")
        return t_ns

    def _retrieve(self, slot: Frame) -> bool:
        """Decode the picture into `slot`; False when it is damaged."""
        try:
            ok, frame = self._capture.retrieve(slot)
        except cv2.error:
            return False
        if ok and frame.ctypes.data != slot.ctypes.data:  # OpenCV could not use the slot
            self._changed(frame.shape)
        return bool(ok)

    def reopen(self) -> None:
        """See `LiveSource.reopen`."""
        self._capture.release()
        self._capture = self._opener()
        size = tuple(round(self._capture.get(p)) for p in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
        if all(size) and size != self.shape[:2]:
            self._changed(size)

    def interrupt(self) -> None:
        """Nothing can: OpenCV's calls end by their own time-outs."""

    def close(self) -> None:
        """Release the camera or connection."""
        self._capture.release()

    def _changed(self, shape: tuple[int, ...]) -> None:
        raise SourceError(
            Reason.SOURCE_CHANGED,
            f"{self._terms.name} changed from {self.shape[1]}x{self.shape[0]} to {shape[1]}x{shape[0]} pixels",
        )

    def _own_fps(self) -> float:
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        return fps if math.isfinite(fps) and 0 < fps <= MAX_FPS else 0.0
