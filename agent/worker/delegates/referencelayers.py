"""The layers with weights, and pooling: sums over a window, then scaled to the output's steps.

int8: the sums are exact (products of steps fit 18 bits, and float64 adds integers below 2^53 exactly), then scaled as
TFLite's portable kernels do. float32: the sums are float64 and rounded once, which is nearer to the true value than any
kernel; those differ from it by their own rounding.
Layouts: activations [batch, height, width, channels]; weights [out, height, width, in], depthwise [1, height, width,
out], fully connected [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from agent.worker.delegates.fixedpoint import Scaler, divide, scaler, wrapped
from agent.worker.delegates.referencenode import MAX_KERNEL_POSITIONS, MAX_VALUES, Kernel, Node
from agent.worker.delegates.tflitefile import Tensor
from agent.worker.tensor import Array

_SAME, _VALID = 0, 1
_WEIGHTS_AT_ONCE = 1 << 18
_WORK_PER_PLAIN_SUM = 16  # in units of a multiplication inside a product of matrices


@dataclass(frozen=True)
class _Window:
    """A kernel that moves over an image: (height, width) of everything."""

    size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    out: tuple[int, int]

    def padded(self, image: Array, value: float) -> Array:
        """`image` with `value` around it, as far as the window reaches."""
        (top, left), (bottom, right) = self.before, self.after
        return np.pad(image, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=value)

    def views(self, image: Array) -> Iterator[tuple[int, int, Array]]:
        """For each position in the kernel, what all output positions see there: views of a padded image."""
        for y in range(self.size[0]):
            for x in range(self.size[1]):
                rows = self._slice(0, y)
                yield y, x, image[:, rows, self._slice(1, x)]

    def _slice(self, axis: int, position: int) -> slice:
        start = position * self.dilation[axis]
        return slice(start, start + (self.out[axis] - 1) * self.stride[axis] + 1, self.stride[axis])


def convolution(node: Node) -> Kernel:
    """CONV_2D."""
    image, weights, options = node.input(0), node.input(1), node.options
    _need_ranks(node, image, weights)
    count, height, width, depth = weights.shape
    node.need(
        depth == image.shape[3], f"it has {image.shape[3]} channels and weights for {depth}; groups are not known"
    )
    window = _window(
        node,
        image,
        (height, width),
        options.byte(0),
        stride=(options.signed(2), options.signed(1)),
        dilation=(options.signed(5, 1), options.signed(4, 1)),
    )
    node.shaped((image.shape[0], *window.out, count))
    node.spend(math.prod(node.output.shape) * height * width * depth)
    finish = _finish(node, image, weights, 0, options.byte(3))
    center = _center(node, image)

    def run(values: Sequence[Array]) -> Array:
        padded = window.padded(values[0] - center, 0)
        total = np.zeros(node.output.shape)
        for y, x, seen in window.views(padded):
            total += seen @ values[1][:, y, x].T.astype(np.float64)
        return finish(total, values)

    return run


def depthwise(node: Node) -> Kernel:
    """DEPTHWISE_CONV_2D: each input channel has kernels of its own, several of them beside each other."""
    image, weights, options = node.input(0), node.input(1), node.options
    _need_ranks(node, image, weights)
    one, height, width, count = weights.shape
    depth = image.shape[3]
    node.need(one == 1 and count % depth == 0, f"{depth} channels do not go into {count}")
    window = _window(
        node,
        image,
        (height, width),
        options.byte(0),
        stride=(options.signed(2), options.signed(1)),
        dilation=(options.signed(6, 1), options.signed(5, 1)),
    )
    node.shaped((image.shape[0], *window.out, count))
    node.spend(math.prod(node.output.shape) * height * width * _WORK_PER_PLAIN_SUM)
    finish = _finish(node, image, weights, 3, options.byte(4))
    center = _center(node, image)

    def run(values: Sequence[Array]) -> Array:
        padded = window.padded(values[0] - center, 0)
        kernel = values[1][0].astype(np.float64)
        total = np.zeros(node.output.shape)
        for y, x, seen in window.views(padded):
            total += np.repeat(seen, count // depth, axis=3) * kernel[y, x]
        return finish(total, values)

    return run


def fully_connected(node: Node) -> Kernel:
    """FULLY_CONNECTED."""
    tensor, weights, options = node.input(0), node.input(1), node.options
    node.need(len(weights.shape) == 2 and weights.shape[1] > 0, f"its weights have the shape {list(weights.shape)}")
    node.need(options.byte(1) == 0, "its weights are shuffled")
    count, depth = weights.shape
    size = math.prod(tensor.shape)
    node.need(size > 0 and size % depth == 0, f"{size} values do not go into rows of {depth}")
    if options.flag(2):
        node.need(tensor.shape[-1] == depth, "its rows do not fit its weights")
        node.shaped((*tensor.shape[:-1], count))
    else:
        node.shaped((size // depth, count))
    node.spend(size * count)
    finish = _finish(node, tensor, weights, 0, options.byte(0))
    center = _center(node, tensor)
    weight_center = int(weights.quantization.zero_points[0]) if weights.quantization else 0
    rows_at_once = max(1, _WEIGHTS_AT_ONCE // depth)

    def run(values: Sequence[Array]) -> Array:
        matrix = values[0].reshape(-1, depth) - center
        total = np.empty((len(matrix), count))
        for begin in range(0, count, rows_at_once):  # all weights as float64 would be eight times the file
            rows = slice(begin, begin + rows_at_once)
            total[:, rows] = matrix @ (values[1][rows].astype(np.float64) - weight_center).T
        return finish(total.reshape(node.output.shape), values)

    return run


def average_pool(node: Node) -> Kernel:
    """AVERAGE_POOL_2D: the mean of what lies inside the image; int8 rounds ties away from zero."""
    image = node.input(0)
    node.kind(image)
    window, (low, high) = _pool(node, image)
    node.same_quanta(image)
    quantized = node.output.dtype == "int8"

    def run(values: Sequence[Array]) -> Array:
        padded = window.padded(values[0].astype(np.float64), 0)
        inside = window.padded(np.ones((1, *image.shape[1:3], 1)), 0)
        total = sum(seen for _, _, seen in window.views(padded))
        cells = sum(seen for _, _, seen in window.views(inside))
        if not quantized:
            return np.clip(total / cells, low, high).astype(np.float32)
        mean = divide(np.asarray(total).astype(np.int64), np.asarray(cells).astype(np.int64))
        return np.clip(mean, low, high).astype(np.int8)

    return run


def max_pool(node: Node) -> Kernel:
    """MAX_POOL_2D."""
    image = node.input(0)
    node.kind(image)
    window, (low, high) = _pool(node, image)
    node.same_quanta(image)
    least = -math.inf if node.output.dtype == "float32" else -128

    def run(values: Sequence[Array]) -> Array:
        padded = window.padded(values[0], least)
        most = np.full(node.output.shape, least, values[0].dtype)
        for _, _, seen in window.views(padded):
            most = np.maximum(most, seen)
        return np.clip(most, low, high).astype(values[0].dtype)

    return run


def _pool(node: Node, image: Tensor) -> tuple[_Window, tuple[float, float]]:
    options = node.options
    node.need(len(image.shape) == 4, f"its input has the shape {list(image.shape)}")
    window = _window(
        node,
        image,
        (options.signed(4), options.signed(3)),
        options.byte(0),
        stride=(options.signed(2), options.signed(1)),
        dilation=(1, 1),
    )
    node.shaped((image.shape[0], *window.out, image.shape[3]))
    node.spend(math.prod(node.output.shape) * math.prod(window.size) * _WORK_PER_PLAIN_SUM)
    return window, node.limits(options.byte(5))


def _window(
    node: Node,
    image: Tensor,
    size: tuple[int, int],
    padding: int,
    *,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> _Window:
    """The window over `image`; padding as TensorFlow defines it, the odd pixel at the bottom and the right."""
    node.need(padding in (_SAME, _VALID), f"its padding {padding} is unknown")
    node.need(1 <= math.prod(size) <= MAX_KERNEL_POSITIONS and min(size) > 0, f"its kernel has the size {list(size)}")
    before, after, out = [], [], []
    held = image.shape[0] * image.shape[3]
    for axis in (0, 1):
        length = image.shape[1 + axis]
        node.need(0 < stride[axis] < 1 << 16 and 0 < dilation[axis] < 1 << 16, "its strides are out of range")
        reach = (size[axis] - 1) * dilation[axis] + 1
        steps = -(-length // stride[axis]) if padding == _SAME else (length - reach) // stride[axis] + 1
        node.need(steps > 0, f"a kernel that reaches {reach} does not fit into {length}")
        missing = max((steps - 1) * stride[axis] + reach - length, 0)
        node.need(missing <= length + MAX_KERNEL_POSITIONS, f"its padding of {missing} is out of range")
        before.append(missing // 2)
        after.append(missing - missing // 2)
        out.append(steps)
        held *= length + missing
    node.need(held <= MAX_VALUES, f"its input has {held} values with its padding")
    return _Window(size, stride, dilation, (before[0], before[1]), (after[0], after[1]), (out[0], out[1]))


def _finish(
    node: Node, tensor: Tensor, weights: Tensor, axis: int, activation: int
) -> Callable[[Array, Sequence[Array]], Array]:
    """What comes after the sums: bias, scaling, zero point, activation. `axis`: the weights' output dimension."""
    kind = node.kind(tensor)
    node.need(weights.dtype == kind, f"its weights are {weights.dtype or 'of a kind'} that is not known here")
    count = node.output.shape[-1]
    bias = node.optional(2)
    if bias is not None:
        wanted = "int32" if kind == "int8" else "float32"
        node.need(bias.dtype == wanted and bias.shape == (count,), f"its bias is {bias.dtype}{list(bias.shape)}")
    low, high = node.limits(activation)
    if kind == "float32":

        def finish_float(total: Array, values: Sequence[Array]) -> Array:
            if bias is not None:
                total = total + values[2]
            return np.clip(total, low, high).astype(np.float32)

        return finish_float
    factor = _factor(node, tensor, weights, axis)
    # the portable kernel of FULLY_CONNECTED rounds once, those of convolutions twice (measured: LiteRT 2.3)
    scale = factor.apply_once if node.name == "FULLY_CONNECTED" else factor.apply
    zero_point = node.quantum(node.output)[1]

    def finish_int8(total: Array, values: Sequence[Array]) -> Array:
        sums = total.astype(np.int64)
        if bias is not None:
            sums = sums + values[2]
        return np.clip(scale(wrapped(sums)) + zero_point, low, high).astype(np.int8)

    return finish_int8


def _factor(node: Node, tensor: Tensor, weights: Tensor, axis: int) -> Scaler:
    """From steps of the sums to steps of the output, for each channel."""
    quanta = weights.quantization
    if quanta is None:
        raise node.bad("its weights have no scale")
    fully = node.name == "FULLY_CONNECTED"
    scales = quanta.scales
    if len(scales) > 1:
        node.need(quanta.axis == axis, f"its weights are quantized along dimension {quanta.axis}")
    if len(scales) > 1 or not fully:
        node.need(not quanta.zero_points.any(), "its weights have a zero point")
    of_input, of_output = node.quantum(tensor)[0], node.quantum(node.output)[0]
    if fully and len(scales) == 1:
        # here alone TFLite multiplies the scales as floats
        return scaler(np.float64(np.float32(of_input * scales[0])) / np.float64(of_output))
    return scaler(np.float64(of_input) * scales.astype(np.float64) / np.float64(of_output))


def _center(node: Node, tensor: Tensor) -> np.float64:
    """The zero point to take off the input, so that padding is zero."""
    return np.float64(node.quantum(tensor)[1] if tensor.dtype == "int8" else 0)


def _need_ranks(node: Node, image: Tensor, weights: Tensor) -> None:
    node.need(len(image.shape) == 4 and min(image.shape) > 0, f"its input has the shape {list(image.shape)}")
    node.need(len(weights.shape) == 4 and min(weights.shape) > 0, f"its weights have the shape {list(weights.shape)}")
