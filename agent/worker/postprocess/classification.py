"""One vector of scores: the best labels, alone (softmax) or several at once (sigmoid)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from agent.worker.graph import Classification, Graph
from agent.worker.postprocess.outputs import Postprocessor, best_first, check_labels, items_that_fit, wrong
from agent.worker.preprocess import Inverse
from agent.worker.results import Classification as Classified
from agent.worker.results import Item
from agent.worker.tensor import Array, TensorSpec, require_scale

_ITEM_BYTES = 40
_FEW = 32
"""Up to here plain Python is faster than NumPy's calls."""


def compile_classification(graph: Graph, declared: Classification, outputs: Sequence[TensorSpec]) -> Postprocessor:
    """The reader of one vector [1, …, n]; a score that is no number is not told."""
    spec = outputs[0]
    count = math.prod(spec.shape)
    if len(outputs) != 1 or count != spec.shape[-1]:
        raise wrong("classification", "one vector of scores", outputs)
    require_scale(spec)
    check_labels(graph, count)
    labels = [graph.label(i) for i in range(count)]
    top = min(declared.top_k, count, items_that_fit(graph, _ITEM_BYTES))
    scale, zero = (1.0, 0) if spec.scale is None else (spec.scale, spec.zero_point or 0)
    threshold = declared.threshold
    floats = spec.dtype.startswith("float")

    def read(tensors: Sequence[Array], _: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        values = tensors[0].reshape(-1)
        steps: Sequence[Any] | Array = values
        total = 1.0
        if count <= _FEW:
            steps = values.tolist()
            # what is no number has no place in an order
            ranks = [step if step == step else -math.inf for step in steps] if floats else steps
            order = sorted(range(count), key=ranks.__getitem__, reverse=True)[:top]
            if declared.softmax:
                highest = steps[order[0]]
                total = sum(math.exp((step - highest) * scale) for step in steps)
        else:
            order = best_first(values, top).tolist()
            if declared.softmax:
                highest = float(values[order[0]])
                total = float(np.exp((values.astype(np.float32) - highest) * np.float32(scale)).sum())
        items: list[Item] = []
        for index in order:
            score = (float(steps[index]) - zero) * scale
            if declared.softmax:
                score = math.exp(score - (highest - zero) * scale) / total
            elif declared.sigmoid:
                score = 0.5 * (1 + math.tanh(score / 2))
            if math.isfinite(score) and (not threshold or score >= threshold):
                items.append(Classified(labels[index], round(score, 6)))
        return items

    return read
