"""The anomaly score of a component, straight from its runtime: the mean squared error between input and output.

It is the oracle that the worker's own way (`[postprocess] kind = "anomaly"`) is compared with, and shares no code with
it. Both tensors are taken in real values, so what the input saturates at counts as the input.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Score = Callable[[NDArray[np.float32]], float]
"""Score of a window's values, float32 [values]."""


def tflite(path: Path) -> Score:
    """The int8 TFLite component at one thread."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    (scale, zero), (out_scale, out_zero) = source["quantization"], result["quantization"]

    def score(values: NDArray[np.float32]) -> float:
        steps = np.clip(np.rint(values.astype(np.float64) / scale + zero), -128, 127)
        interpreter.set_tensor(source["index"], steps.astype(np.int8).reshape(source["shape"]))
        interpreter.invoke()
        answer = (interpreter.get_tensor(result["index"]).reshape(-1).astype(np.float64) - out_zero) * out_scale
        return float((((steps - zero) * scale - answer) ** 2).mean())

    return score


def onnx(path: Path) -> Score:
    """The int8 ONNX component on onnxruntime's CPU at one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape

    def score(values: NDArray[np.float32]) -> float:
        (answer,) = session.run(["y"], {"x": values.reshape(shape)})
        return float(((values - answer.reshape(-1)).astype(np.float64) ** 2).mean())

    return score
