"""The outputs' own statistics, nothing decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from agent.worker.postprocess.outputs import Postprocessor
from agent.worker.preprocess import Inverse
from agent.worker.results import Item, RawTensor
from agent.worker.tensor import Array, TensorSpec

MAX_OUTPUTS = 16
MAX_NAME_CHARS = 80


def compile_raw(outputs: Sequence[TensorSpec]) -> Postprocessor:
    """The reader of any outputs; the first `MAX_OUTPUTS` are told."""

    def read(tensors: Sequence[Array], _: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        items: list[Item] = []
        for spec, tensor in list(zip(outputs, tensors, strict=True))[:MAX_OUTPUTS]:
            values = spec.real(tensor)
            with np.errstate(invalid="ignore", over="ignore"):
                numbers = [float(f(values)) for f in (np.min, np.max, np.mean)] if values.size else [0.0] * 3
            low, high, mean = (round(v, 6) if math.isfinite(v) else None for v in numbers)
            items.append(RawTensor(spec.name[:MAX_NAME_CHARS], spec.shape, low, high, mean))
        return items

    return read
