"""Centre points: a heat map whose peaks are things, and a map with the box around each (Zhou et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from agent.worker.graph import Centernet, Graph
from agent.worker.postprocess.boxes import around, candidates, detections, limit, suppress
from agent.worker.postprocess.outputs import Postprocessor, lowest, wrong
from agent.worker.preprocess import Inverse
from agent.worker.results import Item
from agent.worker.tensor import Array, TensorSpec, require_scale

_PEAK = np.ones((3, 3), np.uint8)
_WANTED = "a heat map [1, h, w, classes] and a box map [1, h, w, 4]"
MAX_CLASSES = 32
"""What OpenCV dilates at once."""


def compile_centernet(graph: Graph, declared: Centernet, outputs: Sequence[TensorSpec]) -> Postprocessor:
    """The reader of a heat map and a box map."""
    if len(outputs) != 2 or any(len(spec.shape) != 4 or spec.shape[0] != 1 for spec in outputs):
        raise wrong("centernet", _WANTED, outputs)
    heat_spec, box_spec = outputs
    if heat_spec.shape[1:3] != box_spec.shape[1:3] or box_spec.shape[3] != 4 or heat_spec.shape[3] > MAX_CLASSES:
        raise wrong("centernet", _WANTED, outputs)
    for spec in outputs:
        require_scale(spec)
    _, _, columns, classes = heat_spec.shape
    labels = [graph.label(i) for i in range(classes)]
    ordered = _ordered(heat_spec)
    least = lowest(declared.threshold, heat_spec) + (128 if heat_spec.dtype == "int8" else 0)
    most = limit(graph, declared.max_detections)

    def read(tensors: Sequence[Array], inverse: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        if inverse is None:
            return []
        heat = ordered(tensors[0][0])
        flat = heat.reshape(-1)
        found = np.flatnonzero(flat >= least)
        if not found.size:
            return []
        higher = cv2.dilate(heat, _PEAK).reshape(-1)
        found = found[flat[found] >= higher[found]]
        # Twice as many as asked for, because suppression takes its share.
        found = found[candidates(flat[found], least, 2 * most)]
        scores = heat_spec.real(tensors[0].reshape(-1)[found])
        cells, kinds = np.divmod(found, classes)
        rows, cols = np.divmod(cells, columns)
        box = box_spec.real(tensors[1].reshape(-1, 4)[cells]).astype(np.float64)
        box[:, 0] += cols
        box[:, 1] += rows
        boxes = around(box) * declared.stride
        kept = suppress(boxes, scores, kinds, declared.nms_iou, most)
        return detections(labels, inverse, boxes[kept], scores[kept], kinds[kept])

    return read


def _ordered(spec: TensorSpec) -> Callable[[Array], Array]:
    """Turn a heat map into a dtype that OpenCV can dilate, keeping the order of its values."""
    if spec.dtype == "int8":
        return lambda heat: np.bitwise_xor(heat.view(np.uint8), 0x80)
    if spec.dtype in ("uint8", "int16", "uint16", "float32"):
        return lambda heat: heat
    return lambda heat: heat.astype(np.float32)
