"""What every head needs of its tensors: a refusal that names both sides, thresholds in a tensor's own steps, and how
many answers fit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason
from agent.worker.graph import MAX_ITEMS, Graph
from agent.worker.preprocess import Inverse, image_layout
from agent.worker.results import MAX_ANSWER_BYTES, Item
from agent.worker.tensor import Array, TensorSpec


class Postprocessor(Protocol):
    """Answers of one frame."""

    def __call__(
        self, outputs: Sequence[Array], inverse: Inverse | None, inputs: Sequence[Array] = (), /
    ) -> list[Item]:
        """Read `outputs` in declared order; `inverse` leads back to source pixels, None without a picture; `inputs`
        are what the session ran on, the fed one first."""


def wrong(kind: str, wanted: str, outputs: Sequence[TensorSpec]) -> ModelError:
    """The error of outputs that are not what `kind` reads."""
    shapes = ", ".join(str(list(spec.shape)) for spec in outputs)
    return ModelError(
        Reason.MODEL_SHAPE,
        f"{kind} reads {wanted}; the model answers {shapes}",
        hint="name the outputs in order in the release's component",
    )


def check_labels(graph: Graph, count: int, what: str = "classes") -> None:
    """Pass a graph with one label per class, or none.

    Raises:
        ModelError: `model_shape`.
    """
    if graph.labels and len(graph.labels) != count:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"the release has {len(graph.labels)} labels, the model answers {count} {what}",
            hint="give one label per class, in the model's order",
        )


def input_size(kind: str, inputs: Sequence[TensorSpec]) -> tuple[int, int]:
    """Height and width of the picture the model is fed.

    Raises:
        ModelError: `model_shape` when it is fed none.
    """
    if not inputs:
        raise ModelError(Reason.MODEL_SHAPE, f"{kind} belongs to a model that takes pictures", hint="correct the spec")
    layout = image_layout(inputs[0])
    return layout.height, layout.width


def lowest(value: float, spec: TensorSpec) -> float:
    """The lowest number of the tensor that is not below the real `value`."""
    if spec.scale is None:
        return value
    return math.ceil(value / spec.scale + (spec.zero_point or 0) - 1e-6)


def logit(share: float) -> float:
    """The number whose sigmoid is `share`."""
    if share <= 0:
        return -math.inf
    return math.inf if share >= 1 else math.log(share / (1 - share))


def lowest_score(threshold: float, spec: TensorSpec, *, sigmoid: bool) -> float:
    """The lowest number of the tensor whose score is not below `threshold`."""
    if not sigmoid:
        return lowest(threshold, spec)
    value = logit(threshold)
    return lowest(value, spec) if math.isfinite(value) else value


def sigmoid(values: NDArray[Any]) -> NDArray[np.float64]:
    """1 / (1 + e^-x), without overflow."""
    wide = values.astype(np.float64)
    return np.asarray(0.5 * (1 + np.tanh(0.5 * wide)))


def best_first(values: Array, most: int) -> NDArray[np.int64]:
    """Indices of the `most` highest of a vector, highest first, the earlier of equals first.

    Numbers that are none come last."""
    # Ties are common in int8: a stable order keeps the answer the same on every run.
    falling = -values.astype(np.float32)
    if falling.size > 4 * most:
        limit = np.partition(falling, most)[most]
        if limit == limit:  # not where there are fewer numbers than that
            some = np.flatnonzero(falling <= limit)
            return np.asarray(some[np.argsort(falling[some], kind="stable")[:most]])
    return np.argsort(falling, kind="stable")[:most]


def items_that_fit(graph: Graph, item_bytes: int, reserved_bytes: int = 0) -> int:
    """How many answers of `item_bytes` of JSON beside their label fit into one message."""
    longest = max((len(json.dumps(label)) for label in graph.labels), default=16)
    return max(1, min(MAX_ITEMS, (MAX_ANSWER_BYTES - reserved_bytes) // (longest + item_bytes)))
