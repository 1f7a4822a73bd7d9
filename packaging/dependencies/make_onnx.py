"""Write the published anomaly autoencoder (`ad01_fp32.tflite`) as ONNX, so that ONNX Runtime too runs a real model.

Usage: make_onnx.py AD01_FP32_TFLITE OUT_ONNX. Needs ai-edge-litert and onnx. The network is ten dense layers, all but
the last followed by a ReLU; LiteRT reads its weights, nothing is retrained or converted by a third tool.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
from ai_edge_litert.interpreter import Interpreter
from onnx import TensorProto, helper, numpy_helper

LAYERS = 10


def dense_chain(tflite: Path) -> onnx.ModelProto:
    """The autoencoder of `tflite` (float32[1, 640] to float32[1, 640]) as an ONNX model with the same weights."""
    interpreter = Interpreter(str(tflite), num_threads=1)
    interpreter.allocate_tensors()
    by_name = {t["name"]: t["index"] for t in interpreter.get_tensor_details()}
    nodes, weights, last = [], [], "input"
    for layer in range(LAYERS):
        scope = "functional_1/dense" + (f"_{layer}" if layer else "")
        weights.append(numpy_helper.from_array(interpreter.get_tensor(by_name[f"{scope}/MatMul"]), f"w{layer}"))
        bias = interpreter.get_tensor(by_name[f"{scope}/BiasAdd/ReadVariableOp/resource"])
        weights.append(numpy_helper.from_array(bias, f"b{layer}"))
        nodes.append(helper.make_node("Gemm", [last, f"w{layer}", f"b{layer}"], [f"g{layer}"], transB=1))
        last = f"g{layer}"
        if layer < LAYERS - 1:
            nodes.append(helper.make_node("Relu", [last], [f"r{layer}"]))
            last = f"r{layer}"
    graph = helper.make_graph(
        nodes,
        "ad01",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 640])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, 640])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


if __name__ == "__main__":
    onnx.save(dense_chain(Path(sys.argv[1])), sys.argv[2])
