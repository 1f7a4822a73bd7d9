"""A map with a class for each cell: how much of the picture each label covers, and its outlines.

Cells are areas: the outline of a mask runs along the edges of its cells, so a map that is exact gives polygons that
are. Holes are not outlined, but the share does not count them. Cells whose middle lies in a letterbox's bars, outside
the frame, count for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.worker.graph import MAX_SEGMENTED, Graph, Segmentation
from agent.worker.postprocess.outputs import (
    Postprocessor,
    check_labels,
    input_size,
    items_that_fit,
    lowest_score,
    wrong,
)
from agent.worker.preprocess import Inverse
from agent.worker.results import Item, Segment
from agent.worker.tensor import Array, TensorSpec, require_scale

_WANTED = "one map [1, h, w, classes], or [1, h, w] of class numbers"
_POINT_BYTES = 18
_SPREAD = np.ones((2, 2), np.uint8)
_COARSER = 8
"""How often an outline is made coarser before it is left out."""

Mask = NDArray[np.uint8]


def compile_segmentation(
    graph: Graph, declared: Segmentation, outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec]
) -> Postprocessor:
    """The reader of one map."""
    spec = outputs[0]
    rank = len(spec.shape)
    if len(outputs) != 1 or rank not in (3, 4) or spec.shape[0] != 1:
        raise wrong("segmentation", _WANTED, outputs)
    require_scale(spec)
    first = declared.channels == "first" and rank == 4
    height, width = spec.shape[2:4] if first else spec.shape[1:3]
    channels = 1 if rank == 3 else spec.shape[1] if first else spec.shape[3]
    one = channels == 1 and len(graph.labels) == 1
    if channels > 1 or one:
        check_labels(graph, channels)
    if channels > MAX_SEGMENTED or len(graph.labels) > MAX_SEGMENTED:
        raise wrong("segmentation", f"at most {MAX_SEGMENTED} classes", outputs)
    in_height, in_width = input_size("segmentation", inputs)
    cell = (in_width / width, in_height / height)
    least = lowest_score(declared.threshold, spec, sigmoid=declared.sigmoid) if one else 0.0
    classify = _classifier(spec, one, least, channels, first, (height, width), len(graph.labels))
    most = items_that_fit(graph, 100, _POINT_BYTES * declared.max_points)

    def read(tensors: Sequence[Array], inverse: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        if inverse is None:
            return []
        numbers = classify(tensors[0])
        top, bottom, left, right = _seen(inverse, cell, (height, width))
        seen = numbers[top:bottom, left:right]
        if not seen.size:
            return []
        counts = np.bincount(seen.reshape(-1), minlength=257)[:256]
        counts[list(declared.background)] = 0
        told = [
            index for index in np.argsort(-counts, kind="stable").tolist()
            if counts[index] and counts[index] >= declared.min_share * seen.size and index < len(graph.labels)
        ][:most]  # fmt: skip
        left_over = declared.max_points
        items: list[Item] = []
        for index in told:
            mask = np.asarray(numbers == index, np.uint8)
            mask[:top] = mask[bottom:] = 0
            mask[:, :left] = mask[:, right:] = 0
            polygons = _outlines(mask, cell, inverse, left_over)
            left_over -= sum(len(polygon) // 2 for polygon in polygons)
            share = round(float(counts[index]) / seen.size, 4)
            items.append(Segment(graph.label(index), share, _bounds(mask, cell, inverse), polygons))
        return items

    return read


def _classifier(
    spec: TensorSpec, one: bool, least: float, channels: int, first: bool, size: tuple[int, int], labels: int
) -> Callable[[Array], NDArray[Any]]:
    """From the tensor to a class number for each cell, 256 where there is none; uint16 [h, w]."""
    if one:
        return lambda tensor: np.where(tensor.reshape(size) >= least, 0, 256).astype(np.uint16)
    if channels > 1:
        axis = 1 if first else 3
        return lambda tensor: _highest(tensor, axis).reshape(size)

    def numbered(tensor: Array) -> NDArray[Any]:
        values = tensor.reshape(size) if spec.scale is None else spec.real(tensor).reshape(size)
        known = (values >= 0) & (values < labels)
        return np.where(known, np.where(known, values, 0), 256).astype(np.uint16)

    return numbered


def _highest(tensor: Array, axis: int) -> NDArray[Any]:
    """The channel with the highest number of each cell; 256 where one of them is no number."""
    numbers: NDArray[Any] = tensor.argmax(axis=axis).astype(np.uint16)
    if tensor.dtype.kind == "f" and not math.isfinite(float(tensor.sum(dtype=np.float64))):
        numbers[np.isnan(tensor).any(axis=axis)] = 256
    return numbers


def _seen(inverse: Inverse, cell: tuple[float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last row and column of the cells whose middle lies in the frame."""
    found = []
    for count, step, scale, shift, low, high in (
        (size[0], cell[1], inverse.scale_y, inverse.shift_y, inverse.top, inverse.bottom),
        (size[1], cell[0], inverse.scale_x, inverse.shift_x, inverse.left, inverse.right),
    ):
        middles = (np.arange(count) + 0.5) * step * scale + shift
        found += [int(np.searchsorted(middles, low)), int(np.searchsorted(middles, high))]
    return found[0], found[1], found[2], found[3]


def _bounds(mask: Mask, cell: tuple[float, float], inverse: Inverse) -> tuple[float, float, float, float]:
    x, y, w, h = cv2.boundingRect(mask)
    edges = np.asarray([[x, y, x + w, y + h]]) * (cell[0], cell[1], cell[0], cell[1])
    x0, y0, x1, y1 = np.round(inverse.boxes(edges)[0], 2).tolist()
    return x0, y0, x1, y1


def _outlines(mask: Mask, cell: tuple[float, float], inverse: Inverse, most: int) -> tuple[tuple[float, ...], ...]:
    """The mask's outer edges, largest first, with at most `most` points altogether."""
    if most < 3:
        return ()
    height, width = mask.shape
    # Twice as many dots as cells, and one more: every corner of a cell is a dot, so edges of dots are edges of cells.
    dots = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    dots[:-1, :-1] = mask.repeat(2, axis=0).repeat(2, axis=1)
    dots = cv2.dilate(dots, _SPREAD, anchor=(1, 1))
    contours, _ = cv2.findContours(dots, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for contour in sorted(contours, key=cv2.contourArea, reverse=True)[: most // 3]:
        polygon, coarse = contour, 0.75
        while len(polygon) > most and coarse < 1 << _COARSER:
            polygon, coarse = cv2.approxPolyDP(contour, coarse, True), 2 * coarse
        if 3 <= len(polygon) <= most:
            most -= len(polygon)
            places = inverse.points(polygon.reshape(-1, 2).astype(np.float64) * (cell[0] / 2, cell[1] / 2))
            found.append(tuple(np.round(places, 1).reshape(-1).tolist()))
    return tuple(found)
