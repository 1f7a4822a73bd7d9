"""`reference`: a slow and exact interpreter of TFLite models, in NumPy alone.

The oracle beside which the other delegates are judged: its int8 results are, bit for bit, those of TFLite's portable
kernels. It is in no profile's ladder; it runs only where a profile or a line names it.
Invariants: everything is checked when a model is loaded (`referencenode`, `tflitefile`), so that a hostile file is a
refusal and what loads runs to its end in bounded memory; constants stay in the mapped file.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import numpy as np

from agent.errors import ModelError, Reason
from agent.worker.delegates import Compiled, Options
from agent.worker.delegates.model import check_sealed
from agent.worker.delegates.referencenode import MAX_VALUES, Budget, Kernel, Node
from agent.worker.delegates.referenceops import KERNELS
from agent.worker.delegates.tflitefile import Graph, Operator, Tensor, read_graph
from agent.worker.tensor import Array, TensorSpec, make_spec

MAX_NODES = 1 << 12
MAX_ENDS = 64
"""Inputs of a graph, and outputs."""


class Reference:
    """The reference interpreter."""

    name = "reference"
    driver = ""
    formats = frozenset({"tflite"})

    def __init__(self) -> None:
        self.runtime = f"numpy {np.__version__}"

    def load(self, fd: int, format: str, options: Options) -> ReferenceSession:
        """See `Delegate.load`. `options` change nothing here."""
        check_sealed(fd)
        # Sealed: nobody shortens it under the mapping, which the constants keep alive.
        graph = read_graph(memoryview(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)))
        with np.errstate(all="ignore"):  # scales whose ratio is no number are refused where it is used
            return ReferenceSession(graph)


@dataclass(frozen=True)
class _Step:
    kernel: Kernel
    inputs: tuple[int, ...]
    output: int
    forget: tuple[int, ...]
    """Tensors that nothing after this step reads."""


class ReferenceSession:
    """A loaded graph.

    Raises:
        ModelError: `model_unloadable`, naming the operator that it does not run, or `model_shape`.
    """

    actual = Reference.name
    coverage = 1.0
    compiled: Compiled | None = None

    def __init__(self, graph: Graph) -> None:
        if max(len(graph.inputs), len(graph.outputs)) > MAX_ENDS:
            raise _unloadable(f"it has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs")
        self.inputs = tuple(_spec(graph.tensors[index]) for index in graph.inputs)
        self.outputs = tuple(_spec(graph.tensors[index]) for index in graph.outputs)
        self._in = graph.inputs
        self._out = graph.outputs
        self._steps = _plan(graph)
        self.tensors = tuple(spec.empty() for spec in self.inputs)
        self._constants = {i: t.data for i, t in enumerate(graph.tensors) if t.data is not None}

    def run(self) -> tuple[Array, ...]:
        """See `Session.run`."""
        values: dict[int, Array] = dict(self._constants)
        values.update(zip(self._in, self.tensors, strict=True))
        nothing = np.zeros(0)
        with np.errstate(all="ignore"):  # a model's own infinities are its answer
            for step in self._steps:
                inputs = [values[index] if index >= 0 else nothing for index in step.inputs]
                values[step.output] = step.kernel(inputs)
                for index in step.forget:
                    del values[index]
        return tuple(np.array(values[index], order="C") for index in self._out)


def _spec(tensor: Tensor) -> TensorSpec:
    scale, zero_point = None, None
    quanta = tensor.quantization
    if quanta is not None and len(quanta.scales) == 1 and tensor.dtype in ("int8", "uint8", "int16"):
        scale, zero_point = float(quanta.scales[0]), int(quanta.zero_points[0])
    if math.prod(tensor.shape) > MAX_VALUES:
        raise _unloadable(f"tensor {tensor.name[:60]!r} has more than {MAX_VALUES} values")
    if tensor.open or 0 in tensor.shape:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"tensor {tensor.name[:60]!r} has the open shape {list(tensor.shape)}",
            hint="export the model with a fixed shape",
        )
    return make_spec(tensor.name, tensor.dtype or "of a kind not known here", tensor.shape, scale, zero_point)


def _plan(graph: Graph) -> tuple[_Step, ...]:
    """Every operator with its kernel, checked: it is known, and its inputs are there when it runs."""
    if len(graph.operators) > MAX_NODES:
        raise _unloadable(f"it has {len(graph.operators)} operators, beyond {MAX_NODES}")
    there = {i for i, tensor in enumerate(graph.tensors) if tensor.data is not None}
    there.update(graph.inputs)
    last: dict[int, int] = {}
    nodes = []
    budget = Budget()
    for number, operator in enumerate(graph.operators):
        node = _node(graph, operator, budget)
        for index in operator.inputs:
            node.need(index < 0 or index in there, "an input of it is not computed before")
            last[index] = number
        (output,) = operator.outputs
        node.need(output not in there, "its output is computed twice")
        there.add(output)
        last[output] = number
        nodes.append(node)
    for index in graph.outputs:
        if index not in there:
            raise _unloadable(f"output {graph.tensors[index].name[:60]!r} is never computed")
    kept = set(graph.outputs)
    kept.update(graph.inputs, (i for i, tensor in enumerate(graph.tensors) if tensor.data is not None))
    forget: dict[int, list[int]] = {}
    for index, number in last.items():
        if index >= 0 and index not in kept:
            forget.setdefault(number, []).append(index)
    return tuple(
        _Step(KERNELS[node.name](node), operator.inputs, operator.outputs[0], tuple(forget.get(number, ())))
        for number, (node, operator) in enumerate(zip(nodes, graph.operators, strict=True))
    )


def _node(graph: Graph, operator: Operator, budget: Budget) -> Node:
    name = operator.name
    if name not in KERNELS:
        raise ModelError(
            Reason.MODEL_UNLOADABLE,
            f"the reference does not have the operator {name[:80]}",
            hint=f"it has {', '.join(KERNELS)}; run this model on another delegate",
        )
    if len(operator.outputs) != 1:
        raise _unloadable(f"{name} has {len(operator.outputs)} outputs")
    inputs = tuple(graph.tensors[index] if index >= 0 else None for index in operator.inputs)
    node = Node(name, inputs, graph.tensors[operator.outputs[0]], operator.options, budget)
    node.need_usable()
    return node


def _unloadable(why: str) -> ModelError:
    return ModelError(Reason.MODEL_UNLOADABLE, f"the reference cannot run the model: {why}", hint="check the export")
