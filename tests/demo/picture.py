"""The demo's picture: the same places of the clip under both releases, with the boxes that came over MQTT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

COLOURS = {"bolt": (80, 200, 255), "nut": (120, 255, 120), "washer": (255, 170, 90)}


def frame_at(clip: Path, index: int) -> np.ndarray:
    """Frame `index` of the clip, uint8 BGR.

    Raises:
        ValueError: the clip has no such frame.
    """
    capture = cv2.VideoCapture(str(clip))
    try:
        for _ in range(index + 1):
            ok, frame = capture.read()
            if not ok:
                raise ValueError(f"{clip} has no frame {index}")
        return np.asarray(frame)
    finally:
        capture.release()


def annotate(frame: np.ndarray, items: Sequence[Mapping[str, Any]], title: str) -> np.ndarray:
    """A copy of `frame` with boxes, scores and a title bar."""
    picture = frame.copy()
    for item in items:
        x0, y0, x1, y1 = (round(value) for value in item["box"])
        colour = COLOURS.get(item["label"], (255, 255, 255))
        cv2.rectangle(picture, (x0, y0), (x1, y1), colour, 2, cv2.LINE_AA)
        _text(picture, f"{item['label']} {item['score']:.2f}", (max(2, x0), max(44, y0 - 5)), 0.45, colour)
    cv2.rectangle(picture, (0, 0), (picture.shape[1], 28), (24, 24, 24), -1)
    _text(picture, title, (8, 20), 0.5, (255, 255, 255))
    return picture


def _text(picture: np.ndarray, text: str, at: tuple[int, int], size: float, colour: tuple[int, int, int]) -> None:
    # a shadow, not a thicker outline: the width of letters grows with their thickness
    cv2.putText(picture, text, (at[0] + 1, at[1] + 1), cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def mosaic(panels: Sequence[np.ndarray], columns: int, out: Path) -> None:
    """Write `panels`, all of one size, row by row into one picture."""
    rows = [np.hstack(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    if not cv2.imwrite(str(out), np.vstack(rows)):
        raise OSError(f"cannot write {out}")
