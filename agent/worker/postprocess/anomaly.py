"""How badly an autoencoder repeats its input: the mean of the squared differences, in real values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from agent.worker.graph import Anomaly
from agent.worker.postprocess.outputs import Postprocessor, wrong
from agent.worker.preprocess import Inverse
from agent.worker.results import Anomaly as Judged
from agent.worker.results import Item
from agent.worker.tensor import Array, TensorSpec, require_scale


def compile_anomaly(declared: Anomaly, outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec]) -> Postprocessor:
    """The reader of an output as large as the input. What cannot be compared, a NaN, is anomalous."""
    if len(outputs) != 1 or len(inputs) != 1 or math.prod(outputs[0].shape) != math.prod(inputs[0].shape):
        raise wrong("anomaly", "one output as large as the one input", outputs)
    given_spec, made_spec = inputs[0], outputs[0]
    require_scale(given_spec)
    require_scale(made_spec)

    def read(tensors: Sequence[Array], _: Inverse | None, inputs: Sequence[Array] = ()) -> list[Item]:
        given = given_spec.real(inputs[0].reshape(-1)).astype(np.float64)
        made = made_spec.real(tensors[0].reshape(-1)).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            made -= given
            score = float(made @ made) / made.size
        if not math.isfinite(score):
            return [Judged(None, declared.threshold, True)]
        return [Judged(float(f"{score:.6g}"), declared.threshold, score >= declared.threshold)]

    return read
