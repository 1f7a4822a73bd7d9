"""What detection heads share: the best candidates, class-wise suppression, and boxes in source pixels.

Boxes are float64 [n, 4] of x0, y0, x1, y1 in pixels of the model's input, edges, until `detections` maps them.
Invariant: however many candidates a model names, `MAX_CANDIDATES` are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.worker.graph import Graph
from agent.worker.postprocess.outputs import best_first, items_that_fit
from agent.worker.preprocess import Inverse
from agent.worker.results import Detection, Item

MAX_CANDIDATES = 512
_FARTHEST = 1e6
ITEM_BYTES = 90

Boxes = NDArray[np.float64]
Indices = NDArray[np.int64]


def candidates(scores: NDArray[Any], least: float, most: int = MAX_CANDIDATES) -> Indices:
    """Indices of what is not below `least` in a vector, best first, at most `most`."""
    found = np.flatnonzero(scores >= least)
    return found[best_first(scores[found], most)] if found.size else found


def around(centres_and_sizes: Boxes) -> Boxes:
    """[n, 4] of centre x, centre y, width, height to edges; a negative size is none."""
    boxes = np.empty((len(centres_and_sizes), 4))
    half = np.maximum(centres_and_sizes[:, 2:4], 0) * 0.5
    np.subtract(centres_and_sizes[:, :2], half, out=boxes[:, :2])
    np.add(centres_and_sizes[:, :2], half, out=boxes[:, 2:])
    return boxes


def suppress(boxes: Boxes, scores: NDArray[Any], labels: NDArray[Any], iou: float, most: int) -> Indices:
    """Indices of the boxes that class-wise non-maximum suppression keeps, best first, at most `most`.

    Args:
        boxes, scores, labels: of candidates, best first. Boxes that hold no numbers are not kept.
    """
    usable = np.isfinite(boxes).all(axis=1)
    kept = np.arange(len(boxes)) if usable.all() else np.flatnonzero(usable)
    if len(kept) > 1:
        # the classes are told apart by moving their boxes asunder: what lies beyond all pictures would break that
        sized = np.clip(boxes[kept], -_FARTHEST, _FARTHEST)
        sized[:, 2:] -= sized[:, :2]
        strengths = np.clip(scores[kept], 0, 1)
        chosen = cv2.dnn.NMSBoxesBatched(sized.tolist(), strengths.tolist(), labels[kept].tolist(), 0.0, iou)
        kept = kept[np.sort(np.asarray(chosen, np.int64).reshape(-1))]
    return kept[:most]


def detections(
    labels: Sequence[str], inverse: Inverse, boxes: Boxes, scores: NDArray[Any], classes: NDArray[Any]
) -> list[Item]:
    """Detections of these boxes, without those that lie beside the frame. `labels` has a name for each class."""
    mapped = np.round(inverse.boxes(boxes), 2).tolist()
    rounded = np.round(np.clip(scores, 0, 1).astype(np.float64), 4).tolist()
    return [
        Detection(labels[index], score, (x0, y0, x1, y1))
        for index, score, (x0, y0, x1, y1) in zip(classes.tolist(), rounded, mapped, strict=True)
        if x1 > x0 and y1 > y0
    ]


def limit(graph: Graph, declared: int) -> int:
    """Most detections of a frame."""
    return min(declared, items_that_fit(graph, ITEM_BYTES))
