#!/usr/bin/env python3
"""Make the bad models of the tests: `make_bad_models.py [FOLDER]` (default: beside this file).

All three have the tensors of an image detector (a 320x240 picture in, a heat map and a box map out), pass their
runtime's file checks, and then ruin the process that runs them:

crash.tflite  LiteRT dies with SIGSEGV while it allocates tensors: an IF whose branches are the graph that holds it, so
              that preparing it recurses until the stack ends. (WHILE and CALL_ONCE are guarded against it, IF is not.)
hang.tflite   LiteRT never returns from `invoke`: a WHILE whose condition is constantly true.
hang.onnx     ONNX Runtime never returns from `run`: a Loop of 2^62 rounds over a value that depends on the input.

Nothing is random: the same library versions give the same bytes. Needs flatbuffers, ai-edge-litert and onnx.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper

IMAGE = (1, 240, 320, 3)
HEAT = (1, 30, 40, 3)
BOX = (1, 30, 40, 4)
ROUNDS = 1 << 62


def _tensor(name: str, shape: Sequence[int], kind: int, *, buffer: int = 0, scale: float = 0.0, zero: int = 0) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name.encode(), list(shape), kind, buffer
    if scale:
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale, tensor.quantization.zeroPoint = [scale], [zero]
    return tensor


def _detector_tensors() -> list[Any]:
    int8 = schema.TensorType.INT8
    return [
        _tensor("x", IMAGE, int8, scale=1 / 255, zero=-128),
        _tensor("heat", HEAT, int8, scale=1 / 256, zero=-128),
        _tensor("box", BOX, int8, scale=0.25, zero=0),
    ]


def _operator(code: int, inputs: Sequence[int], outputs: Sequence[int], kind: int = 0, options: Any = None) -> Any:
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = code, list(inputs), list(outputs)
    operator.builtinOptionsType, operator.builtinOptions = kind, options
    return operator


def _subgraph(tensors: list[Any], inputs: list[int], outputs: list[int], operators: list[Any]) -> Any:
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = tensors, inputs, outputs, operators
    return graph


def _tflite(operators: Sequence[int], subgraphs: list[Any], buffers: Sequence[bytes]) -> bytes:
    model = schema.ModelT()
    model.version, model.subgraphs = 3, subgraphs
    model.operatorCodes = []
    for code in operators:
        entry = schema.OperatorCodeT()
        entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), 1
        model.operatorCodes.append(entry)
    model.buffers = []
    for data in (b"", *buffers):
        buffer = schema.BufferT()
        buffer.data = list(data)
        model.buffers.append(buffer)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def crash_tflite() -> bytes:
    """An IF that contains itself."""
    options = schema.IfOptionsT()
    options.thenSubgraphIndex = options.elseSubgraphIndex = 0
    always = _tensor("always", [1], schema.TensorType.BOOL, buffer=1)
    operator = _operator(0, [3, 0], [1, 2], schema.BuiltinOptions.IfOptions, options)
    main = _subgraph([*_detector_tensors(), always], [0], [1, 2], [operator])
    return _tflite([schema.BuiltinOperator.IF], [main], [b"\1"])


def hang_tflite() -> bytes:
    """A WHILE that hands its three values round and round, behind a pooling of one pixel that XNNPACK takes."""
    pool = schema.Pool2DOptionsT()
    pool.strideH = pool.strideW = pool.filterHeight = pool.filterWidth = 1
    options = schema.WhileOptionsT()
    options.condSubgraphIndex, options.bodySubgraphIndex = 1, 2
    picture, heat, box = _detector_tensors()
    pooled, start_heat, start_box = _detector_tensors()
    pooled.name, start_heat.name, start_box.name = b"pooled", b"heat0", b"box0"
    start_heat.buffer, start_box.buffer = 1, 2
    turned = _detector_tensors()[0]
    turned.name = b"turned"
    tensors = [picture, pooled, start_heat, start_box, turned, heat, box]
    operators = [
        _operator(0, [0], [1], schema.BuiltinOptions.Pool2DOptions, pool),
        _operator(1, [1, 2, 3], [4, 5, 6], schema.BuiltinOptions.WhileOptions, options),
    ]
    always = _tensor("always", [1], schema.TensorType.BOOL, buffer=3)
    condition = _subgraph([*_detector_tensors(), always], [0, 1, 2], [3], [])
    body = _subgraph(_detector_tensors(), [0, 1, 2], [0, 1, 2], [])
    zeros = (b"\x80" * int(np.prod(HEAT)), b"\0" * int(np.prod(BOX)), b"\1")
    codes = [schema.BuiltinOperator.MAX_POOL_2D, schema.BuiltinOperator.WHILE]
    return _tflite(codes, [_subgraph(tensors, [0], [5, 6], operators), condition, body], zeros)


def hang_onnx() -> bytes:
    """A Loop that adds one to the picture's mean, practically for ever."""

    def value(name: str, shape: Sequence[int], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, list(shape))

    one = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "one")
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["sum", "one"], ["next"])],
        "body",
        [value("round", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("sum", (1, 1, 1, 1))],
        [value("go_on", [], TensorProto.BOOL), value("next", (1, 1, 1, 1))],
        [one],
    )
    constants = {
        "rounds": np.asarray(ROUNDS, np.int64),
        "always": np.asarray(True),
        "axes": np.asarray([1, 2, 3], np.int64),
        "heat_shape": np.asarray(HEAT, np.int64),
        "box_shape": np.asarray(BOX, np.int64),
    }
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Loop", ["rounds", "always", "mean"], ["sum_out"], body=body),
        helper.make_node("Sigmoid", ["sum_out"], ["share"]),
        helper.make_node("Expand", ["share", "heat_shape"], ["heat"]),
        helper.make_node("Expand", ["share", "box_shape"], ["box"]),
    ]
    graph = helper.make_graph(
        nodes,
        "hang",
        [value("x", (1, 3, 240, 320))],
        [value("heat", HEAT), value("box", BOX)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="")
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def main(folder: Path) -> None:
    for name, make in (("crash.tflite", crash_tflite), ("hang.tflite", hang_tflite), ("hang.onnx", hang_onnx)):
        data = make()
        (folder / name).write_bytes(data)
        print(f"{name}: {len(data)} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
