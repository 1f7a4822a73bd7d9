"""One vector that says what something looks like, to be compared elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np

from agent.worker.graph import MAX_EMBEDDING, MAX_LISTED, Embedding
from agent.worker.postprocess.outputs import Postprocessor, wrong
from agent.worker.preprocess import Inverse
from agent.worker.results import Embedding as Embedded
from agent.worker.results import Item
from agent.worker.tensor import Array, TensorSpec, require_scale

_LARGEST = 65504.0  # of a float16


def compile_embedding(declared: Embedding, outputs: Sequence[TensorSpec]) -> Postprocessor:
    """The reader of one vector [1, …, n]; nothing is told of one that holds no numbers."""
    spec = outputs[0]
    count = math.prod(spec.shape)
    most = MAX_LISTED if declared.encoding == "list" else MAX_EMBEDDING
    if len(outputs) != 1 or count != spec.shape[-1] or count > most:
        raise wrong("embedding", f"one vector of at most {most} numbers", outputs)
    require_scale(spec)

    def read(tensors: Sequence[Array], _: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        vector = spec.real(tensors[0].reshape(-1)).astype(np.float64)
        if not np.isfinite(vector).all():
            return []
        if declared.normalize:
            vector /= math.sqrt(float(vector @ vector)) or 1.0
        half = np.clip(vector, -_LARGEST, _LARGEST).astype("<f2")
        if declared.encoding == "list":
            return [Embedded(count, tuple(float(f"{value:.4g}") for value in half.tolist()))]
        return [Embedded(count, base64.b64encode(half.tobytes()).decode())]

    return read
