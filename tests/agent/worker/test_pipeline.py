"""A whole pipeline on real runtimes: several inputs, a sensor's window, and published models that nobody here made."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from agent import memfd
from agent.errors import ModelError, Reason
from agent.worker.delegates import DELEGATES, Options
from agent.worker.graph import parse_graph
from agent.worker.pipeline import Pipeline

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TINY = DATA / "mlperf-tiny"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published models are not here")

RGB = {"color": "rgb", "mean": [0.0], "std": [255.0]}


def load(data: bytes, graph: dict, delegate: str, format: str) -> Pipeline:
    fd = memfd.of_bytes("model", data)
    try:
        session = DELEGATES[delegate]().load(fd, format, Options())
    finally:
        os.close(fd)
    return Pipeline(session, parse_graph(graph), (), ())


def two_inputs() -> bytes:
    """`boxes` [1, n, 6 …] are one row (size, size, size, size, 0.9): what a detector does that is told the size."""
    nodes = [
        helper.make_node("ReduceMax", ["picture"], ["top"], keepdims=0),
        helper.make_node("Mul", ["top", "zero"], ["nothing"]),
        helper.make_node("Cast", ["size"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["wide", "wide", "score"], ["row"], axis=1),
        helper.make_node("Add", ["row", "nothing"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["y"]),
    ]
    constants = [
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("score", TensorProto.FLOAT, [1, 1], [0.9]),
        helper.make_tensor("shape", TensorProto.INT64, [3], [1, 5, 1]),
    ]
    graph = helper.make_graph(
        nodes, "two",
        [helper.make_tensor_value_info("size", TensorProto.INT64, [1, 2]),
         helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, 1])], constants,
    )  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()


def detector(**preprocess) -> dict:
    return {"task": "detection", "labels": ["box"], "postprocess": {"kind": "yolov8"},
            "preprocess": {**RGB, **preprocess}}  # fmt: skip


def test_a_picture_fills_the_input_that_is_named_and_constants_the_others():
    pipeline = load(two_inputs(), detector(input="picture", constants={"size": [30, 20]}), "onnx:cpu", "onnx")
    (item,) = pipeline.run(np.zeros((64, 64, 3), np.uint8)).items
    assert item.to_json() == {"label": "box", "score": 0.9, "box": [15.0, 10.0, 45.0, 30.0]}


@pytest.mark.parametrize(
    ("preprocess", "text"),
    [
        ({"constants": {"size": [30, 20]}}, "takes no image"),  # the first input is the size
        ({"input": "picture"}, "nobody says what input 'size' gets"),
        ({"input": "picture", "constants": {"size": [1, 2, 3]}}, "takes 2 numbers, not 3"),
        ({"input": "picture", "constants": {"size": 7, "width": 3}}, "names width"),
        ({"input": "image"}, "none of the model's inputs size, picture"),
    ],
)
def test_an_input_that_nobody_fills_is_refused_by_its_name(preprocess, text):
    with pytest.raises(ModelError) as caught:
        load(two_inputs(), detector(**preprocess), "onnx:cpu", "onnx").blank()
    assert caught.value.reason is Reason.MODEL_SHAPE
    assert text in caught.value.message
    assert caught.value.hint


def test_constants_are_back_after_golden_tensors_were_run():
    pipeline = load(two_inputs(), detector(input="picture", constants={"size": [30, 20]}), "onnx:cpu", "onnx")
    frame = np.zeros((64, 64, 3), np.uint8)
    first = pipeline.run(frame).items
    pipeline.outputs_of_tensors([np.asarray([[1, 1]]), np.zeros((1, 3, 64, 64), np.float32)])
    assert pipeline.run(frame).items == first


def test_a_source_of_the_other_kind_is_a_refusal_that_says_so():
    pipeline = load(two_inputs(), detector(input="picture", constants={"size": [30, 20]}), "onnx:cpu", "onnx")
    with pytest.raises(ModelError) as caught:
        pipeline.run(np.zeros((640, 1), np.float32))
    assert caught.value.reason is Reason.MODEL_SHAPE
    assert 'kind = "signal"' in caught.value.hint


@needs_data
@pytest.mark.parametrize("name", ["ad01_int8.tflite", "ad01_fp32.tflite"])
def test_the_published_autoencoder_scores_its_reconstruction_error(name):
    graph = {
        "task": "anomaly",
        "preprocess": {"kind": "signal", "rate_hz": 16000, "window": 640, "channels": 1,
                       "features": [{"kind": "raw"}]},
        "postprocess": {"kind": "anomaly", "threshold": 40.0},
    }  # fmt: skip
    pipeline = load((TINY / name).read_bytes(), graph, "litert:xnnpack", "tflite")
    window = np.random.default_rng(1).uniform(-20, 10, (640, 1)).astype(np.float32)
    (item,) = pipeline.run(window).items
    fed = pipeline.inputs[0].real(pipeline.session.tensors[0]).reshape(-1)
    made = pipeline.outputs[0].real(pipeline.session.run()[0]).reshape(-1)
    assert item.score == pytest.approx(float(((made - fed) ** 2).mean()), rel=1e-4)
    np.testing.assert_allclose(fed, window[:, 0], atol=(pipeline.inputs[0].scale or 0) / 2 + 1e-5)
    assert item.anomalous == (item.score >= 40)


@needs_data
@pytest.mark.parametrize("delegate", ["litert:xnnpack", "litert:cpu"])
def test_the_published_person_detector_tells_the_published_pictures_apart(delegate):
    graph = {"task": "classification", "labels": ["no", "person"], "preprocess": RGB,
             "postprocess": {"kind": "classification", "top_k": 1}}  # fmt: skip
    pipeline = load((TINY / "vww_96_int8.tflite").read_bytes(), graph, delegate, "tflite")
    for file, label in (("person.png", "person"), ("no_person.png", "no")):
        (item,) = pipeline.run(cv2.imread(str(DATA / "tflite-micro" / file))).items
        assert item.label == label


@needs_data
def test_a_published_model_with_its_channels_first_is_fed_and_read():
    graph = {"task": "classification", "preprocess": RGB, "postprocess": {"kind": "classification", "top_k": 3}}
    data = (DATA / "tflite-micro" / "mobilenet_v2_quantized_1x3x224x224.tflite").read_bytes()
    pipeline = load(data, graph, "litert:xnnpack", "tflite")
    items = pipeline.run(cv2.imread(str(DATA / "tflite-micro" / "person.png"))).items
    assert len(items) == 3
    assert items[0].score >= items[1].score >= items[2].score
