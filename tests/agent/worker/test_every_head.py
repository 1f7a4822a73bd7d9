"""Each head from a spec to a worker's answer: recorded by the publisher's process, proved and run by a model worker."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from workerdriver import Daemon, ask, load, load_message

from agent import protocol
from agent.worker import describe
from agent.worker.delegates import DELEGATES
from ota.publisher.spec import parse

PICTURE = {"resize": "letterbox", "mean": [0.0], "std": [255.0]}


def yolo() -> np.ndarray:
    table = np.zeros((1, 6, 9), np.float32)
    table[0, :, 4] = (16, 16, 8, 12, 0.1, 0.9)
    return table


def with_peak(*shape: int) -> np.ndarray:
    maps = np.zeros(shape, np.float32)
    maps[0, 2, 3, 1] = 0.9
    return maps


POSE = np.zeros((1, 11, 4), np.float32)
POSE[0, :, 2] = (16, 16, 8, 12, 0.9, 14, 15, 1, 18, 19, 0.5)
IN_GRAPH = (
    np.asarray([[[0.25, 0.25, 0.75, 0.5]] * 3], np.float32), np.asarray([[1, 0, 0]], np.float32),
    np.asarray([[0.9, 0.1, 0.0]], np.float32), np.asarray([3], np.float32),
)  # fmt: skip
SSD = (np.zeros((1, 12, 4), np.float32), np.where(np.arange(36).reshape(1, 12, 3) == 10, 3.0, -9.0).astype(np.float32))

# task, postprocess, outputs, the first item's label
HEADS = {
    "classification": ("classification", {"sigmoid": True}, (np.asarray([[-1.0, 2.0]], np.float32),), "b"),
    "centernet": ("detection", {"stride": 8}, (with_peak(1, 4, 4, 2), np.ones((1, 4, 4, 4), np.float32)), "b"),
    "yolov8": ("detection", {}, (yolo(),), "b"),
    "yolov5": ("detection", {}, (np.insert(yolo(), 4, 1.0, axis=1).transpose(0, 2, 1).copy(),), "b"),
    "ssd": ("detection", {"anchors": {"grids": [2, 2]}}, SSD, "a"),
    "ssd_in_graph": ("detection", {}, IN_GRAPH, "b"),
    "segmentation": ("segmentation", {}, (with_peak(1, 8, 8, 2),), "a"),
    "heatmap": ("keypoints", {}, (with_peak(1, 8, 8, 2),), "keypoints"),
    "yolo_pose": ("keypoints", {"key_points": 2}, (POSE,), "a"),
    "embedding": ("embedding", {}, (np.arange(8, dtype=np.float32)[None],), None),
    "anomaly": ("anomaly", {"threshold": 0.01}, (np.ones((1, 3, 32, 32), np.float32),), "anomalous"),
    "raw": ("raw", {}, (np.ones((2, 2), np.float32),), None),
}


def model(outputs: tuple[np.ndarray, ...]) -> bytes:
    """A model of pictures [1, 3, 32, 32] that always answers the same."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
             helper.make_node("Mul", ["mean", "zero"], ["nothing"])]  # fmt: skip
    constants = [helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])]
    described = []
    for i, output in enumerate(outputs):
        nodes.append(helper.make_node("Add", [f"c{i}", "nothing"], [f"y{i}"]))
        constants.append(helper.make_tensor(f"c{i}", TensorProto.FLOAT, output.shape, output.reshape(-1).tolist()))
        described.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, output.shape))
    picture = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])]
    graph = helper.make_graph(nodes, "head", picture, described, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def spec(kind: str) -> dict:
    task, keys, *_ = HEADS[kind]
    labels = [] if task in ("embedding", "anomaly", "raw") else ["a"] if kind == "yolo_pose" else ["a", "b"]
    table = {"line": "x", "version": "1.0.0", "task": task, "labels": labels, "licence": "MIT",
             "preprocess": PICTURE, "postprocess": {"kind": kind, **keys}}  # fmt: skip
    return dict(parse(table, Path("/"), model=Path("/m.onnx")).graph)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_recorded_proved_and_answers(daemon: Daemon, tmp_path: Path, kind: str) -> None:
    graph, data = spec(kind), model(HEADS[kind][2])
    (tmp_path / "m.onnx").write_bytes(data)
    request = {"models": {"m.onnx": str(tmp_path / "m.onnx")}, "graph": graph, "images": []}
    (tmp_path / "request.json").write_text(json.dumps(request))
    assert describe.run(str(tmp_path / "request.json"), str(tmp_path / "out"), {"onnx:cpu": DELEGATES["onnx:cpu"]}) == 0
    tolerance = json.loads((tmp_path / "out/tolerance.json").read_text())

    worker = daemon.spawn("model")
    loaded = load(worker, data, load_message("onnx:cpu", graph))
    assert isinstance(loaded, protocol.ModelLoaded), loaded
    proved = ask(worker, protocol.RunGolden("m.onnx", tolerance), (tmp_path / "out/golden.npz").read_bytes())
    assert isinstance(proved, protocol.GoldenPassed), proved
    _, picture = cv2.imencode(".png", np.full((48, 64, 3), 60, np.uint8))
    result = ask(worker, protocol.RunImage(), picture.tobytes())
    assert isinstance(result, protocol.Result), result
    assert result.items, "it found what its model always answers"
    if (label := HEADS[kind][3]) is not None:
        assert result.items[0]["label"] == label
    for item in result.items:
        assert item.get("score") is None or math.isfinite(item["score"])
        if item.get("box"):
            x0, y0, x1, y1 = item["box"]
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 48
