"""Key points of the one thing in the picture: a map for each, its peak the point (Xiao et al., 'Simple Baselines for
Human Pose Estimation', 2018, with their quarter of a cell towards the higher neighbour)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agent.worker.graph import MAX_KEY_POINTS, Graph, Heatmap
from agent.worker.postprocess.outputs import Postprocessor, check_labels, input_size, sigmoid, wrong
from agent.worker.preprocess import Inverse
from agent.worker.results import Item, KeyPoints
from agent.worker.tensor import Array, TensorSpec, require_scale

_WANTED = f"one map [1, h, w, points] with at most {MAX_KEY_POINTS} points"
LABEL = "keypoints"


def compile_heatmap(
    graph: Graph, declared: Heatmap, outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec]
) -> Postprocessor:
    """The reader of one stack of maps."""
    spec = outputs[0]
    if len(outputs) != 1 or len(spec.shape) != 4 or spec.shape[0] != 1:
        raise wrong("heatmap", _WANTED, outputs)
    require_scale(spec)
    first = declared.channels == "first"
    height, width, count = (*spec.shape[2:4], spec.shape[1]) if first else spec.shape[1:4]
    if count > MAX_KEY_POINTS:
        raise wrong("heatmap", _WANTED, outputs)
    check_labels(graph, count, "key points")
    in_height, in_width = input_size("heatmap", inputs)
    cell = np.asarray([in_width / width, in_height / height])

    def read(tensors: Sequence[Array], inverse: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        if inverse is None:
            return []
        maps = tensors[0][0] if first else np.moveaxis(tensors[0][0], 2, 0)
        flat = maps.reshape(count, height * width)
        best = flat.argmax(axis=1)
        scores = spec.real(flat[np.arange(count), best]).astype(np.float64)
        if declared.sigmoid:
            scores = sigmoid(scores)
        rows, columns = np.divmod(best, width)
        cells = np.stack((columns, rows), axis=1) + _quarters(maps, rows, columns) + declared.offset
        found = scores >= declared.threshold  # never for what is no number
        places = np.round(inverse.points(cells * cell), 1).tolist()
        sure = np.round(np.clip(np.where(found, scores, 0.0), 0, 1), 4)
        if not found.any():
            return []
        points = tuple((x, y, score) for (x, y), score in zip(places, sure.tolist(), strict=True))
        return [KeyPoints(LABEL, round(float(sure[found].mean()), 4), None, points)]

    return read


def _quarters(maps: Array, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """[k, 2] of a quarter cell right or left, down or up, towards the higher neighbour; none at the border."""
    count, height, width = maps.shape
    each = np.arange(count)
    shifts = np.zeros((count, 2))
    for axis, at, size in ((0, columns, width), (1, rows, height)):
        inner = (at > 0) & (at < size - 1)
        step = inner.astype(np.int64)
        before = maps[each, rows - (step if axis else 0), columns - (0 if axis else step)]
        after = maps[each, rows + (step if axis else 0), columns + (0 if axis else step)]
        shifts[:, axis] = 0.25 * ((after > before).astype(np.float64) - (after < before))
    return shifts
