"""Sessions of the TFLite interpreter, which LiteRT and tflite-runtime share.

One `Interpreter` per session, at a fixed shape: an open batch becomes 1. Invariant: inputs are copied in and outputs
copied out, because views into the interpreter's arena forbid it to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from agent.errors import ModelError, Reason
from agent.worker.delegates.model import refused
from agent.worker.tensor import Array, TensorSpec, make_spec

INTERPRETER_ERRORS = (ValueError, RuntimeError, TypeError, SystemError)


class InterpreterSession:
    """A loaded interpreter.

    Args:
        interpreter: tensors are allocated here.
        delegate: name of the delegate that runs it.
        runtime: for error texts.

    Raises:
        ModelError: `model_unloadable` or `model_shape`.
    """

    compiled = None

    def __init__(self, interpreter: Any, delegate: str, runtime: str) -> None:
        self._interpreter = interpreter
        self._runtime = runtime
        try:
            _fix_shapes(interpreter)
            interpreter.allocate_tensors()
            inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        except INTERPRETER_ERRORS as e:
            raise refused(runtime, e) from e
        self.inputs = tuple(_spec(detail) for detail in inputs)
        self.outputs = tuple(_spec(detail) for detail in outputs)
        self.tensors = tuple(spec.empty() for spec in self.inputs)
        self._in = [int(detail["index"]) for detail in inputs]
        self._out = [int(detail["index"]) for detail in outputs]
        self.actual = delegate
        self.coverage = 1.0

    def run(self) -> tuple[Array, ...]:
        """See `Session.run`."""
        interpreter = self._interpreter
        try:
            for index, tensor in zip(self._in, self.tensors, strict=True):
                interpreter.set_tensor(index, tensor)
            interpreter.invoke()
        except INTERPRETER_ERRORS as e:
            raise refused(self._runtime, e) from e
        return tuple(interpreter.get_tensor(index) for index in self._out)


def delegated_share(interpreter: Any) -> float:
    """Share of the graph's nodes that a delegate took over, 0 to 1."""
    counts = operators(interpreter).values()
    total = sum(count for _, count in counts)
    return sum(taken for taken, _ in counts) / total if total else 0.0


def operators(interpreter: Any) -> dict[str, tuple[int, int]]:
    """Of each kind of operator, how many nodes a delegate took over, and how many there are.

    The interpreter lists the original nodes and, after them, one node `DELEGATE` per partition. A partition replaced
    every node on the way back from its outputs to its inputs.
    """
    ops = interpreter._get_ops_details()
    nodes = {op["index"]: op for op in ops if op["op_name"] != "DELEGATE"}
    producer = {int(tensor): index for index, op in nodes.items() for tensor in op["outputs"]}
    taken: set[int] = set()
    for partition in (op for op in ops if op["op_name"] == "DELEGATE"):
        border = {int(tensor) for tensor in partition["inputs"]}
        todo = [int(tensor) for tensor in partition["outputs"]]
        while todo:
            index = producer.get(tensor) if (tensor := todo.pop()) not in border else None
            if index is not None and index not in taken:
                taken.add(index)
                todo += [int(tensor) for tensor in nodes[index]["inputs"]]
    found: dict[str, tuple[int, int]] = {}
    for index, op in nodes.items():
        got, count = found.get(str(op["op_name"]), (0, 0))
        found[str(op["op_name"])] = (got + (index in taken), count + 1)
    return found


def _fix_shapes(interpreter: Any) -> None:
    """Give inputs with an open batch the batch 1. Another open size stays open in `shape_signature`, for `_spec`."""
    for detail in interpreter.get_input_details():
        signature = [int(size) for size in detail.get("shape_signature", ())]
        if signature and signature[0] < 1 and min(signature[1:], default=1) > 0:
            interpreter.resize_tensor_input(int(detail["index"]), [1, *signature[1:]])


def _spec(detail: Mapping[str, Any]) -> TensorSpec:
    name, scale = str(detail["name"]), float(detail["quantization"][0])
    scales = detail.get("quantization_parameters", {}).get("scales", ())
    if len(scales) > 1:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"tensor {name[:60]!r} has {len(scales)} scales, one a channel; an input or output has one",
            hint="quantize inputs and outputs per tensor; weights may have a scale a channel",
        )
    # `shape` says 1 where the model leaves a size open, and would be believed
    signature = [int(size) for size in detail.get("shape_signature", ())]
    shape = [int(size) for size in detail["shape"]]
    if len(signature) == len(shape):
        shape = [size if declared > 0 or size > 1 else -1 for size, declared in zip(shape, signature, strict=True)]
    return make_spec(
        name, np.dtype(detail["dtype"]).name, shape, scale or None, int(detail["quantization"][1]) if scale else None
    )
