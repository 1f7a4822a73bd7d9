"""Single-shot detectors: raw boxes over anchors, decoded here, or the answers of TFLite's own detection operator.

Anchors and box coding follow Liu et al., 'SSD: Single Shot MultiBox Detector', 2016, in the order of the widespread
TensorFlow exports: grid by grid, row by row, cell by cell, the anchors of a cell together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason
from agent.worker.graph import Anchors, Graph, Ssd, SsdInGraph
from agent.worker.postprocess.boxes import Boxes, around, candidates, detections, limit, suppress
from agent.worker.postprocess.outputs import (
    Postprocessor,
    check_labels,
    input_size,
    logit,
    lowest_score,
    sigmoid,
    wrong,
)
from agent.worker.preprocess import Inverse
from agent.worker.results import Item
from agent.worker.tensor import Array, TensorSpec, require_scale

_MOST_GROWTH = 20.0  # e^20 is beyond every picture, and far from what a float can hold
_FIRST_GRID_BOXES = 3


def anchor_boxes(declared: Anchors) -> NDArray[np.float64]:
    """[n, 4] of centre y, centre x, height, width in shares of the input."""
    count = len(declared.grids)
    step = (declared.max_scale - declared.min_scale) / max(count - 1, 1)
    scales = [declared.min_scale + step * i for i in range(count)] + [1.0]
    made = []
    for i, (rows, columns) in enumerate(declared.grids):
        if i == 0 and declared.reduced:
            shapes = [(0.1, 1.0), (scales[0], 2.0), (scales[0], 0.5)][:_FIRST_GRID_BOXES]
        else:
            shapes = [(scales[i], aspect) for aspect in declared.aspects]
            if declared.interpolated > 0:
                shapes.append((math.sqrt(scales[i] * scales[i + 1]), declared.interpolated))
        sizes = np.asarray([(scale / math.sqrt(aspect), scale * math.sqrt(aspect)) for scale, aspect in shapes])
        centres = np.stack(
            np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij"), axis=-1
        ).reshape(-1, 1, 2)
        both = (len(centres), len(sizes), 2)
        pair = (np.broadcast_to(centres, both), np.broadcast_to(sizes, both))
        made.append(np.concatenate(pair, axis=2).reshape(-1, 4))
    return np.concatenate(made)


def compile_ssd(
    graph: Graph, declared: Ssd, outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec]
) -> Postprocessor:
    """The reader of boxes [1, n, 4] and scores [1, n, classes] over n anchors."""
    boxes_spec, scores_spec = outputs if len(outputs) == 2 else (None, None)
    if boxes_spec is None or scores_spec is None or len(scores_spec.shape) != 3 or boxes_spec.shape[-1] != 4:
        raise wrong("ssd", "boxes [1, n, 4] and scores [1, n, classes]", outputs)
    _, count, classes = scores_spec.shape
    first = int(declared.background)
    if math.prod(boxes_spec.shape) != 4 * count or scores_spec.shape[0] != 1 or classes <= first:
        raise wrong("ssd", "boxes [1, n, 4] and scores [1, n, classes]", outputs)
    for spec in outputs:
        require_scale(spec)
    check_labels(graph, classes - first)
    anchors = anchor_boxes(declared.anchors)
    if len(anchors) != count:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"the grids of the release make {len(anchors)} anchors, the model answers {count} boxes",
            hint="correct grids, aspects, interpolated or reduced under anchors in [postprocess]",
        )
    height, width = input_size("ssd", inputs)
    unit = np.asarray([width, height, width, height])
    labels = [graph.label(i) for i in range(classes - first)]
    most = limit(graph, declared.max_detections)
    score = _softmaxed(declared, scores_spec) if declared.scores == "softmax" else _single(declared, scores_spec)

    def read(tensors: Sequence[Array], inverse: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        if inverse is None:
            return []
        found, kinds, scores = score(tensors[1].reshape(count, classes))
        if not found.size:
            return []
        coded = boxes_spec.real(tensors[0].reshape(count, 4)[found])
        boxes = around(_decoded(coded, anchors[found], declared.scales) * unit)
        kept = suppress(boxes, scores, kinds, declared.nms_iou, most)
        return detections(labels, inverse, boxes[kept], scores[kept], kinds[kept])

    return read


_Scored = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Anchors, their classes without the background, their scores; best first."""


def _single(declared: Ssd, spec: TensorSpec) -> Callable[[Array], _Scored]:
    """Each class for itself: what is above the threshold is found on the tensor's own numbers."""
    classes, first = spec.shape[2], int(declared.background)
    logits = declared.scores == "sigmoid"
    least = lowest_score(declared.threshold, spec, sigmoid=logits)

    def score(table: Array) -> _Scored:
        flat = table.reshape(-1)
        found = np.flatnonzero(flat >= least)
        if first:
            found = found[found % classes != 0]
        found = found[candidates(flat[found], least)]
        real = spec.real(flat[found])
        anchors, kinds = np.divmod(found, classes)
        # one thing an anchor: its best class comes first
        _, best = np.unique(anchors, return_index=True)
        best.sort()
        scores = sigmoid(real[best]) if logits else real[best].astype(np.float64)
        return anchors[best], kinds[best] - first, scores

    return score


def _softmaxed(declared: Ssd, spec: TensorSpec) -> Callable[[Array], _Scored]:
    """The classes of an anchor compete, the background among them."""
    first = int(declared.background)
    # a class of at least `threshold` stands at least this far above what the others, so the background, can have
    ahead = logit(declared.threshold) / (spec.scale or 1.0) - 1

    def score(table: Array) -> _Scored:
        if first and math.isfinite(ahead):
            wide = table[:, 1:].max(axis=1).astype(np.float32) - table[:, 0].astype(np.float32)
            rows = np.flatnonzero(wide >= ahead)
        else:
            rows = np.arange(len(table))
        real = spec.real(table[rows]).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            powers = np.exp(real - real.max(axis=1, keepdims=True, initial=-np.inf))
            shares = powers / powers.sum(axis=1, keepdims=True)
        kinds = shares[:, first:].argmax(axis=1)
        scores = shares[np.arange(len(rows)), kinds + first]
        best = candidates(scores, declared.threshold)
        return rows[best], kinds[best], scores[best]

    return score


def _decoded(coded: NDArray[np.float32], anchors: NDArray[np.float64], scales: Sequence[float]) -> Boxes:
    """(y, x, h, w) relative to anchors into centre x, centre y, width, height in shares of the input."""
    relative = coded / np.asarray(scales)
    boxes = np.empty((len(coded), 4))
    boxes[:, 1::-1] = relative[:, :2] * anchors[:, 2:] + anchors[:, :2]
    boxes[:, :1:-1] = np.exp(np.minimum(relative[:, 2:], _MOST_GROWTH)) * anchors[:, 2:]
    return boxes


def compile_ssd_in_graph(
    graph: Graph, declared: SsdInGraph, outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec]
) -> Postprocessor:
    """The reader of boxes, classes, scores and their count."""
    sizes = [math.prod(spec.shape) for spec in outputs]
    if len(outputs) != 4 or sizes[0] != 4 * sizes[1] or sizes[1] != sizes[2] or sizes[3] != 1:
        raise wrong("ssd_in_graph", "boxes [1, n, 4], classes [1, n], scores [1, n] and their count [1]", outputs)
    for spec in outputs:
        require_scale(spec)
    height, width = input_size("ssd_in_graph", inputs)
    unit = np.asarray([width, height, width, height])
    most = limit(graph, declared.max_detections)
    named = len(graph.labels)
    labels = list(graph.labels)

    def read(tensors: Sequence[Array], inverse: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        if inverse is None:
            return []
        told = float(outputs[3].real(tensors[3]).reshape(-1)[0])
        count = int(min(max(told, 0), sizes[1])) if told == told else 0
        scores = outputs[2].real(tensors[2]).reshape(-1)[:count]
        found = candidates(scores, declared.threshold)
        kinds = outputs[1].real(tensors[1]).reshape(-1)[found]
        boxes = outputs[0].real(tensors[0]).reshape(-1, 4)[found][:, [1, 0, 3, 2]].astype(np.float64) * unit
        good = np.isfinite(boxes).all(axis=1) & (kinds >= 0) & (kinds < named)
        kept = np.flatnonzero(good)[:most]
        return detections(labels, inverse, boxes[kept], scores[found][kept], kinds[kept].astype(np.int64))

    return read
