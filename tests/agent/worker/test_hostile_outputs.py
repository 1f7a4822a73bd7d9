"""Whatever numbers a model answers, a frame's answer fits into one message, is finite, and comes in time."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import protocol
from agent.worker.graph import MAX_ITEMS, parse_graph
from agent.worker.postprocess import compile_postprocess
from agent.worker.preprocess import Inverse
from agent.worker.results import MAX_ANSWER_BYTES
from agent.worker.tensor import TensorSpec

BACK = Inverse(2.0, 2.0, 0.0, -80.0, 640, 480)
PICTURE = (TensorSpec("image", "float32", (1, 320, 320, 3)),)
WIDE_LABEL = "\N{GRINNING FACE}" * 80  # twelve bytes of JSON a character
ALL = {"threshold": 0.0, "max_detections": MAX_ITEMS, "nms_iou": 1.0}

HEADS = {
    "classification": ({"top_k": MAX_ITEMS}, 300, ((1, 300),)),
    "softmax": ({"kind": "classification", "softmax": True, "top_k": MAX_ITEMS}, 300, ((1, 300),)),
    "sigmoid": ({"kind": "classification", "sigmoid": True, "top_k": MAX_ITEMS}, 4, ((1, 4),)),
    "centernet": ({"stride": 8, **ALL}, 3, ((1, 40, 40, 3), (1, 40, 40, 4))),
    "yolov5": (ALL, 3, ((1, 2000, 8),)),
    "yolov8": (ALL, 3, ((1, 7, 2000),)),
    "yolo_pose": ({**ALL, "key_points": 133}, 1, ((1, 404, 300),)),
    "ssd": ({**ALL, "anchors": {"grids": [20, 20]}, "scores": "sigmoid"}, 3, ((1, 1200, 4), (1, 1200, 4))),
    "ssd softmax": (
        {**ALL, "kind": "ssd", "anchors": {"grids": [20, 20]}, "scores": "softmax"}, 3, ((1, 1200, 4), (1, 1200, 4)),
    ),
    "ssd_in_graph": (ALL, 3, ((1, 500, 4), (1, 500), (1, 500), (1,))),
    "segmentation": ({"min_share": 0.0, "max_points": 1500}, 21, ((1, 64, 64, 21),)),
    "numbers": ({"kind": "segmentation", "min_share": 0.0, "max_points": 1500}, 200, ((1, 64, 64),)),
    "mask": ({"kind": "segmentation", "min_share": 0.0, "sigmoid": True}, 1, ((1, 64, 64, 1),)),
    "heatmap": ({"threshold": 0.0}, 133, ((1, 16, 16, 133),)),
    "embedding": ({}, 0, ((1, 4096),)),
    "list": ({"kind": "embedding", "encoding": "list", "normalize": False}, 0, ((1, 2048),)),
    "anomaly": ({"threshold": 1.0}, 0, ((1, 320, 320, 3),)),
    "raw": ({}, 0, tuple((1, n) for n in range(1, 30))),
}  # fmt: skip
SPECIAL = np.asarray([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 0.0, -1.0, 0.5, 1.0, 320.0, 1e9], np.float32)


def reader(head: str, dtype: str):
    keys, labels, shapes = HEADS[head]
    # the task matters to people; any kind is parsed under any
    graph = parse_graph({"labels": [WIDE_LABEL] * labels, "postprocess": {"kind": head.split()[0], **keys}})
    scale = None if dtype.startswith("float") else 0.03
    zero = None if scale is None else 3
    specs = tuple(TensorSpec(f"o{i}", dtype, shape, scale, zero) for i, shape in enumerate(shapes))
    return compile_postprocess(graph, specs, PICTURE), shapes


def check(items) -> None:
    written = [item.to_json() for item in items]
    assert len(written) <= MAX_ITEMS
    text = json.dumps(written, allow_nan=False, separators=(",", ":"))
    assert len(text) <= MAX_ANSWER_BYTES
    message = protocol.Result(1, 2, 3, [0, 0, 0, 0], written)
    assert protocol.decode(protocol.encode(message)).items == json.loads(text)
    for item in written:
        for x, y in [(b[i], b[i + 1]) for b in (item.get("box") or [],) for i in range(0, len(b), 2)]:
            assert 0 <= x <= 640
            assert 0 <= y <= 480
        for place in item.get("points", []):
            assert 0 <= place[0] <= 640
            assert 0 <= place[1] <= 480
        score = item.get("score", 0)
        assert score is None or math.isfinite(score)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1 << 30), special=st.sampled_from([0.0, 0.05, 1.0]), spread=st.sampled_from([1e-3, 1, 300]))
def test_random_and_special_numbers_never_break_an_answer(head, dtype, seed, special, spread):
    read, shapes = reader(head, dtype)
    rng = np.random.default_rng(seed)
    outputs = []
    with np.errstate(over="ignore", invalid="ignore"):
        for shape in shapes:
            if dtype.startswith("float"):
                values = (rng.standard_normal(shape) * spread).astype(np.float32)
                mask = rng.random(shape) < special
                values[mask] = rng.choice(SPECIAL, int(mask.sum()))
                outputs.append(values.astype(dtype))
            else:
                limits = np.iinfo(dtype)
                outputs.append(rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True))
        started = time.thread_time()
        items = read(tuple(outputs), BACK, (np.zeros(PICTURE[0].shape, np.float32),))
        took_s = time.thread_time() - started
    check(items)
    assert took_s < 2, "bounded by the shapes, not by what the model says"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1.0, -1e38])
def test_one_number_everywhere_never_breaks_an_answer(head, value):
    read, shapes = reader(head, "float32")
    with np.errstate(over="ignore", invalid="ignore"):
        items = read(
            tuple(np.full(shape, value, np.float32) for shape in shapes), BACK, (np.zeros((1, 320, 320, 3), "f4"),)
        )
    check(items)
    if math.isnan(value):
        written = [item.to_json() for item in items]
        assert all(item.get("score") is None for item in written), "no number, no score"


@pytest.mark.parametrize("place", range(6))
def test_a_softmax_that_hides_its_highest_behind_what_is_no_number_does_not_overflow(place):
    graph = parse_graph({"task": "classification", "postprocess": {"kind": "classification", "softmax": True}})
    read = compile_postprocess(graph, (TensorSpec("y", "float32", (1, 6)),), PICTURE)
    values = np.zeros((1, 6), np.float32)
    values[0, 5 - place], values[0, place // 2] = 1e6, math.nan
    check(read((values,), BACK, ()))


def test_an_autoencoder_that_answers_no_numbers_is_anomalous():
    read, shapes = reader("anomaly", "float32")
    (item,) = read((np.full(shapes[0], np.nan, np.float32),), None, (np.zeros((1, 320, 320, 3), np.float32),))
    assert item.to_json() == {"label": "anomalous", "score": None, "threshold": 1.0}
