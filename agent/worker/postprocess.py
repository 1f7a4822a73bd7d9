"""From output tensors to answers: classification, centre-point detection, raw statistics.

Works on the quantized numbers as long as order is all that matters, and turns only what is kept into real values.
Invariants: at most `graph.MAX_ITEMS` items; scores are 0..1 for detections; boxes are in source pixels, clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason
from agent.worker.graph import Centernet, Classification, Graph
from agent.worker.preprocess import Inverse
from agent.worker.tensor import Array, TensorSpec, require_scale

Items = list[dict[str, Any]]
Postprocessor = Callable[[Sequence[Array], "Inverse | None"], Items]
"""Answers of one frame from its outputs in declared order; the inverse maps boxes, None without an image."""

_PEAK = np.ones((3, 3), np.uint8)
_RAW_OUTPUTS = 16


def compile_postprocess(graph: Graph, outputs: Sequence[TensorSpec]) -> Postprocessor:
    """The function that reads outputs of these specs.

    Raises:
        ModelError: `model_shape` when the outputs are not what the release declares.
    """
    declared = graph.postprocess
    if isinstance(declared, Classification):
        return _classification(graph, declared, outputs)
    if isinstance(declared, Centernet):
        return _centernet(graph, declared, outputs)
    return _raw(outputs)


def _classification(graph: Graph, declared: Classification, outputs: Sequence[TensorSpec]) -> Postprocessor:
    spec = outputs[0]
    count = math.prod(spec.shape)
    if len(outputs) != 1 or count != spec.shape[-1]:
        raise _shape("classification", "one vector of scores", outputs)
    require_scale(spec)
    if graph.labels and len(graph.labels) != count:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"the release has {len(graph.labels)} labels, the model answers {count} classes",
            hint="give one label per class, in the model's order",
        )
    top = min(declared.top_k, count)

    def read(tensors: Sequence[Array], _: Inverse | None) -> Items:
        scores = spec.real(tensors[0].reshape(-1))
        if declared.softmax:
            np.exp(scores - scores.max(), out=scores)
            scores /= scores.sum()
        order = np.argsort(-scores, kind="stable")[:top].tolist()
        return [{"label": graph.label(i), "score": round(float(scores[i]), 6)} for i in order]

    return read


def _centernet(graph: Graph, declared: Centernet, outputs: Sequence[TensorSpec]) -> Postprocessor:
    if len(outputs) != 2 or any(len(spec.shape) != 4 or spec.shape[0] != 1 for spec in outputs):
        raise _shape("centernet", "a heat map [1, h, w, classes] and a box map [1, h, w, 4]", outputs)
    heat_spec, box_spec = outputs
    if heat_spec.shape[1:3] != box_spec.shape[1:3] or box_spec.shape[3] != 4 or heat_spec.shape[3] > 32:
        raise _shape("centernet", "a heat map [1, h, w, classes] and a box map [1, h, w, 4]", outputs)
    for spec in outputs:
        require_scale(spec)
    _, _, columns, classes = heat_spec.shape
    ordered = _ordered(heat_spec)
    threshold = _in_steps(declared.threshold, heat_spec)

    def read(tensors: Sequence[Array], inverse: Inverse | None) -> Items:
        heat = ordered(tensors[0][0])
        around = cv2.dilate(heat, _PEAK).reshape(-1)
        flat = heat.reshape(-1)
        found = np.flatnonzero(flat >= threshold)
        found = found[flat[found] >= around[found]]
        if not found.size or inverse is None:
            return []
        # Ties are common in int8: a stable order keeps the answer the same on every run.
        found = found[np.argsort(flat[found].astype(np.float32) * -1, kind="stable")]
        # Twice as many as asked for, because suppression takes its share.
        found = found[: 2 * declared.max_detections]
        scores = heat_spec.real(tensors[0].reshape(-1)[found])
        cells, labels = np.divmod(found, classes)
        rows, cols = np.divmod(cells, columns)
        box = box_spec.real(tensors[1].reshape(-1, 4)[cells]).astype(np.float64)
        boxes = _corners(box, rows, cols, declared.stride)
        kept = _suppress(boxes, scores, labels, declared)
        mapped = np.round(inverse.boxes(boxes[kept]), 2).tolist()
        rounded = np.round(scores[kept].astype(np.float64), 4).tolist()
        return [
            {"label": graph.label(label), "score": score, "box": edges}
            for label, score, edges in zip(labels[kept].tolist(), rounded, mapped, strict=True)
            if edges[2] > edges[0] and edges[3] > edges[1]
        ]

    return read


def _ordered(spec: TensorSpec) -> Callable[[Array], Array]:
    """Turn a heat map into a dtype that OpenCV can dilate, keeping the order of its values."""
    if spec.dtype == "int8":
        return lambda heat: np.bitwise_xor(heat.view(np.uint8), 0x80)
    if spec.dtype in ("uint8", "int16", "uint16", "float32"):
        return lambda heat: heat
    return lambda heat: heat.astype(np.float32)


def _in_steps(threshold: float, spec: TensorSpec) -> float:
    """The lowest value, in what `_ordered` gives, that is not below `threshold`."""
    steps = threshold if spec.scale is None else math.ceil(threshold / spec.scale + (spec.zero_point or 0) - 1e-6)
    return steps + 128 if spec.dtype == "int8" else steps


def _corners(box: NDArray[np.float64], rows: Array, cols: Array, stride: int) -> NDArray[np.float64]:
    """[n, 4] (dx, dy, width, height) in cells to (x0, y0, x1, y1) in input pixels."""
    box[:, 0] += cols
    box[:, 1] += rows
    half = np.maximum(box[:, 2:], 0) / 2
    return np.hstack((box[:, :2] - half, box[:, :2] + half)) * stride


def _suppress(boxes: NDArray[np.float64], scores: Array, labels: Array, declared: Centernet) -> NDArray[np.int64]:
    """Indices of the boxes that class-wise non-maximum suppression keeps, best first."""
    if len(boxes) > 1:
        sized = np.hstack((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]))
        kept = cv2.dnn.NMSBoxesBatched(sized.tolist(), scores.tolist(), labels.tolist(), 0.0, declared.nms_iou)
        order = np.sort(np.asarray(kept, np.int64).reshape(-1))
    else:
        order = np.zeros(len(boxes), np.int64)
    return order[: declared.max_detections]


def _raw(outputs: Sequence[TensorSpec]) -> Postprocessor:
    def read(tensors: Sequence[Array], _: Inverse | None) -> Items:
        items = []
        for spec, tensor in list(zip(outputs, tensors, strict=True))[:_RAW_OUTPUTS]:
            values = spec.real(tensor)
            with np.errstate(invalid="ignore", over="ignore"):
                numbers = [float(f(values)) for f in (np.min, np.max, np.mean)] if values.size else [0.0] * 3
            low, high, mean = (round(v, 6) if math.isfinite(v) else None for v in numbers)
            items.append({"name": spec.name[:80], "shape": list(spec.shape), "min": low, "max": high, "mean": mean})
        return items

    return read


def _shape(kind: str, wanted: str, outputs: Sequence[TensorSpec]) -> ModelError:
    shapes = ", ".join(str(list(spec.shape)) for spec in outputs)
    return ModelError(
        Reason.MODEL_SHAPE,
        f"{kind} reads {wanted}; the model answers {shapes}",
        hint="name the outputs in order in the release's component",
    )
