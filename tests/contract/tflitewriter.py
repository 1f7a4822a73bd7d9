"""Writes TFLite files of one operator or a few; numbers are those of TFLite's schema (schema.fbs, version 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agent.worker.delegates.tflitenames import operator_name
from tests.contract.flatbuffer import Field, Flatbuffer, Place

_TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "int16": 7, "int8": 9}
_NUMBERS = {operator_name(number): number for number in range(256)}
_WINDOW = {"padding": (0, "b"), "strideW": (1, "i"), "strideH": (2, "i")}
# of each kind of options: its number in the union, and its fields with their numbers and codes; `*` is a list
_OPTIONS: Mapping[str, tuple[int, Mapping[str, tuple[int, str]]]] = {
    "Conv2DOptions": (
        1,
        {**_WINDOW, "fusedActivationFunction": (3, "b"), "dilationWFactor": (4, "i"), "dilationHFactor": (5, "i")},
    ),
    "DepthwiseConv2DOptions": (
        2,
        {
            **_WINDOW,
            "depthMultiplier": (3, "i"),
            "fusedActivationFunction": (4, "b"),
            "dilationWFactor": (5, "i"),
            "dilationHFactor": (6, "i"),
        },
    ),
    "Pool2DOptions": (
        5,
        {**_WINDOW, "filterWidth": (3, "i"), "filterHeight": (4, "i"), "fusedActivationFunction": (5, "b")},
    ),
    "FullyConnectedOptions": (8, {"fusedActivationFunction": (0, "b"), "keepNumDims": (2, "b")}),
    "SoftmaxOptions": (9, {"beta": (0, "f")}),
    "ConcatenationOptions": (10, {"axis": (0, "i"), "fusedActivationFunction": (1, "b")}),
    "AddOptions": (11, {"fusedActivationFunction": (0, "b")}),
    "ReshapeOptions": (17, {"newShape": (0, "i*")}),
    "MulOptions": (21, {"fusedActivationFunction": (0, "b")}),
    "ReducerOptions": (27, {"keepDims": (0, "b")}),
    "SubOptions": (28, {"fusedActivationFunction": (0, "b")}),
    "SqueezeOptions": (30, {"squeezeDims": (0, "i*")}),
    "DequantizeOptions": (38, {}),
}


@dataclass
class T:
    """A tensor; `scales` and `zero_point` quantize it, along `axis` where there are several. `signature` is its shape
    with -1 for open sizes."""

    dtype: str
    shape: Sequence[int]
    scales: Sequence[float] = ()
    zero_point: int = 0
    axis: int = 0
    data: Any = None
    signature: Sequence[int] = ()


@dataclass
class Op:
    """An operator between tensors by their place in the list; `options` by the names of the schema."""

    name: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    kind: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    custom: str = ""


def write(tensors: Sequence[T], ops: Sequence[Op], inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
    """The file's bytes."""
    b = Flatbuffer()
    buffers = [b.table({})]
    made = [_tensor(b, buffers, tensor, f"t{i}") for i, tensor in enumerate(tensors)]
    graph = b.table(
        {
            0: b.places(made),
            1: b.numbers("i", inputs),
            2: b.numbers("i", outputs),
            3: b.places([_operator(b, i, op) for i, op in enumerate(ops)]),
        }
    )
    codes = b.places([_code(b, op) for op in ops])
    model = b.table({0: ("I", 3), 1: codes, 2: b.places([graph]), 4: b.places(buffers)})
    return b.file(model, b"TFL3")


def _code(b: Flatbuffer, op: Op) -> Place:
    number = _NUMBERS[op.name]
    fields: dict[int, Field] = {0: ("b", min(number, 127)), 2: ("i", 1), 3: ("i", number)}
    if op.custom:
        fields[1] = b.text(op.custom)
    return b.table(fields)


def _operator(b: Flatbuffer, index: int, op: Op) -> Place:
    fields: dict[int, Field] = {
        0: ("I", index),
        1: b.numbers("i", op.inputs),
        2: b.numbers("i", op.outputs),
    }
    if op.kind:
        kind, known = _OPTIONS[op.kind]
        options: dict[int, Field] = {}
        for key, value in op.options.items():
            slot, code = known[key]
            options[slot] = b.numbers(code[0], value) if code.endswith("*") else (code, value)
        fields |= {3: ("B", kind), 4: b.table(options)}
    return b.table(fields)


def _tensor(b: Flatbuffer, buffers: list[Place], tensor: T, name: str) -> Place:
    fields: dict[int, Field] = {
        0: b.numbers("i", [int(size) for size in tensor.shape]),
        1: ("b", _TYPES[tensor.dtype]),
        2: ("I", 0),
        3: b.text(name),
    }
    if tensor.data is not None:
        content = np.ascontiguousarray(tensor.data, tensor.dtype).tobytes()
        fields[2] = ("I", len(buffers))
        buffers.append(b.table({0: b.data(content)}))
    if len(tensor.scales):
        scales = b.numbers("f", [float(scale) for scale in tensor.scales])
        zero_points = b.numbers("q", [tensor.zero_point] * len(tensor.scales))
        fields[4] = b.table({2: scales, 3: zero_points, 6: ("i", tensor.axis)})
    if len(tensor.signature):
        fields[7] = b.numbers("i", tensor.signature)
    return b.table(fields)
