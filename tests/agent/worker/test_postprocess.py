"""Answers from output tensors, against a slow reference and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.errors import ModelError, Reason
from agent.worker.graph import parse_graph
from agent.worker.postprocess import compile_postprocess as compile_typed
from agent.worker.preprocess import Inverse
from agent.worker.tensor import TensorSpec

SAME = Inverse(1.0, 1.0, 0.0, 0.0, 640, 480)
HEAT = TensorSpec("heat", "float32", (1, 6, 8, 3))
BOX = TensorSpec("box", "float32", (1, 6, 8, 4))


def compile_postprocess(graph, outputs, inputs=()):
    """As `agent.worker.postprocess`, its items as they are written down."""
    read = compile_typed(graph, outputs, inputs)
    return lambda *tensors: [item.to_json() for item in read(*tensors)]


def centernet(**changes):
    declared = {"kind": "centernet", "stride": 8, "threshold": 0.3, "max_detections": 10, "nms_iou": 0.5, **changes}
    return parse_graph({"task": "detection", "labels": ["bolt", "nut", "washer"], "postprocess": declared})


def iou(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def reference(heat, box, stride, threshold, limit, overlap):
    """Every cell looked at, one after the other."""
    rows, columns, classes = heat.shape
    found = []
    for y in range(rows):
        for x in range(columns):
            for label in range(classes):
                around = heat[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2, label]
                if heat[y, x, label] >= threshold and heat[y, x, label] >= around.max():
                    dx, dy, w, h = (float(v) for v in box[y, x])
                    w, h = max(w, 0.0), max(h, 0.0)
                    edges = (x + dx - w / 2, y + dy - h / 2, x + dx + w / 2, y + dy + h / 2)
                    found.append((label, float(heat[y, x, label]), [edge * stride for edge in edges]))
    found.sort(key=lambda item: -item[1])
    kept = []
    for item in found[: 2 * limit]:
        if all(other[0] != item[0] or iou(other[2], item[2]) <= overlap for other in kept):
            kept.append(item)
    return kept[:limit]


@settings(max_examples=150, deadline=None)
@given(
    heat=hnp.arrays(np.float32, (6, 8, 3), elements=st.integers(0, 1023).map(lambda v: v / 1024)),
    seed=st.integers(0, 1 << 30),
)
def test_peaks_become_the_boxes_that_the_plain_reference_finds(heat, seed):
    box = np.random.default_rng(seed).uniform(0.05, 3.0, (6, 8, 4)).astype(np.float32)
    # Distinct scores: with ties any order is right.
    heat = (heat + np.linspace(0, 1e-4, heat.size, dtype=np.float32).reshape(heat.shape)).astype(np.float32)
    read = compile_postprocess(centernet(), (HEAT, BOX))
    items = read((heat[None], box[None]), SAME)
    wanted = reference(heat, box, 8, 0.3, 10, 0.5)
    clipped = [[float(np.clip(e, 0, (640, 480)[i % 2])) for i, e in enumerate(edges)] for _, _, edges in wanted]
    assert [(i["label"], i["score"]) for i in items] == [
        (("bolt", "nut", "washer")[label], round(score, 4)) for label, score, _ in wanted
    ]
    for item, edges in zip(items, clipped, strict=True):
        np.testing.assert_allclose(item["box"], edges, atol=0.011)


@settings(max_examples=80, deadline=None)
@given(
    heat=hnp.arrays(np.int8, (6, 8, 3)), box=hnp.arrays(np.int8, (6, 8, 4)), dtype=st.sampled_from(["int8", "uint8"])
)
def test_quantized_maps_answer_like_their_real_values(heat, box, dtype):
    if dtype == "uint8":
        heat = heat.view(np.uint8)
    heat_spec = TensorSpec("heat", dtype, HEAT.shape, 1 / 256, -128 if dtype == "int8" else 0)
    box_spec = TensorSpec("box", "int8", BOX.shape, 0.05, 10)
    quantized = compile_postprocess(centernet(), (heat_spec, box_spec))((heat[None], box[None]), SAME)
    real = compile_postprocess(centernet(), (HEAT, BOX))((heat_spec.real(heat[None]), box_spec.real(box[None])), SAME)
    assert quantized == real


def test_boxes_come_back_in_source_pixels():
    heat, box = np.zeros(HEAT.shape, np.float32), np.zeros(BOX.shape, np.float32)
    heat[0, 2, 3, 1] = 0.9
    box[0, 2, 3] = (0.5, 0.25, 2.0, 1.0)
    read = compile_postprocess(centernet(), (HEAT, BOX))
    (item,) = read((heat, box), Inverse(2.0, 3.0, 10.0, 20.0, 640, 480))
    # centre (3.5, 2.25) cells, 2 x 1 cells, stride 8
    assert item == {"label": "nut", "score": 0.9, "box": [20 * 2 + 10, 14 * 3 + 20, 36 * 2 + 10, 22 * 3 + 20]}


def test_a_quiet_heat_map_answers_nothing():
    read = compile_postprocess(centernet(), (HEAT, BOX))
    assert read((np.full(HEAT.shape, 0.29, np.float32), np.ones(BOX.shape, np.float32)), SAME) == []


def test_the_number_of_detections_is_bounded():
    spec = TensorSpec("heat", "float32", (1, 60, 80, 3)), TensorSpec("box", "float32", (1, 60, 80, 4))
    heat = np.zeros(spec[0].shape, np.float32)
    heat[0, ::2, ::2] = np.random.default_rng(0).uniform(0.5, 1, (30, 40, 3))
    box = np.full(spec[1].shape, 0.5, np.float32)
    assert len(compile_postprocess(centernet(max_detections=7), spec)((heat, box), SAME)) == 7


def test_not_a_number_in_a_map_is_no_crash_and_no_detection():
    heat, box = np.full(HEAT.shape, np.nan, np.float32), np.full(BOX.shape, np.nan, np.float32)
    assert compile_postprocess(centernet(), (HEAT, BOX))((heat, box), SAME) == []


def classification(**changes):
    return parse_graph(
        {"task": "classification", "labels": ["a", "b", "c"], "postprocess": {"kind": "classification", **changes}}
    )


def test_classification_ranks_dequantized_scores_and_keeps_top_k():
    spec = TensorSpec("y", "int8", (1, 3), 1 / 256, -128)
    items = compile_postprocess(classification(top_k=2), (spec,))((np.asarray([[-128, 127, 0]], np.int8),), None)
    assert items == [{"label": "b", "score": 0.996094}, {"label": "c", "score": 0.5}]


def test_softmax_turns_logits_of_any_size_into_shares():
    spec = TensorSpec("y", "float32", (1, 1, 1, 3))
    logits = np.asarray([1000.0, 1001.0, 999.0], np.float32).reshape(spec.shape)
    items = compile_postprocess(classification(softmax=True), (spec,))((logits,), None)
    assert [item["label"] for item in items] == ["b", "a", "c"]
    assert sum(item["score"] for item in items) == pytest.approx(1, abs=1e-5)


def test_raw_describes_each_output_and_hides_what_json_cannot_say():
    graph = parse_graph({"task": "raw"})
    specs = (TensorSpec("a", "int8", (1, 2), 0.5, 0), TensorSpec("b", "float32", (2,)))
    outputs = (np.asarray([[2, 4]], np.int8), np.asarray([np.nan, 1], np.float32))
    items = compile_postprocess(graph, specs)(outputs, None)
    assert items[0] == {"name": "a", "shape": [1, 2], "min": 1.0, "max": 2.0, "mean": 1.5}
    assert items[1] == {"name": "b", "shape": [2], "min": None, "max": None, "mean": None}


@pytest.mark.parametrize(
    ("graph", "outputs"),
    [
        (centernet(), (HEAT,)),
        (centernet(), (BOX, HEAT)),
        (centernet(), (HEAT, TensorSpec("box", "float32", (1, 6, 9, 4)))),
        (classification(), (HEAT,)),
        (classification(), (TensorSpec("y", "float32", (1, 4)),)),
        (classification(), (TensorSpec("y", "float32", (1, 3)), TensorSpec("z", "float32", (1, 3)))),
    ],
)
def test_outputs_that_are_not_what_the_release_declares_are_a_model_shape_error(graph, outputs):
    with pytest.raises(ModelError) as caught:
        compile_postprocess(graph, outputs)
    assert caught.value.reason is Reason.MODEL_SHAPE
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("graph", "key"),
    [
        ({"task": "detection"}, "kind"),
        ({"preprocess": {"resize": "squash"}}, "resize"),
        ({"preprocess": {"mean": [1, 2]}}, "mean"),
        ({"preprocess": {"std": [0.0]}}, "std"),
        ({"preprocess": {"std": [float("nan")]}}, "std"),
        ({"postprocess": {"kind": "centernet", "stride": 0}}, "stride"),
        ({"postprocess": {"kind": "centernet", "max_detections": 10**6}}, "max_detections"),
        ({"postprocess": {"kind": "classification", "softmax": 1}}, "softmax"),
        ({"postprocess": []}, "postprocess"),
        ({"labels": [1]}, "labels"),
        ({"labels": ["x"] * 20_001}, "labels"),
    ],
)
def test_a_wrong_graph_is_refused_by_the_name_of_the_key(graph, key):
    with pytest.raises(ModelError) as caught:
        parse_graph(graph)
    assert key in caught.value.message


def test_a_label_of_ten_megabytes_is_cut():
    assert len(parse_graph({"labels": ["x" * 10_000_000]}).labels[0]) == 80
