"""The publisher's throw-away run: facts, golden vectors and tolerances of real models."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from workerdriver import ROOT

from agent.profile import DELEGATES
from agent.worker import golden
from agent.worker.windowfile import decode_frame

GRAY = {
    "task": "classification",
    "labels": [str(digit) for digit in range(10)],
    "preprocess": {"color": "gray", "std": [255.0]},
    "postprocess": {"kind": "classification", "top_k": 3},
}


def describe(tmp_path, request):
    (tmp_path / "request.json").write_text(json.dumps(request))
    return subprocess.run(
        [sys.executable, "-m", "agent.worker.main", "describe", "--request", str(tmp_path / "request.json"),
         "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def read(tmp_path, name):
    return json.loads((tmp_path / "out" / name).read_text())


def test_facts_name_format_delegates_and_tensors_in_the_order_asked_for(tmp_path, digits):
    models = {name: str(digits / "1.0.0" / name) for name in ("int8.tflite", "int8.onnx")}
    done = describe(tmp_path, {"models": models, "outputs": {"int8.onnx": ["probs"]}})
    assert done.returncode == 0, done.stderr
    facts = read(tmp_path, "facts.json")
    assert facts["int8.tflite"]["format"] == "tflite"
    assert facts["int8.tflite"]["delegates"][:2] == ["litert:xnnpack", "litert:cpu"]
    assert facts["int8.onnx"]["delegates"][0] == "onnx:cpu"
    # what is not here said no to nothing: a device that has it may try
    assert {"litert:edgetpu", "litert:vx", "openvino:npu"} <= set(facts["int8.tflite"]["delegates"])
    assert {"onnx:tensorrt", "onnx:qnn", "openvino:gpu"} <= set(facts["int8.onnx"]["delegates"])
    for name, model_format in (("int8.tflite", "tflite"), ("int8.onnx", "onnx")):
        found = facts[name]["delegates"]
        assert len(set(found)) == len(found)
        assert all(model_format in DELEGATES[delegate] for delegate in found)
    (tensor,) = facts["int8.tflite"]["inputs"]
    assert (tensor["dtype"], tensor["shape"], tensor["zero_point"]) == ("int8", [1, 8, 8, 1], -128)
    assert facts["int8.onnx"]["outputs"] == [
        {"name": "probs", "dtype": "float32", "shape": [1, 10], "scale": None, "zero_point": None}
    ]
    assert not (tmp_path / "out" / "golden.npz").exists()


def test_pictures_become_golden_vectors_with_a_tolerance_per_output(tmp_path, digits):
    models = {name: str(digits / "1.0.0" / name) for name in ("int8.tflite", "int8.onnx")}
    pictures = [digits / "golden" / f"{name}.png" for name in ("seven", "three", "eight")]
    done = describe(tmp_path, {"models": models, "graph": GRAY, "images": [str(path) for path in pictures]})
    assert done.returncode == 0, done.stderr
    vectors = golden.load_vectors((tmp_path / "out" / "golden.npz").read_bytes())
    assert [vector.image for vector in vectors[:3]] == [path.read_bytes() for path in pictures]
    assert [int(vector.expected["int8.tflite"][0].argmax()) for vector in vectors[:3]] == [7, 3, 8]
    assert [int(vector.expected["int8.onnx"][0].argmax()) for vector in vectors[:3]] == [7, 3, 8]
    # and what no collection of pictures has
    black, white = (decode_frame(vector.image) for vector in vectors[3:])
    height, width, _ = decode_frame(pictures[0].read_bytes()).shape
    assert black.shape == white.shape
    assert abs(black.shape[0] * width - black.shape[1] * height) <= 8 * max(height, width)
    assert (black.max(), white.min()) == (0, 255)
    assert (vectors[3].expected["int8.tflite"][0] != vectors[4].expected["int8.tflite"][0]).any()
    tolerance = read(tmp_path, "tolerance.json")
    assert tolerance["margin"] == 0.1
    assert tolerance["atol"]["int8.tflite"][0] >= 4 / 256
    assert tolerance["recorded_by"]["int8.tflite"].startswith("litert ")
    assert tolerance["recorded_by"]["int8.onnx"].startswith("onnxruntime ")


def test_an_empty_list_of_pictures_records_the_same_noise_every_time(tmp_path, digits):
    request = {"models": {"m": str(digits / "1.0.0" / "int8.tflite")}, "graph": GRAY, "images": []}
    files = []
    for _ in range(2):
        assert describe(tmp_path, request).returncode == 0
        files.append((tmp_path / "out" / "golden.npz").read_bytes())
    assert files[0] == files[1]
    assert len(golden.load_vectors(files[0])) == 4


def test_a_model_that_takes_no_picture_is_recorded_on_tensors(tmp_path, shared_data):
    request = {"models": {"m": str(shared_data / "mlperf-tiny/ad01_int8.tflite")}, "images": []}
    done = describe(tmp_path, request)
    assert done.returncode == 0, done.stderr
    vectors = golden.load_vectors((tmp_path / "out" / "golden.npz").read_bytes())
    assert [vector.tensors[0].shape for vector in vectors] == [(1, 640)] * 4
    assert np.ptp(vectors[0].tensors[0].astype(int)) > 100


@pytest.mark.parametrize(
    ("change", "reason", "names"),
    [
        ({"models": {"m": "/nonexistent.onnx"}}, "model_missing", "/nonexistent.onnx"),
        ({"models": {"m": "/etc/passwd"}}, "unknown_format", "passwd"),
        ({"outputs": {"m": ["probabilities"]}}, "model_shape", "PartitionedCall:0"),
        ({"graph": {**GRAY, "labels": ["one"]}}, "model_shape", "1 labels"),
        ({"images": ["/nonexistent.png"]}, "image_unreadable", "/nonexistent.png"),
        ({"models": {}}, "bad_usage", "models"),
    ],
)
def test_a_refusal_is_one_json_line_with_a_reason_and_what_to_do(tmp_path, digits, change, reason, names):
    request = {"models": {"m": str(digits / "1.0.0" / "int8.tflite")}, "graph": GRAY, **change}
    done = describe(tmp_path, request)
    assert done.returncode not in (0, 1)
    fault = json.loads(done.stderr.splitlines()[-1])
    assert fault["reason"] == reason
    assert names in fault["message"]
    assert fault["hint"]
    assert "Traceback" not in done.stderr


def test_a_model_that_kills_its_runtime_kills_this_process_alone(tmp_path, vectors):
    assert describe(tmp_path, {"models": {"m": str(vectors / "crash.tflite")}}).returncode == -11


def test_a_published_broken_model_is_refused_by_name(tmp_path, shared_data):
    done = describe(tmp_path, {"models": {"m": str(shared_data / "tflite-micro/person_detect.tflite")}})
    fault = json.loads(done.stderr.splitlines()[-1])
    assert fault["reason"] == "model_unloadable"
    assert fault["message"].startswith("person_detect.tflite: litert")
