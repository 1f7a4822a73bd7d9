"""YOLO heads as the common exporters leave them: one tensor, decoded in the graph, before suppression; with or without
key points.

Version 5 and 7 write a row per box, [1, n, 5 + classes]; 8, 9, 11 and 12 a column, [1, 4 + classes, n], followed for
poses by x, y and a score of each point.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason
from agent.worker.graph import Graph, Yolo
from agent.worker.postprocess.boxes import Boxes, around, candidates, detections, limit, suppress
from agent.worker.postprocess.outputs import Postprocessor, check_labels, input_size, items_that_fit, lowest, wrong
from agent.worker.preprocess import Inverse
from agent.worker.results import Item, KeyPoints
from agent.worker.tensor import Array, TensorSpec, require_scale

_POINT_BYTES = 28


def compile_yolo(
    graph: Graph, declared: Yolo, outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec]
) -> Postprocessor:
    """The reader of one tensor of boxes."""
    wanted = "one tensor [1, n, 5 + classes]" if declared.version == 5 else "one tensor [1, 4 + classes, n]"
    spec = outputs[0]
    if len(outputs) != 1 or len(spec.shape) != 3 or spec.shape[0] != 1:
        raise wrong(f"yolov{declared.version}", wanted, outputs)
    require_scale(spec)
    values = spec.shape[2] if declared.version == 5 else spec.shape[1]
    per_point = 3 if declared.visibility else 2
    classes = values - (5 if declared.version == 5 else 4) - per_point * declared.key_points
    if classes < 1:
        raise wrong(f"yolov{declared.version}", wanted, outputs)
    if graph.labels and len(graph.labels) != classes and spec.shape[1] > spec.shape[2] and declared.version != 5:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"{list(spec.shape)} has a row per box, yolov8 reads a column per box",
            hint="export without transposing, or use the kind yolov5 if the fifth value is an objectness",
        )
    check_labels(graph, classes)
    height, width = input_size(f"yolov{declared.version}", inputs)
    unit = np.asarray([width, height, width, height] if declared.normalized else [1.0] * 4)
    if declared.version == 5:
        return _rows(graph, declared, spec, unit)
    return _columns(graph, declared, spec, unit, classes)


def units(declared: Yolo, spec: TensorSpec, inputs: Sequence[TensorSpec]) -> NDArray[np.float32]:
    """What the output's numbers have to be multiplied by to be alike: pixels of the input stay what they are, a score
    of 1 weighs as much as its longest side. Broadcasts over the output."""
    values = spec.shape[2] if declared.version == 5 else spec.shape[1]
    per_point = 3 if declared.visibility else 2
    weights = np.full(values, 1.0 if declared.normalized else max(input_size("yolo", inputs)), np.float32)
    weights[:4] = 1.0
    if declared.key_points:
        points = weights[values - per_point * declared.key_points :].reshape(-1, per_point)
        points[:, :2] = 1.0
    return weights[None, None] if declared.version == 5 else weights[None, :, None]


def _rows(graph: Graph, declared: Yolo, spec: TensorSpec, unit: NDArray[np.float64]) -> Postprocessor:
    labels = [graph.label(i) for i in range(spec.shape[2] - 5)]
    least = lowest(declared.threshold, spec)
    most = limit(graph, declared.max_detections)

    def read(tensors: Sequence[Array], inverse: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        if inverse is None:
            return []
        table = tensors[0][0]
        found = np.flatnonzero(table[:, 4] >= least)  # no class can reach what its box does not
        if not found.size:
            return []
        rows = spec.real(table[found])
        classes = rows[:, 5:].argmax(axis=1)
        scores = rows[:, 4] * rows[np.arange(len(rows)), classes + 5]
        best = candidates(scores, declared.threshold)
        boxes = around(rows[best, :4] * unit)
        scores, classes = scores[best], classes[best]
        kept = suppress(boxes, scores, classes, declared.nms_iou, most)
        return detections(labels, inverse, boxes[kept], scores[kept], classes[kept])

    return read


def _columns(graph: Graph, declared: Yolo, spec: TensorSpec, unit: NDArray[np.float64], classes: int) -> Postprocessor:
    labels = [graph.label(i) for i in range(classes)]
    least = lowest(declared.threshold, spec)
    most = limit(graph, declared.max_detections)
    per_point = 3 if declared.visibility else 2
    if declared.key_points:
        most = min(most, items_that_fit(graph, 100 + _POINT_BYTES * declared.key_points))

    def read(tensors: Sequence[Array], inverse: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        if inverse is None:
            return []
        table = tensors[0][0]
        best = table[4 : 4 + classes].max(axis=0) if classes > 1 else table[4]
        found = candidates(best, least)
        if not found.size:
            return []
        columns = table[:, found]
        kinds = columns[4 : 4 + classes].argmax(axis=0)
        scores = spec.real(best[found])
        boxes = around(spec.real(columns[:4]).T * unit)
        kept = suppress(boxes, scores, kinds, declared.nms_iou, most)
        if not declared.key_points:
            return detections(labels, inverse, boxes[kept], scores[kept], kinds[kept])
        points = spec.real(columns[4 + classes :, kept]).T.reshape(len(kept), declared.key_points, per_point)
        return _poses(labels, inverse, boxes[kept], scores[kept], kinds[kept], points * _point_unit(declared, unit))

    return read


def _point_unit(declared: Yolo, unit: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray([*unit[:2], 1.0] if declared.visibility else unit[:2])


def _poses(
    labels: Sequence[str],
    inverse: Inverse,
    boxes: Boxes,
    scores: NDArray[np.float32],
    kinds: NDArray[np.int64],
    points: NDArray[np.float64],
) -> list[Item]:
    """One item a box, its points [n, k, 2 or 3]; a point that holds no numbers was not found."""
    mapped = np.round(inverse.boxes(boxes), 2).tolist()
    good = np.asarray(np.isfinite(points).all(axis=2))
    points = np.where(good[:, :, None], points, 0.0)
    places = np.round(inverse.points(points[:, :, :2].reshape(-1, 2)), 1).reshape(*points.shape[:2], 2)
    shown = np.clip(points[:, :, 2], 0, 1) if points.shape[2] == 3 else 1.0
    sure = np.round(np.where(good, shown, 0.0), 3)
    rounded = np.round(np.clip(scores, 0, 1).astype(np.float64), 4).tolist()
    return [
        KeyPoints(
            labels[kind],
            score,
            (box[0], box[1], box[2], box[3]),
            tuple((x, y, s) for (x, y), s in zip(places[i].tolist(), sure[i].tolist(), strict=True)),
        )
        for i, (kind, score, box) in enumerate(zip(kinds.tolist(), rounded, mapped, strict=True))
        if box[2] > box[0] and box[3] > box[1]
    ]
