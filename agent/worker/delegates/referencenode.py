"""One operator of a graph as the reference's kernels see it: its tensors, its options, and how it says no.

Invariant: a kernel is made only from tensors whose shapes, dtypes and scales were checked here, so it cannot fail when
it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agent.errors import ModelError, Reason
from agent.worker.delegates.fixedpoint import rounded
from agent.worker.delegates.tflitefile import Record, Tensor
from agent.worker.tensor import DTYPES, Array

Kernel = Callable[[Sequence[Array]], Array]
"""Takes the inputs in their order (those left out are empty) and returns the output."""

MAX_KERNEL_POSITIONS = 1 << 12
MAX_WORK = 1 << 35
"""Multiplications of one run, everything else that is done to a value counted as many; minutes of one core."""
MAX_VALUES = 1 << 24
"""Numbers in one tensor; sums take eight bytes each."""
MAX_TENSOR_BYTES = 1 << 30
"""All tensors that a run computes, together."""
_WORK_PER_VALUE = 64
_FAR = 1 << 30  # steps; no output reaches them

_NONE, _RELU, _RELU_N1_TO_1, _RELU6 = range(4)


@dataclass
class Budget:
    """What is left of the limits for one graph."""

    work: int = MAX_WORK
    tensor_bytes: int = MAX_TENSOR_BYTES


@dataclass(frozen=True)
class Node:
    """An operator, its inputs (None where left out), its one output and its options."""

    name: str
    inputs: tuple[Tensor | None, ...]
    output: Tensor
    options: Record
    budget: Budget

    def bad(self, why: str) -> ModelError:
        """The error of a node that the reference does not run."""
        return ModelError(
            Reason.MODEL_UNLOADABLE,
            f"the reference cannot run {self.name} {self.output.name[:60]!r}: {why}",
            hint="run this model on another delegate",
        )

    def need(self, condition: bool, why: str) -> None:
        """Refuse the node unless `condition`.

        Raises:
            ModelError: `model_unloadable`.
        """
        if not condition:
            raise self.bad(why)

    def need_usable(self) -> None:
        """Refuse tensors that nothing here can hold, and count what the output takes."""
        for tensor in (*(tensor for tensor in self.inputs if tensor is not None), self.output):
            self.need(not tensor.odd, f"tensor {tensor.name[:60]!r} is {tensor.odd}")
            size = math.prod(tensor.shape)
            self.need(0 < size <= MAX_VALUES, f"tensor {tensor.name[:60]!r} has {size} values")
        size = math.prod(self.output.shape)
        self.spend(size * _WORK_PER_VALUE)
        if self.output.dtype:
            self.budget.tensor_bytes -= size * DTYPES[self.output.dtype].itemsize
        self.need(self.budget.tensor_bytes >= 0, f"the tensors up to here take more than {MAX_TENSOR_BYTES} bytes")

    def spend(self, work: int) -> None:
        """Count `work` multiplications.

        Raises:
            ModelError: `model_unloadable` when the graph takes too many.
        """
        self.budget.work -= work
        self.need(self.budget.work >= 0, f"the graph up to here takes more than {MAX_WORK} multiplications")

    def input(self, index: int) -> Tensor:
        """An input that has to be there."""
        tensor = self.inputs[index] if index < len(self.inputs) else None
        if tensor is None:
            raise self.bad(f"its input {index} is missing")
        return tensor

    def optional(self, index: int) -> Tensor | None:
        """An input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def integers(self, index: int) -> list[int]:
        """The numbers of a constant input of int32 or int64."""
        tensor = self.input(index)
        if tensor.data is None or tensor.dtype not in ("int32", "int64"):
            raise self.bad(f"its input {index} is not constant integers")
        self.need(tensor.data.size <= 64, f"its input {index} has {tensor.data.size} numbers")
        return [int(number) for number in tensor.data.reshape(-1)]

    def kind(self, *tensors: Tensor, allowed: Sequence[str] = ("int8", "float32")) -> str:
        """The one dtype of `tensors` and the output."""
        dtypes = {tensor.dtype for tensor in (*tensors, self.output)}
        dtype = self.output.dtype
        self.need(len(dtypes) == 1 and dtype in allowed, f"it mixes or has the dtypes {', '.join(sorted(dtypes))}")
        if dtype == "int8":
            for tensor in (*tensors, self.output):
                self.quantum(tensor)
        return dtype

    def quantum(self, tensor: Tensor) -> tuple[np.float32, int]:
        """Scale and zero point of a tensor that has one of each."""
        found = tensor.quantization
        if found is None or len(found.scales) != 1:
            raise self.bad(f"tensor {tensor.name[:60]!r} has no scale, or several")
        return np.float32(found.scales[0]), int(found.zero_points[0])

    def same_quanta(self, *tensors: Tensor) -> None:
        """Refuse unless all tensors have the output's scale and zero point, as far as they have any."""
        if self.output.dtype in ("int8", "uint8"):
            wanted = self.quantum(self.output)
            for tensor in tensors:
                self.need(self.quantum(tensor) == wanted, "its input and its output have different scales")

    def shaped(self, shape: Sequence[int]) -> None:
        """Refuse unless the file declares the output shape that the operator gives."""
        self.need(
            tuple(shape) == self.output.shape,
            f"its output would be {list(shape)}, the file says {list(self.output.shape)}",
        )

    def limits(self, activation: int) -> tuple[float, float]:
        """Between what the output is held: in steps where it is int8, in real values where it is float32."""
        low, high = {
            _NONE: (-math.inf, math.inf),
            _RELU: (0.0, math.inf),
            _RELU_N1_TO_1: (-1.0, 1.0),
            _RELU6: (0.0, 6.0),
        }.get(activation, (math.nan, math.nan))
        self.need(not math.isnan(low), f"its fused activation {activation} is not supported")
        if self.output.dtype != "int8":
            return low, high
        scale, zero_point = self.quantum(self.output)
        bounds = np.iinfo(np.int8)
        return (
            bounds.min if math.isinf(low) else max(bounds.min, _step(low, scale, zero_point)),
            bounds.max if math.isinf(high) else min(bounds.max, _step(high, scale, zero_point)),
        )


def _step(value: float, scale: np.float32, zero_point: int) -> int:
    step = np.clip(np.float64(np.float32(value) / scale), -_FAR, _FAR)
    return zero_point + int(rounded(np.asarray(step)))
