"""Sessions of the TFLite interpreter, which LiteRT and tflite-runtime share.

One `Interpreter` per session, at a fixed shape. Invariant: inputs are copied in and outputs copied out, because views
into the interpreter's arena forbid it to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

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

    def __init__(self, interpreter: Any, delegate: str, runtime: str) -> None:
        self._interpreter = interpreter
        self._runtime = runtime
        try:
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
    """Share of the graph's nodes that a delegate took over, 0 to 1.

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
    return len(taken) / len(nodes) if nodes else 0.0


def _spec(detail: Mapping[str, Any]) -> TensorSpec:
    scale, zero_point = detail["quantization"]
    return make_spec(
        str(detail["name"]),
        np.dtype(detail["dtype"]).name,
        [int(size) for size in detail["shape"]],
        float(scale) if scale else None,
        int(zero_point) if scale else None,
    )
