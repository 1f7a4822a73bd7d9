"""Each family of model heads, on outputs made by hand from its documented layout: what was put in comes out, in source
pixels. (No file of an exporter is at hand here; the layouts are those that the exporters' documentation states.)"""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import ModelError, Reason
from agent.worker.graph import Anchors, parse_graph
from agent.worker.postprocess import compile_postprocess
from agent.worker.postprocess.ssd import anchor_boxes
from agent.worker.preprocess import Inverse
from agent.worker.tensor import TensorSpec

# a 640x480 frame letterboxed into 320x320: 240 rows of picture, 40 of bar above
BACK = Inverse(2.0, 2.0, 0.0, -80.0, 640, 480)
PICTURE = (TensorSpec("image", "float32", (1, 320, 320, 3)),)
BOX = (100.0, 120.0, 40.0, 60.0)  # centre and size in input pixels
SOURCE_BOX = [160.0, 100.0, 240.0, 220.0]


def graph_of(task: str, kind: str, labels=("cat", "dog", "hen"), **keys):
    return parse_graph({"task": task, "labels": list(labels), "postprocess": {"kind": kind, **keys}})


def quantize(values: np.ndarray, dtype: str, scale: float, zero: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values / scale + zero), limits.min, limits.max).astype(dtype)


# --- YOLO ------------------------------------------------------------------------------------------------------------


def yolo8(rows, count: int = 50) -> np.ndarray:
    """[1, 4 + 3, count] with the rows at the end."""
    table = np.zeros((count, 7), np.float32)
    table[-len(rows) :] = rows
    return np.ascontiguousarray(table.T[None])


def test_a_yolov8_column_is_a_box_with_its_best_class():
    read = compile_postprocess(graph_of("detection", "yolov8"), (TensorSpec("y", "float32", (1, 7, 50)),), PICTURE)
    (item,) = read((yolo8([(*BOX, 0.1, 0.8, 0.3)]),), BACK)
    assert item.to_json() == {"label": "dog", "score": 0.8, "box": SOURCE_BOX}


def test_boxes_of_one_class_that_overlap_become_the_best_and_other_classes_stay():
    read = compile_postprocess(graph_of("detection", "yolov8"), (TensorSpec("y", "float32", (1, 7, 50)),), PICTURE)
    rows = [(*BOX, 0, 0.8, 0), (102, 121, 40, 60, 0, 0.9, 0), (*BOX, 0.7, 0, 0), (250, 200, 20, 20, 0, 0.6, 0)]
    items = read((yolo8(rows),), BACK)
    assert [(i.label, i.score) for i in items] == [("dog", 0.9), ("cat", 0.7), ("dog", 0.6)]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_quantized_normalized_yolov8_answers_within_a_step_of_the_float_one(dtype):
    zero = -128 if dtype == "int8" else 0
    spec = TensorSpec("y", dtype, (1, 7, 50), 1 / 255, zero)
    shares = yolo8([(*(v / 320 for v in BOX), 0.1, 0.8, 0.3)])
    read = compile_postprocess(graph_of("detection", "yolov8", normalized=True), (spec,), PICTURE)
    (item,) = read((quantize(shares, dtype, 1 / 255, zero),), BACK)
    assert item.label == "dog"
    assert item.score == pytest.approx(0.8, abs=0.003)
    np.testing.assert_allclose(item.box, SOURCE_BOX, atol=2 * 320 / 255)


def test_a_yolov5_row_counts_its_class_times_its_objectness():
    spec = TensorSpec("y", "float32", (1, 40, 8))
    table = np.zeros((1, 40, 8), np.float32)
    table[0, 7] = (*BOX, 0.9, 0.1, 0.2, 0.8)
    table[0, 8] = (*BOX, 0.3, 0.1, 0.2, 0.8)  # 0.24 is below the threshold
    read = compile_postprocess(graph_of("detection", "yolov5", threshold=0.25), (spec,), PICTURE)
    (item,) = read((table,), BACK)
    assert item.to_json() == {"label": "hen", "score": 0.72, "box": SOURCE_BOX}


def test_a_pose_has_a_box_and_points_and_says_which_were_not_found():
    graph = graph_of("keypoints", "yolo_pose", ["person"], key_points=3)
    column = [*BOX, 0.9, 100, 120, 1.0, 110, 130, 0.5, np.nan, 0, 0.9]
    read = compile_postprocess(graph, (TensorSpec("y", "float32", (1, 14, 20)),), PICTURE)
    table = np.zeros((1, 14, 20), np.float32)
    table[0, :, 3] = column
    (item,) = read((table,), BACK)
    assert item.to_json() == {
        "label": "person",
        "score": 0.9,
        "box": SOURCE_BOX,
        "points": [[200.0, 160.0, 1.0], [220.0, 180.0, 0.5], [0.0, 0.0, 0.0]],
    }


def test_points_without_a_score_are_all_found():
    graph = graph_of("keypoints", "yolo_pose", ["person"], key_points=2, visibility=False, normalized=True)
    table = np.zeros((1, 9, 4), np.float32)
    table[0, :, 0] = [v / 320 for v in BOX] + [0.9, 100 / 320, 120 / 320, 0.5, 0.5]
    (item,) = compile_postprocess(graph, (TensorSpec("y", "float32", (1, 9, 4)),), PICTURE)((table,), BACK)
    np.testing.assert_allclose(item.points, [[200, 160, 1], [320, 240, 1]], atol=0.05)


# --- SSD -------------------------------------------------------------------------------------------------------------

GRIDS = [19, 19, 10, 10, 5, 5, 3, 3, 2, 2, 1, 1]


def test_the_anchors_of_the_widespread_export_are_its_1917():
    grids = tuple(zip(GRIDS[::2], GRIDS[1::2], strict=True))
    anchors = anchor_boxes(Anchors(grids, 0.2, 0.95, (1.0, 2.0, 0.5, 3.0, 1 / 3), 1.0, True))
    assert anchors.shape == (1917, 4)
    # the first cell of the first grid: a small square, then a wide and a high box at the lowest scale
    np.testing.assert_allclose(anchors[0], [0.5 / 19, 0.5 / 19, 0.1, 0.1])
    np.testing.assert_allclose(anchors[1], [0.5 / 19, 0.5 / 19, 0.2 / 2**0.5, 0.2 * 2**0.5])
    # the last: the geometric mean of its scale and the whole picture
    np.testing.assert_allclose(anchors[-1], [0.5, 0.5, 0.95**0.5, 0.95**0.5])


def ssd_outputs(anchors: np.ndarray, index: int, scores: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Raw boxes that all say their anchor but one, which says `BOX`."""
    boxes = np.zeros((1, len(anchors), 4), np.float32)
    y, x, h, w = anchors[index]
    cx, cy, bw, bh = (v / 320 for v in BOX)
    boxes[0, index] = [10 * (cy - y) / h, 10 * (cx - x) / w, 5 * np.log(bh / h), 5 * np.log(bw / w)]
    table = np.full((1, len(anchors), 4), -9.0, np.float32)
    for kind, logit in scores.items():
        table[0, index, kind] = logit
    return boxes, table


@pytest.mark.parametrize(("scores", "score"), [("sigmoid", 0.8807971), ("softmax", 0.8807753)])
def test_a_raw_ssd_box_is_decoded_over_its_anchor(scores, score):
    graph = graph_of("detection", "ssd", anchors={"grids": GRIDS}, scores=scores)
    anchors = anchor_boxes(graph.postprocess.anchors)
    boxes, table = ssd_outputs(anchors, 700, {2: 2.0, **({0: 0.0} if scores == "softmax" else {})})
    specs = (TensorSpec("b", "float32", (1, 1917, 4)), TensorSpec("s", "float32", (1, 1917, 4)))
    if scores == "softmax":  # elsewhere the background wins
        table[0, np.arange(1917) != 700, 0] = 9
    (item,) = compile_postprocess(graph, specs, PICTURE)((boxes, table), BACK)
    assert item.label == "dog"  # class 0 is the background
    assert item.score == pytest.approx(score, abs=1e-4)
    np.testing.assert_allclose(item.box, SOURCE_BOX, atol=0.02)


def test_a_quantized_raw_ssd_answers_alike_within_its_steps():
    graph = graph_of("detection", "ssd", anchors={"grids": [10, 10], "aspects": [1.0], "reduced": False})
    anchors = anchor_boxes(graph.postprocess.anchors)
    nearest = int(np.abs(anchors[:, :2] - (BOX[1] / 320, BOX[0] / 320)).sum(axis=1).argmin())
    boxes, table = ssd_outputs(anchors, nearest, {1: 3.0, 3: 1.0})
    specs = (TensorSpec("b", "uint8", (1, 200, 4), 0.05, 128), TensorSpec("s", "int8", (1, 200, 4), 0.1, 20))
    tensors = (quantize(boxes, "uint8", 0.05, 128), quantize(table, "int8", 0.1, 20))
    (item,) = compile_postprocess(graph, specs, PICTURE)(tensors, BACK)
    assert item.label == "cat"
    assert item.score == pytest.approx(1 / (1 + np.exp(-3)), abs=0.01)
    np.testing.assert_allclose(item.box, SOURCE_BOX, atol=5)


IN_GRAPH = tuple(TensorSpec(n, "float32", shape) for n, shape in
                 (("b", (1, 10, 4)), ("c", (1, 10)), ("s", (1, 10)), ("n", (1,))))  # fmt: skip


def test_answers_of_the_detection_operator_are_taken_up_to_their_count():
    boxes, classes, scores = np.zeros((1, 10, 4), np.float32), np.zeros((1, 10), np.float32), np.zeros((1, 10), "f4")
    boxes[0, :3] = [(90 / 320, 80 / 320, 150 / 320, 120 / 320)] * 3
    classes[0, :3] = [2, 0, 1]
    scores[0, :3] = [0.9, 0.4, 0.8]  # the third is beyond the count
    read = compile_postprocess(graph_of("detection", "ssd_in_graph", threshold=0.3), IN_GRAPH, PICTURE)
    items = read((boxes, classes, scores, np.asarray([2], np.float32)), BACK)
    assert [i.to_json() for i in items] == [
        {"label": "hen", "score": 0.9, "box": SOURCE_BOX},
        {"label": "cat", "score": 0.4, "box": SOURCE_BOX},
    ]


# --- maps ------------------------------------------------------------------------------------------------------------


def blob() -> np.ndarray:
    """[80, 80] classes: 1 where cells 20..29 by 35..49 are, in the picture's part of the letterbox; else 0."""
    numbers = np.zeros((80, 80), np.int64)
    numbers[35:50, 20:30] = 1
    return numbers


@pytest.mark.parametrize("form", ["last", "first", "int8", "numbers", "one channel"])
def test_a_segment_says_share_box_and_outline(form):
    numbers = blob()
    labels, keys = ["ground", "cat", "dog"], {"background": [0]}
    spec = TensorSpec("y", "float32", (1, 80, 80, 3))
    tensor = np.eye(3, dtype=np.float32)[numbers][None]
    if form == "first":
        spec, keys["channels"] = TensorSpec("y", "float32", (1, 3, 80, 80)), "first"
        tensor = np.ascontiguousarray(tensor.transpose(0, 3, 1, 2))
    elif form == "int8":
        spec = TensorSpec("y", "int8", spec.shape, 0.1, 5)
        tensor = quantize(tensor * 5, "int8", 0.1, 5)
    elif form == "numbers":
        spec, tensor = TensorSpec("y", "int64", (1, 80, 80)), numbers[None]
    elif form == "one channel":
        labels, keys = ["cat"], {"sigmoid": True}
        spec, tensor = TensorSpec("y", "float32", (1, 80, 80, 1)), np.where(numbers, 3.0, -3.0)[None, ..., None]
    read = compile_postprocess(graph_of("segmentation", "segmentation", labels, **keys), (spec,), PICTURE)
    (item,) = read((tensor,), BACK)
    assert item.label == "cat"
    assert item.share == round(150 / (60 * 80), 4)  # 60 of the 80 rows are picture
    # a cell is 4 input pixels, 8 of the source; the bar above is 80 source pixels
    assert item.box == (160.0, 200.0, 240.0, 320.0)
    (polygon,) = item.polygons
    corners = sorted(zip(polygon[::2], polygon[1::2], strict=True))
    assert corners == [(160.0, 200.0), (160.0, 320.0), (240.0, 200.0), (240.0, 320.0)]
    assert item.to_json()["score"] == item.share


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), most=st.integers(0, 300))
def test_outlines_never_have_more_points_than_were_asked_for(seed, most):
    rng = np.random.default_rng(seed)
    tensor = rng.integers(0, 3, (1, 60, 60)).astype(np.int64)
    graph = graph_of("segmentation", "segmentation", max_points=most, min_share=0.0)
    items = compile_postprocess(graph, (TensorSpec("y", "int64", (1, 60, 60)),), PICTURE)((tensor,), BACK)
    assert sum(len(polygon) // 2 for item in items for polygon in item.polygons) <= most
    assert sum(item.share for item in items) == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("channels", ["last", "first"])
def test_a_peak_of_each_map_is_its_point(channels):
    maps = np.zeros((1, 40, 40, 3), np.float32)
    maps[0, 15, 10, 0] = 0.9
    maps[0, 15, 11, 0] = 0.5  # the higher neighbour pulls by a quarter of a cell
    maps[0, 20, 30, 1] = 0.8
    maps[0, 5, 5, 2] = 0.1
    spec = TensorSpec("y", "float32", maps.shape)
    if channels == "first":
        maps = np.ascontiguousarray(maps.transpose(0, 3, 1, 2))
        spec = TensorSpec("y", "float32", maps.shape)
    graph = graph_of("keypoints", "heatmap", ["nose", "left", "right"], channels=channels)
    (item,) = compile_postprocess(graph, (spec,), PICTURE)((maps,), BACK)
    # cells of 8 input pixels, 16 of the source
    assert item.points[0] == (10.75 * 16, 15.5 * 16 - 80, 0.9)
    assert item.points[1] == (30.5 * 16, 20.5 * 16 - 80, 0.8)
    assert item.points[2][2] == 0
    assert (item.box, item.score) == (None, 0.85)


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_several_labels_hold_at_once_with_sigmoid():
    graph = graph_of("classification", "classification", sigmoid=True, top_k=3, threshold=0.5)
    spec = TensorSpec("y", "int8", (1, 3), 0.1, 0)
    items = compile_postprocess(graph, (spec,))((np.asarray([[20, -20, 5]], np.int8),), None)
    assert [(i.label, round(i.score, 3)) for i in items] == [("cat", 0.881), ("hen", 0.622)]


@settings(max_examples=100, deadline=None)
@given(count=st.sampled_from([3, 32, 33, 500]), seed=st.integers(0, 1 << 30), softmax=st.booleans())
def test_few_and_many_classes_rank_as_plain_numpy_does(count, seed, softmax):
    values = np.random.default_rng(seed).permutation(count).astype(np.float32) / 7
    labels = [str(i) for i in range(count)]
    graph = graph_of("classification", "classification", labels, softmax=softmax, top_k=5)
    items = compile_postprocess(graph, (TensorSpec("y", "float32", (1, count)),))((values[None],), None)
    wide = values.astype(np.float64)
    shares = np.exp(wide - wide.max()) / np.exp(wide - wide.max()).sum() if softmax else wide
    order = np.argsort(-shares)[:5]
    assert [item.label for item in items] == [labels[i] for i in order]
    np.testing.assert_allclose([item.score for item in items], shares[order], atol=1e-5)


def test_an_embedding_has_the_length_one_and_travels_as_half_floats():
    vector = np.asarray([[3.0, 4.0, 0.0]], np.float32)
    spec = TensorSpec("y", "float32", (1, 3))
    (item,) = compile_postprocess(graph_of("embedding", "embedding", []), (spec,))((vector,), None)
    written = item.to_json()
    assert written["size"] == 3
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(written["float16"]), "<f2"), [0.6, 0.8, 0], atol=1e-3)
    graph = graph_of("embedding", "embedding", [], normalize=False, encoding="list")
    (item,) = compile_postprocess(graph, (spec,))((vector,), None)
    assert item.to_json() == {"size": 3, "values": [3.0, 4.0, 0.0]}


def test_an_anomaly_is_the_mean_squared_difference_of_output_and_input():
    given_spec, made_spec = TensorSpec("x", "float32", (1, 4)), TensorSpec("y", "int8", (1, 2, 2), 0.5, 10)
    graph = graph_of("anomaly", "anomaly", [], threshold=1.25)
    read = compile_postprocess(graph, (made_spec,), (given_spec,))
    given_tensor = np.asarray([[0, 1, 2, 3]], np.float32)
    (item,) = read((np.asarray([[[12, 12], [12, 12]]], np.int8),), None, (given_tensor,))
    assert item.to_json() == {"label": "anomalous", "score": 1.5, "threshold": 1.25}
    (item,) = read((np.asarray([[[10, 12], [14, 16]]], np.int8),), None, (given_tensor,))
    assert item.to_json() == {"label": "normal", "score": 0.0, "threshold": 1.25}


# --- refusals --------------------------------------------------------------------------------------------------------


def f32(*shape: int) -> TensorSpec:
    return TensorSpec("y", "float32", shape)


@pytest.mark.parametrize(
    ("graph", "outputs", "text"),
    [
        (graph_of("detection", "yolov8"), (f32(1, 50, 7),), "a row per box"),
        (graph_of("detection", "yolov8"), (f32(1, 9, 50),), "3 labels, the model answers 5 classes"),
        (graph_of("detection", "yolov8"), (f32(1, 4, 50),), "[1, 4 + classes, n]"),
        (graph_of("detection", "yolov5"), (f32(1, 50, 5),), "[1, n, 5 + classes]"),
        (graph_of("detection", "yolov5"), (f32(50, 8),), "[1, n, 5 + classes]"),
        (graph_of("keypoints", "yolo_pose", ["p"], key_points=17), (f32(1, 55, 50),), "[1, 4 + classes, n]"),
        (graph_of("detection", "ssd", anchors={"grids": [2, 2]}), (f32(1, 9, 4), f32(1, 9, 4)), "make 12 anchors"),
        (graph_of("detection", "ssd", anchors={"grids": [2, 2]}), (f32(1, 12, 4),), "scores [1, n, classes]"),
        (graph_of("detection", "ssd_in_graph"), (f32(1, 9, 4), f32(1, 9), f32(1, 8), f32(1)), "their count"),
        (graph_of("segmentation", "segmentation"), (f32(1, 8, 8, 4),), "3 labels, the model answers 4 classes"),
        (graph_of("keypoints", "heatmap"), (f32(1, 8, 8, 4),), "3 labels, the model answers 4 key points"),
        (graph_of("embedding", "embedding"), (f32(1, 9000),), "at most 4096"),
        (graph_of("anomaly", "anomaly", threshold=1.0), (f32(1, 9),), "as large as the one input"),
    ],
)
def test_outputs_that_a_head_cannot_read_are_refused_with_both_sides_named(graph, outputs, text):
    with pytest.raises(ModelError) as caught:
        compile_postprocess(graph, outputs, PICTURE)
    assert caught.value.reason is Reason.MODEL_SHAPE
    assert text in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_detector_that_takes_no_picture_is_refused():
    with pytest.raises(ModelError) as caught:
        compile_postprocess(graph_of("detection", "yolov8"), (f32(1, 7, 50),), (f32(1, 640),))
    assert caught.value.reason is Reason.MODEL_SHAPE


@pytest.mark.parametrize(
    ("graph", "key"),
    [
        ({"task": "detection", "postprocess": {"kind": "ssd"}}, "anchors.grids"),
        ({"postprocess": {"kind": "ssd", "anchors": {"grids": [3, 0.5]}}}, "grids"),
        ({"postprocess": {"kind": "ssd", "anchors": {"grids": [10**9, 2]}}}, "grids"),
        ({"postprocess": {"kind": "yolo_pose"}}, "key_points"),
        ({"postprocess": {"kind": "anomaly"}}, "threshold"),
        ({"postprocess": {"kind": "anomaly", "threshold": 10**400}}, "threshold"),
        ({"postprocess": {"kind": "classification", "sigmoid": True, "softmax": True}}, "sigmoid"),
        ({"postprocess": {"kind": "segmentation", "background": ["x"]}}, "background"),
        ({"postprocess": {"kind": "embedding", "encoding": "hex"}}, "encoding"),
        ({"preprocess": {"roi": [0.5, 0, 0.5, 1]}}, "roi"),
        ({"preprocess": {"roi": [0, 0, 1, 10**400]}}, "roi"),
        ({"preprocess": {"pad": 256}}, "pad"),
        ({"preprocess": {"constants": {"size": []}}}, "size"),
        ({"preprocess": {"kind": "smell"}}, "kind"),
    ],
)
def test_a_wrong_declaration_is_refused_by_the_name_of_the_key(graph, key):
    with pytest.raises(ModelError) as caught:
        parse_graph(graph)
    assert key in caught.value.message


@pytest.mark.parametrize("index", [-1, 0.5, 256, 1e9])
def test_a_background_that_is_no_class_is_refused_before_the_first_frame(index):
    with pytest.raises(ModelError) as refused:
        parse_graph({"task": "segmentation", "postprocess": {"kind": "segmentation", "background": [index]}})
    assert refused.value.reason is Reason.MODEL_UNLOADABLE
    assert "background" in refused.value.message
