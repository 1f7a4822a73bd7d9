"""Small TFLite models of one operator each, with weights, scales and options drawn at random.

Each family takes a generator and `int8` or `float32` and gives the files of one draw.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.contract.tflitewriter import Op, T, write


def scale(rng: np.random.Generator) -> float:
    return float(np.float32(np.exp(rng.uniform(np.log(0.003), np.log(0.2)))))


def zero(rng: np.random.Generator) -> int:
    return int(rng.integers(-128, 128))


def weights(rng: np.random.Generator, shape: tuple[int, ...], axis: int, count: int, dtype: str) -> T:
    if dtype == "float32":
        return T(dtype, shape, data=rng.normal(0, 1, shape))
    scales = [scale(rng) / 4 for _ in range(count)]
    return T(dtype, shape, scales, 0, axis, rng.integers(-127, 128, shape))


def bias(rng: np.random.Generator, count: int, x: T, w: T) -> T:
    if x.dtype == "float32":
        return T("float32", (count,), data=rng.normal(0, 1, count))
    scales = [x.scales[0] * s for s in w.scales]
    return T("int32", (count,), scales, 0, 0, rng.integers(-5000, 5000, count))


def size_after(size: int, kernel: int, stride: int, dilation: int, padding: int) -> int:
    return -(-size // stride) if padding == 0 else (size - (kernel - 1) * dilation - 1) // stride + 1


def convolutions(rng: np.random.Generator, dtype: str) -> Iterator[bytes]:
    for depthwise in (False, True):
        for padding in (0, 1):
            for stride, dilation, activation in ((1, 1, 0), (2, 1, 1), (3, 1, 3), (1, 2, 2)):
                kernel, depth, h, w = int(rng.integers(1, 5)), int(rng.integers(1, 5)), 13, 10
                count = depth * 2 if depthwise else 6
                shape = (1, kernel, kernel, count) if depthwise else (count, kernel, kernel, depth)
                x = T(dtype, (1, h, w, depth), [scale(rng)], zero(rng))
                wt = weights(rng, shape, 3 if depthwise else 0, count if rng.random() < 0.7 else 1, dtype)
                out = [size_after(s, kernel, stride, dilation, padding) for s in (h, w)]
                y = T(dtype, (1, *out, count), [scale(rng) * 20], zero(rng))
                options = {
                    "padding": padding,
                    "strideW": stride,
                    "strideH": stride,
                    "dilationWFactor": dilation,
                    "dilationHFactor": dilation,
                    "fusedActivationFunction": activation,
                }
                kind = "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions"
                if depthwise:
                    options["depthMultiplier"] = 2
                name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
                op = Op(name, [0, 1, 2], [3], kind, options)
                yield write([x, wt, bias(rng, count, x, wt), y], [op], [0], [3])


def fully_connected(rng: np.random.Generator, dtype: str) -> Iterator[bytes]:
    for activation in (0, 1, 3):
        for per_channel in (False, True):
            x = T(dtype, (3, 2, 12), [scale(rng)], zero(rng))
            wt = weights(rng, (7, 24), 0, 7 if per_channel else 1, dtype)
            y = T(dtype, (3, 7), [scale(rng) * 20], zero(rng))
            op = Op("FULLY_CONNECTED", [0, 1, 2], [3], "FullyConnectedOptions", {"fusedActivationFunction": activation})
            yield write([x, wt, bias(rng, 7, x, wt), y], [op], [0], [3])
    x, wt = T(dtype, (1, 2, 24), [scale(rng)], zero(rng)), weights(rng, (7, 24), 0, 1, dtype)
    y = T(dtype, (1, 2, 7), [scale(rng) * 20], zero(rng))
    op = Op("FULLY_CONNECTED", [0, 1, -1], [2], "FullyConnectedOptions", {"keepNumDims": True})
    yield write([x, wt, y], [op], [0], [2])


def pools(rng: np.random.Generator, dtype: str) -> Iterator[bytes]:
    for name in ("AVERAGE_POOL_2D", "MAX_POOL_2D"):
        for padding in (0, 1):
            for activation in (0, 3):
                q = ([scale(rng)], zero(rng))
                out = [size_after(s, 3, 2, 1, padding) for s in (9, 8)]
                options = {
                    "padding": padding,
                    "strideW": 2,
                    "strideH": 2,
                    "filterWidth": 3,
                    "filterHeight": 3,
                    "fusedActivationFunction": activation,
                }
                op = Op(name, [0], [1], "Pool2DOptions", options)
                yield write([T(dtype, (1, 9, 8, 3), *q), T(dtype, (1, *out, 3), *q)], [op], [0], [1])


def sums(rng: np.random.Generator, dtype: str) -> Iterator[bytes]:
    for name, kind in (("ADD", "AddOptions"), ("SUB", "SubOptions"), ("MUL", "MulOptions")):
        for activation, other in ((0, (1, 5, 4, 3)), (1, (1, 5, 4, 3)), (3, (1, 1, 1, 3)), (0, ())):
            tensors = [T(dtype, shape, [scale(rng)], zero(rng)) for shape in ((1, 5, 4, 3), other, (1, 5, 4, 3))]
            yield write(tensors, [Op(name, [0, 1], [2], kind, {"fusedActivationFunction": activation})], [0, 1], [2])


def tables(rng: np.random.Generator, dtype: str) -> Iterator[bytes]:
    for name in ("LOGISTIC", "TANH"):
        for step in (0.02, 0.05, 0.11):
            of = (1 / 256, -128) if name == "LOGISTIC" else (1 / 128, 0)
            tensors = [T(dtype, (1, 500), [step], zero(rng)), T(dtype, (1, 500), [of[0]], of[1])]
            yield write(tensors, [Op(name, [0], [1])], [0], [1])
    for name in ("RELU", "RELU6"):
        tensors = [T(dtype, (1, 500), [scale(rng)], zero(rng)), T(dtype, (1, 500), [scale(rng)], zero(rng))]
        yield write(tensors, [Op(name, [0], [1])], [0], [1])


def softmaxes(rng: np.random.Generator, dtype: str) -> Iterator[bytes]:
    for step in (0.004, 0.03, 0.1, 0.4, 3.0):
        for beta in (1.0, 0.5):
            tensors = [T(dtype, (9, 11), [step], zero(rng)), T(dtype, (9, 11), [1 / 256], -128)]
            yield write(tensors, [Op("SOFTMAX", [0], [1], "SoftmaxOptions", {"beta": beta})], [0], [1])


def means(rng: np.random.Generator, dtype: str) -> Iterator[bytes]:
    for axes, shape, keep in (
        ((1, 2), (1, 7, 7, 5), False),
        ((1, 2), (1, 7, 5, 5), True),
        ((-1,), (1, 2, 3, 6), False),
        ((1,), (2, 3), True),
    ):
        gone = {axis % len(shape) for axis in axes}
        out = [1 if i in gone else size for i, size in enumerate(shape) if keep or i not in gone]
        x, y = T(dtype, shape, [scale(rng)], zero(rng)), T(dtype, out, [scale(rng)], zero(rng))
        axis = T("int32", (len(axes),), data=axes)
        yield write([x, axis, y], [Op("MEAN", [0, 1], [2], "ReducerOptions", {"keepDims": keep})], [0], [2])


def shapes(rng: np.random.Generator, dtype: str) -> Iterator[bytes]:
    q = ([scale(rng)], zero(rng))
    widths = T("int32", (4, 2), data=[[0, 0], [1, 2], [0, 3], [0, 0]])
    yield write([T(dtype, (1, 3, 4, 2), *q), widths, T(dtype, (1, 6, 7, 2), *q)], [Op("PAD", [0, 1], [2])], [0], [2])
    order = T("int32", (4,), data=[0, 2, 3, 1])
    pair = [T(dtype, (1, 3, 4, 5), *q), order, T(dtype, (1, 4, 5, 3), *q)]
    yield write(pair, [Op("TRANSPOSE", [0, 1], [2])], [0], [2])
    parts = [T(dtype, (1, 2, 3), *q), T(dtype, (1, 4, 3), *q), T(dtype, (1, 6, 3), *q)]
    yield write(parts, [Op("CONCATENATION", [0, 1], [2], "ConcatenationOptions", {"axis": -2})], [0, 1], [2])
    for name, kind in (("RESHAPE", "ReshapeOptions"), ("SQUEEZE", "SqueezeOptions")):
        options = {"newShape": [3, 8]} if name == "RESHAPE" else {"squeezeDims": [0]}
        pair = [T(dtype, (1, 3, 8), *q), T(dtype, (3, 8), *q)]
        yield write(pair, [Op(name, [0], [1], kind, options)], [0], [1])


def conversions(rng: np.random.Generator, dtype: str) -> Iterator[bytes]:
    shape = (1, 400)
    for other in ("int8", "uint8"):
        middle = 0 if other == "int8" else 128
        quantized = T(other, shape, [scale(rng) / 4], zero(rng) + middle)
        if dtype == "float32":
            yield write([T("float32", shape), quantized], [Op("QUANTIZE", [0], [1])], [0], [1])
            yield write([quantized, T("float32", shape)], [Op("DEQUANTIZE", [0], [1])], [0], [1])
        else:
            again = T(dtype, shape, [scale(rng)], zero(rng))
            yield write([quantized, again], [Op("QUANTIZE", [0], [1])], [0], [1])


OPERATORS = (convolutions, fully_connected, pools, sums, tables, softmaxes, means, shapes, conversions)
