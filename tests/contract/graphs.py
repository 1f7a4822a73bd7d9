"""Small models in ONNX and TFLite, inputs, and the answers of plain arithmetic, for every delegate to meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.contract.tflitewriter import Op, T, write

_ONNX = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "int64": TensorProto.INT64,
}


@dataclass(frozen=True)
class Case:
    """A model, what goes in, what comes out.

    Attributes:
        needed: delegates that have to take it; any other may refuse it, but not answer wrongly.
        atol: by how much an answer may be off.
    """

    name: str
    format: str
    data: bytes
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    needed: frozenset[str] = field(default_factory=frozenset)
    atol: float = 0.0


ONNX_RUNTIMES = frozenset({"onnx:cpu", "onnx:openvino", "openvino:cpu"})
TFLITE_RUNTIMES = frozenset({"litert:xnnpack", "litert:cpu", "tflite:cpu", "openvino:cpu"})


def onnx_model(
    nodes: Sequence[object],
    inputs: Sequence[tuple[str, str, Sequence[object]]],
    outputs: Sequence[tuple[str, str, Sequence[object]]],
    weights: Sequence[tuple[str, np.ndarray]] = (),
    opset: int = 17,
) -> bytes:
    """A model of tensors given as (name, dtype, shape)."""

    def infos(tensors: Sequence[tuple[str, str, Sequence[object]]]) -> list[object]:
        return [helper.make_tensor_value_info(name, _ONNX[dtype], shape) for name, dtype, shape in tensors]

    kept = [numpy_helper.from_array(values, name) for name, values in weights]
    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), kept)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def cases() -> list[Case]:
    """All of them."""
    return [*_onnx_cases(), *_tflite_cases()]


def _numbers(shape: Sequence[int], dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(20240426)
    if dtype.startswith("float"):
        return rng.normal(0, 2, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def _onnx_cases() -> list[Case]:
    a, b = _numbers((1, 3, 4)), _numbers((1, 3, 4))[:, ::-1].copy()
    arithmetic = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["a", "b"], ["product"])]
    shape = (1, 3, 4)
    found = [
        Case(
            "two-inputs-two-outputs",
            "onnx",
            onnx_model(
                arithmetic,
                [("a", "float32", shape), ("b", "float32", shape)],
                [("sum", "float32", shape), ("product", "float32", shape)],
            ),
            (a, b),
            (a + b, a * b),
            ONNX_RUNTIMES,
            1e-5,
        ),
        _onnx_of_two_dtypes(),
        _onnx_per_channel(),
        _onnx_open_batch(),
    ]
    for dtype in ("float32", "float16", "int8", "uint8", "int16"):
        x = _numbers((1, 2, 3, 4), dtype)
        turn = [helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])]
        model = onnx_model(turn, [("x", dtype, (1, 2, 3, 4))], [("y", dtype, (1, 3, 4, 2))])
        found.append(Case(f"nchw-to-nhwc-{dtype}", "onnx", model, (x,), (x.transpose(0, 2, 3, 1),), ONNX_RUNTIMES))
    return found


def _onnx_of_two_dtypes() -> Case:
    x, q = _numbers((1, 5)), _numbers((1, 5), "uint8")
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["r"]),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    weights = [("scale", np.float32(0.5)), ("zero", np.uint8(100))]
    inputs = [("q", "uint8", (1, 5)), ("x", "float32", (1, 5))]
    model = onnx_model(nodes, inputs, [("y", "float32", (1, 5))], [(n, np.asarray(v)) for n, v in weights])
    return Case(
        "uint8-beside-float32", "onnx", model, (q, x), (x + (q.astype(np.float32) - 100) * 0.5,), ONNX_RUNTIMES, 1e-4
    )


def _onnx_per_channel() -> Case:
    """A convolution whose int8 weights have a scale a channel, between quantized tensors, channels first."""
    x = _numbers((1, 3, 6, 6))
    weights = np.random.default_rng(7).integers(-127, 128, (4, 3, 3, 3), dtype=np.int8)
    scales = np.asarray([0.001, 0.01, 0.1, 0.02], np.float32)
    step = np.float32(0.05)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "none"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "step", "none"], ["xr"]),
        helper.make_node("DequantizeLinear", ["w", "scales", "nones"], ["wr"], axis=0),
        helper.make_node("Conv", ["xr", "wr"], ["y"]),
    ]
    kept = [
        ("w", weights),
        ("scales", scales),
        ("nones", np.zeros(4, np.int8)),
        ("step", np.asarray(step)),
        ("none", np.asarray(np.int8(0))),
    ]
    model = onnx_model(nodes, [("x", "float32", x.shape)], [("y", "float32", (1, 4, 4, 4))], kept)
    seen = np.clip(np.rint(x / step), -128, 127) * step
    real = weights * scales.reshape(4, 1, 1, 1)
    windows = np.lib.stride_tricks.sliding_window_view(seen[0], (3, 3), axis=(1, 2))
    y = np.einsum("chwij,ocij->ohw", windows, real)[None].astype(np.float32)
    # a step of the input times the largest weights; runtimes may round halves of the input differently
    return Case("weights-with-a-scale-a-channel", "onnx", model, (x,), (y,), ONNX_RUNTIMES, 0.2)


def _onnx_open_batch() -> Case:
    x = _numbers((1, 3))
    node = helper.make_node("Relu", ["x"], ["y"])
    model = onnx_model([node], [("x", "float32", ["N", 3])], [("y", "float32", ["N", 3])])
    return Case("open-batch", "onnx", model, (x,), (np.maximum(x, 0),), ONNX_RUNTIMES)


def _tflite_cases() -> list[Case]:
    a, b = _numbers((1, 3, 4, 2)), _numbers((1, 3, 4, 2))[:, ::-1].copy()
    tensors = [T("float32", (1, 3, 4, 2)) for _ in range(4)]
    ops = [Op("ADD", [0, 1], [2], "AddOptions"), Op("MUL", [0, 1], [3], "MulOptions")]
    return [
        Case(
            "two-inputs-two-outputs",
            "tflite",
            write(tensors, ops, [0, 1], [2, 3]),
            (a, b),
            (a + b, a * b),
            TFLITE_RUNTIMES,
            1e-5,
        ),
        _tflite_quantized("int8", 3),
        _tflite_quantized("uint8", 120),
        _tflite_per_channel("int8"),
        _tflite_per_channel("int16"),
        _tflite_float16(),
        _tflite_open_batch(),
    ]


def _tflite_quantized(dtype: str, zero: int) -> Case:
    """The sum of two quantized tensors of different scales, channels last."""
    a, b = _numbers((1, 4, 4, 3), dtype), _numbers((1, 4, 4, 3), dtype)[:, ::-1].copy()
    tensors = [
        T(dtype, a.shape, [0.02], zero),
        T(dtype, a.shape, [0.03], zero - 1),
        T(dtype, a.shape, [0.05], zero + 2),
    ]
    model = write(tensors, [Op("ADD", [0, 1], [2], "AddOptions")], [0, 1], [2])
    real = (a.astype(np.float32) - zero) * 0.02 + (b.astype(np.float32) - (zero - 1)) * 0.03
    limits = np.iinfo(dtype)
    y = np.clip(np.rint(real / 0.05) + zero + 2, limits.min, limits.max).astype(dtype)
    return Case(f"sum-of-{dtype}", "tflite", model, (a, b), (y,), frozenset({"litert:xnnpack", "litert:cpu"}), 1)


def _tflite_per_channel(dtype: str) -> Case:
    """A convolution whose int8 weights have a scale a channel, on int8 or int16 activations."""
    x = _numbers((1, 6, 6, 3), dtype)
    weights = np.random.default_rng(7).integers(-127, 128, (4, 3, 3, 3), dtype=np.int8)
    scales = np.asarray([0.001, 0.01, 0.004, 0.02], np.float32)
    step, out = (0.05, 0.5) if dtype == "int8" else (0.0005, 0.002)
    bias = "int32" if dtype == "int8" else "int64"
    tensors = [
        T(dtype, x.shape, [step]),
        T("int8", weights.shape, scales, 0, 0, weights),
        T(bias, (4,), scales * step, 0, 0, np.zeros(4)),
        T(dtype, (1, 4, 4, 4), [out]),
    ]
    options = {"padding": 1, "strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1}
    model = write(tensors, [Op("CONV_2D", [0, 1, 2], [3], "Conv2DOptions", options)], [0], [3])
    windows = np.lib.stride_tricks.sliding_window_view(x[0].astype(np.float64) * step, (3, 3), axis=(0, 1))
    real = np.einsum("hwcij,oijc->hwo", windows, weights * scales.reshape(4, 1, 1, 1).astype(np.float64))
    limits = np.iinfo(dtype)
    y = np.clip(np.rint(real / out), limits.min, limits.max).astype(dtype)[None]
    needed = {"litert:xnnpack", "litert:cpu"} if dtype == "int8" else {"litert:cpu"}
    return Case(f"weights-with-a-scale-a-channel-{dtype}", "tflite", model, (x,), (y,), frozenset(needed), 1)


def _tflite_float16() -> Case:
    """Half-precision in, single precision out."""
    x = _numbers((1, 2, 2, 3), "float16")
    tensors = [T("float16", x.shape), T("float32", x.shape)]
    model = write(tensors, [Op("DEQUANTIZE", [0], [1], "DequantizeOptions")], [0], [1])
    return Case("float16", "tflite", model, (x,), (x.astype(np.float32),), frozenset({"litert:cpu"}))


def _tflite_open_batch() -> Case:
    x = _numbers((1, 3))
    tensors = [T("float32", (1, 3), signature=(-1, 3)), T("float32", (1, 3), signature=(-1, 3))]
    model = write(tensors, [Op("RELU", [0], [1])], [0], [1])
    return Case("open-batch", "tflite", model, (x,), (np.maximum(x, 0),), TFLITE_RUNTIMES)
