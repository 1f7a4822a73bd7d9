"""The motion gate: frames that look like the ones before need no inference.

Each frame is shrunk to a small grey picture and compared with a background that follows slowly, so that a creeping
shadow is no motion and a parked car stops being one. The camera's noise stays below `NOISE_STEPS`.
Invariants: the first frame passes; a frame passes at the latest `refresh_s` after the last one that did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from agent.worker.sources import Frame

WIDTH, HEIGHT = 80, 60
NOISE_STEPS = 12
"""Grey levels by which a pixel of the small picture must differ; sensor noise shrunk eightfold stays within a few."""
FOLLOW = 0.02
"""Share of a new frame in the background: at 30 frames a second half of a change is taken over in about a second."""


class MotionGate:
    """Decides which frames are worth a look.

    Args:
        share: of the picture that must differ from the background, 0 to 1.
        refresh_s: longest time between two frames that pass.
    """

    def __init__(self, share: float, refresh_s: float) -> None:
        self._least = max(1, round(share * WIDTH * HEIGHT))
        self._refresh_ns = round(refresh_s * 1e9)
        self._passed_ns: int | None = None
        self._small = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        self._grey = np.empty((HEIGHT, WIDTH), np.uint8)
        self._known = np.empty((HEIGHT, WIDTH), np.uint8)
        self._background = np.empty((HEIGHT, WIDTH), np.float32)

    def passes(self, frame: Frame, t_ns: int) -> bool:
        """Whether to look at `frame` (uint8 [height, width, 3] BGR) of time `t_ns` (CLOCK_MONOTONIC)."""
        cv2.resize(frame, (WIDTH, HEIGHT), dst=self._small, interpolation=cv2.INTER_LINEAR)
        cv2.cvtColor(self._small, cv2.COLOR_BGR2GRAY, dst=self._grey)
        if self._passed_ns is None:
            np.copyto(self._background, self._grey)
            self._passed_ns = t_ns
            return True
        cv2.convertScaleAbs(self._background, dst=self._known)
        cv2.absdiff(self._grey, self._known, dst=self._known)
        moved = int(np.count_nonzero(self._known > NOISE_STEPS)) >= self._least
        cv2.accumulateWeighted(self._grey, self._background, FOLLOW)
        if moved or t_ns - self._passed_ns >= self._refresh_ns:
            self._passed_ns = t_ns
            return True
        return False
