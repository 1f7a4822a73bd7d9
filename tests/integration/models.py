"""Models as a user's training script would leave them behind: small, seeded, exported."""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper


def classifier(to: Path, *, channels: int = 3, size: int = 32, classes: int = 4, seed: int = 1) -> Path:
    """A classifier of pictures, [1, channels, size, size] float32 to [1, classes] logits: two convolutions with
    stride 2, their mean over the picture, a dense layer. Untrained: its answers depend on the picture, no more.
    """
    rng = np.random.default_rng(seed)

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["logits"], transB=1, alpha=20.0),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, classes])],
        [weights("w1", 16, channels, 3, 3), weights("w2", 32, 16, 3, 3), weights("w3", classes, 32)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(to))
    return to


def branching(to: Path) -> Path:
    """A TFLite model that LiteRT runs and OpenVINO has no translator for: [1, 8, 8, 3] float32, pooled to [1, 4, 4, 3],
    and an IF that pools it again to [1, 2, 2, 3] in either branch. (The first pooling is there for XNNPACK, which takes
    no part of an IF.)"""
    pool, choice = schema.Pool2DOptionsT(), schema.IfOptionsT()
    pool.strideH = pool.strideW = pool.filterHeight = pool.filterWidth = 2
    choice.thenSubgraphIndex, choice.elseSubgraphIndex = 1, 2

    def tensor(name: str, shape: list[int], kind: int = schema.TensorType.FLOAT32, buffer: int = 0) -> schema.TensorT:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name.encode(), shape, kind, buffer
        return made

    def operator(code: int, inputs: list[int], output: int) -> schema.OperatorT:
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = code, inputs, [output]
        kinds = schema.BuiltinOptions.IfOptions, schema.BuiltinOptions.Pool2DOptions
        made.builtinOptionsType, made.builtinOptions = kinds[code], (choice, pool)[code]
        return made

    def subgraph(tensors: list[schema.TensorT], output: int, *operators: schema.OperatorT) -> schema.SubGraphT:
        made = schema.SubGraphT()
        made.tensors, made.inputs, made.outputs, made.operators = tensors, [0], [output], list(operators)
        return made

    model = schema.ModelT()
    model.version, model.operatorCodes, model.buffers = 3, [], []
    for code in (schema.BuiltinOperator.IF, schema.BuiltinOperator.MAX_POOL_2D):
        entry = schema.OperatorCodeT()
        entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), 1
        model.operatorCodes.append(entry)
    for data in (b"", b"\1"):
        buffer = schema.BufferT()
        buffer.data = list(data)
        model.buffers.append(buffer)
    x, half, quarter = (tensor(name, [1, size, size, 3]) for name, size in (("x", 8), ("half", 4), ("quarter", 2)))
    always = tensor("always", [1], schema.TensorType.BOOL, buffer=1)
    main = subgraph([x, half, quarter, always], 2, operator(1, [0], 1), operator(0, [3, 1], 2))
    model.subgraphs = [main, *(subgraph([half, quarter], 1, operator(1, [0], 1)) for _ in range(2))]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    to.write_bytes(bytes(builder.Output()))
    return to
