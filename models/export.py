"""From one list of layers to a training network, an int8 TFLite file and an int8 ONNX (QDQ) file.

What it is: the publisher's build step for the small networks of this folder. The layer list and the folded weights are
the single truth; both files are written from the same arrays, so neither is a conversion of the other.
What it is not: needed at run time. It imports TensorFlow and onnx; nothing on a device does.
Invariants: a layer whose folded weights and calibration pictures are unchanged gets the same quantized bytes again, so
that two releases sharing a frozen part differ only in the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization as ort_quantization

Array = NDArray[np.float32]
Activation = Literal["relu6", "none", "linear", "sigmoid", "softmax"]
"""`none` and `linear` are both the identity; a result layer says `linear`, an inner one `none`."""
Kind = Literal["conv", "depthwise", "add", "mean"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer; `sources` names earlier layers or "x", the input.

    `conv` and `depthwise` take `kernel`, `stride` (SAME padding) and `channels` (of the result); `normed` puts a batch
    norm behind the convolution while training. `add` sums two sources; `mean` averages over height and width.
    """

    kind: Kind
    name: str
    sources: tuple[str, ...]
    channels: int = 0
    kernel: int = 1
    stride: int = 1
    activation: Activation = "relu6"
    normed: bool = True


@dataclass(frozen=True, slots=True)
class Network:
    """Layers in order of computation, the input's (height, width, channels), the names of the result layers."""

    input_shape: tuple[int, int, int]
    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Folded:
    """A convolution with its batch norm folded in: `kernel` [h, w, in, out] ([h, w, c, 1] depthwise), `bias` [out]."""

    kernel: Array
    bias: Array


EPSILON = 1e-3


def training_model(network: Network, bias_init: dict[str, float]) -> tf.keras.Model:
    """A Keras model of the network with batch norms; `bias_init` sets the bias of the result layers it names."""
    keras = tf.keras
    x = keras.Input(network.input_shape, name="x")
    values = {"x": x}
    for layer in network.layers:
        y = values[layer.sources[0]]
        if layer.kind == "add":
            y = keras.layers.Add(name=layer.name)([values[s] for s in layer.sources])
        elif layer.kind == "mean":
            y = keras.layers.GlobalAveragePooling2D(keepdims=True, name=layer.name)(y)
        else:
            options = {"strides": layer.stride, "padding": "same", "use_bias": not layer.normed, "name": layer.name}
            if layer.kind == "conv":
                if layer.name in bias_init:
                    options["bias_initializer"] = keras.initializers.Constant(bias_init[layer.name])
                y = keras.layers.Conv2D(layer.channels, layer.kernel, **options)(y)
            else:
                y = keras.layers.DepthwiseConv2D(layer.kernel, **options)(y)
            if layer.normed:
                y = keras.layers.BatchNormalization(epsilon=EPSILON, momentum=0.95, name=layer.name + "_norm")(y)
        if layer.activation == "relu6":
            y = keras.layers.ReLU(6.0, name=layer.name + "_act")(y)
        # Sigmoid and softmax stay outside: the losses work on logits.
        values[layer.name] = y
    return keras.Model(x, [values[name] for name in network.outputs])


def fold(network: Network, model: tf.keras.Model) -> dict[str, Folded]:
    """The model's convolutions with their batch norms folded in, by layer name."""
    folded = {}
    for layer in network.layers:
        if layer.kind not in ("conv", "depthwise"):
            continue
        weights = [np.asarray(w, np.float64) for w in model.get_layer(layer.name).get_weights()]
        kernel = weights[0]
        if layer.normed:
            gamma, beta, mean, variance = (np.asarray(w, np.float64)
                                           for w in model.get_layer(layer.name + "_norm").get_weights())
            factor = gamma / np.sqrt(variance + EPSILON)
            kernel = kernel * (factor[None, None, :, None] if layer.kind == "depthwise" else factor)
            bias = beta - mean * factor
        else:
            bias = weights[1]
        folded[layer.name] = Folded(kernel.astype(np.float32), bias.astype(np.float32))
    return folded


def _tf_graph(network: Network, weights: dict[str, Folded], x: tf.Tensor) -> list[tf.Tensor]:
    values = {"x": x}
    for layer in network.layers:
        y = values[layer.sources[0]]
        if layer.kind == "add":
            y = values[layer.sources[0]] + values[layer.sources[1]]
        elif layer.kind == "mean":
            y = tf.reduce_mean(y, [1, 2], keepdims=True)
        else:
            w = weights[layer.name]
            strides = [1, layer.stride, layer.stride, 1]
            if layer.kind == "conv":
                y = tf.nn.conv2d(y, w.kernel, strides, "SAME")
            else:
                y = tf.nn.depthwise_conv2d(y, w.kernel, strides, "SAME")
            y = tf.nn.bias_add(y, w.bias)
        if layer.activation == "relu6":
            y = tf.nn.relu6(y)
        elif layer.activation == "sigmoid":
            y = tf.sigmoid(y)
        elif layer.activation == "softmax":
            y = tf.nn.softmax(tf.reshape(y, [1, layer.channels]))
        values[layer.name] = y
    return [values[name] for name in network.outputs]


def float_outputs(network: Network, weights: dict[str, Folded], pictures: Array) -> list[Array]:
    """Results of the float network for [n, h, w, c] pictures in 0..1, one array per output: the conversions' oracle."""
    function = tf.function(lambda x: _tf_graph(network, weights, x))
    rows = [[np.asarray(y) for y in function(tf.constant(p[None]))] for p in pictures]
    return [np.concatenate([row[i] for row in rows]) for i in range(len(network.outputs))]


def _pinned(pictures: Array) -> Array:
    """Calibration pictures whose range is exactly 0..1, so that the input's scale is 1/255."""
    pinned = pictures.copy()
    if pinned.shape[2] == 1:  # one pixel of many values: two of them are enough
        pinned[0, 0, 0, :2] = 0.0, 1.0
        return pinned
    pinned[0, 0, 0, :] = 0.0
    pinned[0, 0, 1, :] = 1.0
    return pinned


def write_tflite(network: Network, weights: dict[str, Folded], calibration: Array, path: Path) -> None:
    """Write an int8 file: int8 input (scale 1/255, zero point -128) and int8 outputs, NHWC, per-channel weights."""
    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((1, *network.input_shape), tf.float32, name="x")])
        def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return dict(zip(network.outputs, _tf_graph(network, weights, x), strict=True))

    module = Module()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.serve.get_concrete_function()], module)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([p[None]] for p in _pinned(calibration))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.int8
    converter.inference_output_type = tf.int8
    path.write_bytes(converter.convert())


def _onnx_convolution(layer: Layer, weights: Folded, size: tuple[int, int], source: str,
                      target: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    kernel = weights.kernel
    depthwise = layer.kind == "depthwise"
    transposed = kernel.transpose(2, 3, 0, 1) if depthwise else kernel.transpose(3, 2, 0, 1)
    # TensorFlow's SAME puts the odd pixel of padding below and to the right.
    pads = [max((-(-n // layer.stride) - 1) * layer.stride + layer.kernel - n, 0) for n in size]
    begin, end = [p // 2 for p in pads], [p - p // 2 for p in pads]
    constants = [numpy_helper.from_array(np.ascontiguousarray(transposed), layer.name + ".w"),
                 numpy_helper.from_array(weights.bias, layer.name + ".b")]
    node = helper.make_node("Conv", [source, layer.name + ".w", layer.name + ".b"], [target], layer.name,
                            kernel_shape=[layer.kernel] * 2, strides=[layer.stride] * 2, pads=begin + end,
                            group=kernel.shape[2] if depthwise else 1)
    return [node], constants


def _onnx_model(network: Network, weights: dict[str, Folded]) -> onnx.ModelProto:
    height, width, channels = network.input_shape
    nodes: list[onnx.NodeProto] = []
    constants = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("zero", 0.0), ("six", 6.0))]
    sizes = {"x": (height, width)}
    results = []
    for layer in network.layers:
        size = sizes[layer.sources[0]]
        raw = layer.name if layer.activation == "none" else layer.name + ".raw"
        if layer.kind == "add":
            nodes.append(helper.make_node("Add", list(layer.sources), [raw], layer.name))
        elif layer.kind == "mean":
            nodes.append(helper.make_node("GlobalAveragePool", list(layer.sources), [raw], layer.name))
            size = (1, 1)
        else:
            more, held = _onnx_convolution(layer, weights[layer.name], size, layer.sources[0], raw)
            nodes += more
            constants += held
            size = (-(-size[0] // layer.stride), -(-size[1] // layer.stride))
        if layer.activation == "relu6":
            nodes.append(helper.make_node("Clip", [raw, "zero", "six"], [layer.name], layer.name + ".clip"))
        sizes[layer.name] = size
        if layer.name in network.outputs:
            more, held, shape = _onnx_result(layer, raw, size)
            nodes += more
            constants += held
            results.append(helper.make_tensor_value_info(layer.name, TensorProto.FLOAT, shape))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, height, width])],
        results, [c for c in constants if c.name in used])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="")
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model


def _onnx_result(layer: Layer, raw: str, size: tuple[int, int],
                 ) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[int]]:
    """Nodes that turn a result's raw NCHW convolution into the named output: probabilities, or an NHWC map."""
    if layer.activation == "softmax":
        shape = numpy_helper.from_array(np.array([1, layer.channels], np.int64), layer.name + ".shape")
        return ([helper.make_node("Reshape", [raw, shape.name], [layer.name + ".flat"]),
                 helper.make_node("Softmax", [layer.name + ".flat"], [layer.name], axis=1)], [shape],
                [1, layer.channels])
    nodes = []
    if layer.activation == "sigmoid":
        nodes.append(helper.make_node("Sigmoid", [raw], [layer.name + ".sigmoid"]))
        raw = layer.name + ".sigmoid"
    nodes.append(helper.make_node("Transpose", [raw], [layer.name], perm=[0, 2, 3, 1]))
    return nodes, [], [1, *size, layer.channels]


class _Reader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, pictures: Array) -> None:
        self._rows = iter(pictures)

    def get_next(self) -> dict[str, Array] | None:
        row = next(self._rows, None)
        return None if row is None else {"x": np.ascontiguousarray(row.transpose(2, 0, 1)[None])}


def write_onnx(network: Network, weights: dict[str, Folded], calibration: Array, path: Path) -> None:
    """Write an int8 QDQ file: float32 NCHW input "x" in 0..1, float32 outputs under the network's output names."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        onnx.save(_onnx_model(network, weights), plain)
        ort_quantization.quantize_static(
            plain, path, _Reader(_pinned(calibration)), quant_format=ort_quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=ort_quantization.QuantType.QUInt8, weight_type=ort_quantization.QuantType.QInt8,
            op_types_to_quantize=["Conv", "Add", "Clip", "GlobalAveragePool"])
    onnx.checker.check_model(onnx.load(path), full_check=True)


def tflite_output_names(path: Path, channels: Sequence[int]) -> list[str]:
    """Names of the file's output tensors, ordered like `channels` (each output's last dimension, all different)."""
    interpreter = Interpreter(str(path))
    by_channels = {int(d["shape"][-1]): str(d["name"]) for d in interpreter.get_output_details()}
    return [by_channels[c] for c in channels]
