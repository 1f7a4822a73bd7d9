"""The operators without weights, and the table of all that the reference runs.

Rules of int8 arithmetic are those of TFLite's portable kernels; each is named where it is not plain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from agent.worker.delegates.fixedpoint import (
    exp_of_negative,
    high_product,
    reciprocal,
    rounded,
    scaler,
    shift_right,
    wrapped,
)
from agent.worker.delegates.referencelayers import average_pool, convolution, depthwise, fully_connected, max_pool
from agent.worker.delegates.referencenode import Kernel, Node
from agent.worker.delegates.tflitefile import Tensor
from agent.worker.tensor import Array

_SUM_SHIFT = 20
"""Bits that sums of two int8 tensors gain before they are scaled."""
_SOFTMAX_INTEGER_BITS = 5
_SOFTMAX_SUM_BITS = 12


def _sum(node: Node, sign: int) -> Kernel:
    one, two = node.input(0), node.input(1)
    kind = node.kind(one, two)
    _need_broadcast(node, one, two)
    low, high = node.limits(node.options.byte(0))
    if kind == "float32":
        return lambda values: np.clip(values[0] + sign * values[1], low, high).astype(np.float32)
    (s1, z1), (s2, z2), (s3, z3) = node.quantum(one), node.quantum(two), node.quantum(node.output)
    twice = 2 * np.float64(max(s1, s2))
    first, second = scaler(np.float64(s1) / twice), scaler(np.float64(s2) / twice)
    last = scaler(twice / ((1 << _SUM_SHIFT) * np.float64(s3)))

    def run(values: Sequence[Array]) -> Array:
        a = first.apply((values[0].astype(np.int64) - z1) << _SUM_SHIFT)
        b = second.apply((values[1].astype(np.int64) - z2) << _SUM_SHIFT)
        return np.clip(last.apply(wrapped(a + sign * b)) + z3, low, high).astype(np.int8)

    return run


def _add(node: Node) -> Kernel:
    return _sum(node, 1)


def _subtract(node: Node) -> Kernel:
    return _sum(node, -1)


def _multiply(node: Node) -> Kernel:
    one, two = node.input(0), node.input(1)
    kind = node.kind(one, two)
    _need_broadcast(node, one, two)
    low, high = node.limits(node.options.byte(0))
    if kind == "float32":
        return lambda values: np.clip(values[0] * values[1], low, high).astype(np.float32)
    (s1, z1), (s2, z2), (s3, z3) = node.quantum(one), node.quantum(two), node.quantum(node.output)
    factor = scaler(np.float64(s1 * s2 / s3))  # as floats, in this order

    def run(values: Sequence[Array]) -> Array:
        product = (values[0].astype(np.int64) - z1) * (values[1].astype(np.int64) - z2)
        return np.clip(factor.apply(product) + z3, low, high).astype(np.int8)

    return run


def _table(node: Node, function: Callable[[Array], Array]) -> Kernel:
    """A function of one value; int8 takes each of its 256 answers from a table that is computed in floats."""
    tensor = node.input(0)
    kind = node.kind(tensor)
    node.shaped(tensor.shape)
    if kind == "float32":
        return lambda values: function(values[0].astype(np.float64)).astype(np.float32)
    (s1, z1), (s2, z2) = node.quantum(tensor), node.quantum(node.output)
    steps = np.arange(-128, 128)
    real = function((s1 * (steps - z1).astype(np.float32)).astype(np.float64)).astype(np.float32)
    table = np.clip(rounded(real * (np.float32(1) / s2)) + z2, -128, 127).astype(np.int8)
    return lambda values: table[values[0].astype(np.int64) + 128]


def _logistic(node: Node) -> Kernel:
    return _table(node, lambda x: np.asarray(0.5 * (1 + np.tanh(x / 2))))


def _tanh(node: Node) -> Kernel:
    return _table(node, np.tanh)


def _clipped(low: float, high: float) -> Callable[[Node], Kernel]:
    """RELU and its kind as operators of their own."""

    def make(node: Node) -> Kernel:
        tensor = node.input(0)
        kind = node.kind(tensor)
        node.shaped(tensor.shape)
        if kind == "float32":
            return lambda values: np.clip(values[0], np.float32(low), np.float32(high))
        (s1, z1), (s2, z2) = node.quantum(tensor), node.quantum(node.output)
        factor = scaler(np.float64(s1 / s2))
        bounds = np.asarray([low, high], np.float32) / s2
        least, most = np.where(np.isfinite(bounds), z2 + rounded(np.nan_to_num(bounds).astype(np.float64)), bounds)

        def run(values: Sequence[Array]) -> Array:
            steps = factor.apply(values[0].astype(np.int64) - z1) + z2
            return np.clip(np.clip(steps, least, most), -128, 127).astype(np.int8)

        return run

    return make


def _softmax(node: Node) -> Kernel:
    """Along the last dimension. int8: exponentials and the reciprocal of their sum in fixed point."""
    tensor = node.input(0)
    kind = node.kind(tensor)
    node.shaped(tensor.shape)
    node.need(len(tensor.shape) > 0 and tensor.shape[-1] > 0, "its input has no dimension")
    beta = np.float32(node.options.real(0))
    node.need(bool(0 < beta < 1e6), f"its beta is {beta}")
    if kind == "float32":

        def run_float(values: Sequence[Array]) -> Array:
            x = values[0].astype(np.float64)
            exponentials = np.exp((x - x.max(-1, keepdims=True)) * np.float64(beta))
            return np.asarray(exponentials / exponentials.sum(-1, keepdims=True)).astype(np.float32)

        return run_float
    scale, _ = node.quantum(tensor)
    node.need(node.quantum(node.output) == (np.float32(1 / 256), -128), "its output is not in steps of 1/256 from -128")
    node.need(tensor.shape[-1] < 1 << (_SOFTMAX_SUM_BITS - 1), f"{tensor.shape[-1]} classes are too many")
    fraction_bits = 31 - _SOFTMAX_INTEGER_BITS
    factor = scaler(min(np.float64(beta) * np.float64(scale) * (1 << fraction_bits), (1 << 31) - 1.0))
    shift = int(factor.shift)
    node.need(shift >= 0, f"its scale {scale:g} is too small")
    # below this the scaled difference leaves the range of the exponential, which is then taken as 0
    least = -math.floor(((1 << _SOFTMAX_INTEGER_BITS) - 1) * 2.0**fraction_bits / 2.0**shift)

    def run(values: Sequence[Array]) -> Array:
        x = values[0].astype(np.int64)
        difference = x - x.max(-1, keepdims=True)
        counts = difference >= least
        scaled = high_product(np.where(counts, difference, 0) << shift, factor.fraction)
        exponentials = exp_of_negative(scaled, _SOFTMAX_INTEGER_BITS)
        total = np.where(counts, shift_right(exponentials, _SOFTMAX_SUM_BITS), 0).sum(-1, keepdims=True)
        inverse, bits = reciprocal(total, _SOFTMAX_SUM_BITS)
        steps = shift_right(high_product(inverse, exponentials), bits + 31 - 8)
        return np.where(counts, np.clip(steps - 128, -128, 127), -128).astype(np.int8)

    return run


def _mean(node: Node) -> Kernel:
    """MEAN over some dimensions. int8: the sum is scaled by a factor that holds the count, truncated."""
    tensor = node.input(0)
    kind = node.kind(tensor)
    rank = len(tensor.shape)
    given = node.integers(1)
    node.need(bool(given) and all(-rank <= axis < rank for axis in given), f"its dimensions are {given}")
    axes = tuple(sorted({axis % rank for axis in given}))
    keep = node.options.flag(0)
    left = [1 if i in axes else size for i, size in enumerate(tensor.shape) if keep or i not in axes]
    node.shaped(left)
    count = math.prod(tensor.shape[axis] for axis in axes)
    node.need(count > 0, "it has nothing to average")
    if kind == "float32":
        return lambda values: np.asarray(values[0].mean(axis=axes, dtype=np.float64), np.float32).reshape(left)
    (s1, z1), (s2, z2) = node.quantum(tensor), node.quantum(node.output)
    factor = scaler(np.float64(s1) / np.float64(s2))
    bits = min(count.bit_length() - 1, 32, 31 + int(factor.shift))
    factor = type(factor)((factor.fraction << bits) // count, factor.shift - bits)

    def run(values: Sequence[Array]) -> Array:
        total = np.asarray(values[0].astype(np.int64).sum(axis=axes)).reshape(left) - z1 * count
        return np.clip(factor.apply(wrapped(total)) + z2, -128, 127).astype(np.int8)

    return run


def _reshape(node: Node) -> Kernel:
    """RESHAPE, SQUEEZE, EXPAND_DIMS: the shape is the one that the file declares for the output."""
    tensor = node.input(0)
    node.need(tensor.dtype == node.output.dtype, "it changes the dtype")
    node.need(math.prod(tensor.shape) == math.prod(node.output.shape), "it changes the number of values")
    node.same_quanta(tensor)
    return lambda values: values[0].reshape(node.output.shape)


def _transpose(node: Node) -> Kernel:
    tensor, order = node.input(0), node.integers(1)
    node.need(tensor.dtype == node.output.dtype, "it changes the dtype")
    node.need(sorted(order) == list(range(len(tensor.shape))), f"its order is {order}")
    node.shaped([tensor.shape[axis] for axis in order])
    node.same_quanta(tensor)
    return lambda values: np.transpose(values[0], order)


def _pad(node: Node) -> Kernel:
    """PAD with zero, which for int8 is the zero point."""
    tensor, widths = node.input(0), node.integers(1)
    node.need(tensor.dtype == node.output.dtype, "it changes the dtype")
    node.need(len(widths) == 2 * len(tensor.shape) and min(widths, default=0) >= 0, f"its widths are {widths}")
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    node.shaped([size + before + after for size, (before, after) in zip(tensor.shape, pairs, strict=True)])
    node.same_quanta(tensor)
    zero = node.quantum(node.output)[1] if node.output.dtype in ("int8", "uint8") else 0
    return lambda values: np.pad(values[0], pairs, constant_values=zero)


def _concatenation(node: Node) -> Kernel:
    tensors = [node.input(index) for index in range(len(node.inputs))]
    node.need(bool(tensors) and all(t.dtype == node.output.dtype for t in tensors), "it mixes dtypes")
    rank = len(node.output.shape)
    axis = node.options.signed(0)
    node.need(-rank <= axis < rank, f"its dimension is {axis}")
    axis %= rank
    for tensor in tensors:
        node.need(len(tensor.shape) == rank, "it mixes ranks")
    node.same_quanta(*tensors)
    for i, size in enumerate(node.output.shape):
        parts = [tensor.shape[i] for tensor in tensors]
        fits = sum(parts) == size if i == axis else set(parts) == {size}
        node.need(fits, f"parts of the sizes {parts} do not make {size}")
    node.need(node.options.byte(1) == 0, "it has a fused activation")
    return lambda values: np.concatenate(values, axis=axis)


def _quantize(node: Node) -> Kernel:
    """QUANTIZE: from floats, or from steps of one size to steps of another."""
    tensor, output = node.input(0), node.output
    node.shaped(tensor.shape)
    node.need(output.dtype in ("int8", "uint8"), f"its output is {output.dtype or 'not known here'}")
    scale, zero_point = node.quantum(output)
    bounds = np.iinfo(output.dtype)
    if tensor.dtype == "float32":

        def from_floats(values: Sequence[Array]) -> Array:
            steps = rounded(values[0] / scale) + np.float32(zero_point)
            return np.clip(np.nan_to_num(steps), bounds.min, bounds.max).astype(output.dtype)

        return from_floats
    node.need(tensor.dtype in ("int8", "uint8"), f"its input is {tensor.dtype or 'not known here'}")
    of_input, zero_of_input = node.quantum(tensor)
    factor = scaler(np.float64(of_input) / np.float64(scale))

    def from_steps(values: Sequence[Array]) -> Array:
        steps = factor.apply(values[0].astype(np.int64) - zero_of_input) + zero_point
        return np.clip(steps, bounds.min, bounds.max).astype(output.dtype)

    return from_steps


def _dequantize(node: Node) -> Kernel:
    tensor = node.input(0)
    node.shaped(tensor.shape)
    node.need(node.output.dtype == "float32", f"its output is {node.output.dtype or 'not known here'}")
    if tensor.dtype == "float16":
        return lambda values: values[0].astype(np.float32)
    node.need(tensor.dtype in ("int8", "uint8", "int16"), f"its input is {tensor.dtype or 'not known here'}")
    scale, zero_point = node.quantum(tensor)
    return lambda values: (scale * (values[0].astype(np.int64) - zero_point).astype(np.float64)).astype(np.float32)


def _need_broadcast(node: Node, one: Tensor, two: Tensor) -> None:
    try:
        shape = np.broadcast_shapes(one.shape, two.shape)
    except ValueError as e:
        raise node.bad(f"{list(one.shape)} and {list(two.shape)} do not go together") from e
    node.shaped(shape)


KERNELS: Mapping[str, Callable[[Node], Kernel]] = {
    "ADD": _add,
    "AVERAGE_POOL_2D": average_pool,
    "CONCATENATION": _concatenation,
    "CONV_2D": convolution,
    "DEPTHWISE_CONV_2D": depthwise,
    "DEQUANTIZE": _dequantize,
    "EXPAND_DIMS": _reshape,
    "FULLY_CONNECTED": fully_connected,
    "LOGISTIC": _logistic,
    "MAX_POOL_2D": max_pool,
    "MEAN": _mean,
    "MUL": _multiply,
    "PAD": _pad,
    "QUANTIZE": _quantize,
    "RELU": _clipped(0.0, math.inf),
    "RELU6": _clipped(0.0, 6.0),
    "RESHAPE": _reshape,
    "SOFTMAX": _softmax,
    "SQUEEZE": _reshape,
    "SUB": _subtract,
    "TANH": _tanh,
    "TRANSPOSE": _transpose,
}
