"""A model on what another found: what travels with the frame, what is cut out, and what is said of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import protocol
from agent.errors import AgentError, ModelError, Reason
from agent.worker import follow
from agent.worker.graph import MAX_ITEMS, parse_graph
from agent.worker.pipeline import Pipeline
from agent.worker.results import MAX_ANSWER_BYTES
from agent.worker.tensor import TensorSpec

ALL = follow.Crops((), 0.0, 1.0, 16)


class Brightness:
    """Answers the mean of the red, green and blue that it is shown."""

    inputs = (TensorSpec("x", "float32", (1, 8, 8, 3)),)
    outputs = (TensorSpec("y", "float32", (1, 3)),)
    actual, coverage, compiled = "fake", 1.0, None

    def __init__(self) -> None:
        self.tensors = (self.inputs[0].empty(),)

    def run(self):
        return (self.tensors[0].mean(axis=(1, 2)) / 255,)


def classifier(**preprocess) -> Pipeline:
    graph = {"task": "classification", "labels": ["red", "green", "blue"], "preprocess": preprocess,
             "postprocess": {"kind": "classification", "top_k": 1}}  # fmt: skip
    return Pipeline(Brightness(), parse_graph(graph), (), ())


def scene() -> np.ndarray:
    """Black, with a red, a green and a blue square of 20 pixels."""
    frame = np.zeros((100, 200, 3), np.uint8)
    for channel, x in ((2, 10), (1, 60), (0, 110)):
        frame[30:50, x : x + 20, channel] = 255
    frame.flags.writeable = False
    return frame


def thing(index: int, x: float, label: str = "part", width: float = 20) -> dict:
    return {"label": label, "score": 0.9 - index / 100, "box": [x, 30.0, x + width, 50.0]}


THREE = [thing(0, 110), thing(1, 10, "nut"), thing(2, 60)]


def test_each_box_is_a_picture_of_its_own_and_its_answer_says_which():
    found = follow.read(follow.written(THREE))
    items = [item.to_json() for item in follow.answer(classifier(), ALL, scene(), found).items]
    assert [(i["label"], i["score"], i["of"]["index"], i["of"]["label"]) for i in items] == [
        ("blue", 1.0, 0, "part"), ("red", 1.0, 1, "nut"), ("green", 1.0, 2, "part"),
    ]  # fmt: skip
    assert [i["box"] for i in items] == [row["box"] for row in THREE]


def test_only_wanted_labels_sizes_and_numbers_are_looked_at():
    found = follow.read(follow.written([*THREE, thing(3, 150, width=3)]))
    for crops, indices in (
        (follow.Crops(("nut",), 0, 1, 16), [1]),
        (follow.Crops((), 0, 10, 16), [0, 1, 2]),
        (follow.Crops((), 0, 1, 2), [0, 1]),
    ):
        items = follow.answer(classifier(), crops, scene(), found).items
        assert [item.index for item in items] == indices


def test_a_margin_shows_what_is_around_and_ends_at_the_frame():
    found = follow.read(follow.written([thing(0, 10)]))
    plain, wide = (
        follow.answer(classifier(), follow.Crops((), margin, 1, 1), scene(), found).items[0].to_json()["score"]
        for margin in (0.0, 0.5)
    )
    assert plain == 1.0
    assert wide == pytest.approx(0.25, abs=0.06)  # four times the area, a quarter of it red
    follow.answer(classifier(), follow.Crops((), 2.0, 1, 1), scene(), found)


def test_the_whole_frame_is_looked_at_again_afterwards():
    pipeline = classifier(resize="letterbox")
    before = pipeline.run(scene()).items
    follow.answer(pipeline, ALL, scene(), follow.read(follow.written(THREE)))
    assert pipeline.run(scene()).items == before


def test_a_detector_on_a_box_answers_in_pixels_of_the_frame():
    class Detector(Brightness):
        outputs = (TensorSpec("y", "float32", (1, 5, 1)),)

        def run(self):
            return (np.asarray([4, 4, 4, 4, 0.9], np.float32).reshape(1, 5, 1),)

    graph = parse_graph({"task": "detection", "labels": ["face"], "postprocess": {"kind": "yolov8"}})
    found = follow.read(follow.written([thing(0, 110)]))
    (item,) = follow.answer(Pipeline(Detector(), graph, (), ()), ALL, scene(), found).items
    assert item.to_json()["box"] == [115.0, 35.0, 125.0, 45.0], "the middle half of the crop"


def test_what_was_found_is_cut_to_what_may_travel():
    many = [thing(0, 10, "\N{GRINNING FACE}" * 80) for _ in range(200)]
    data = follow.written(many)
    assert 0 < len(data) <= protocol.MAX_FOUND_BYTES
    assert 0 < len(follow.read(data)) <= follow.MAX_BOXES
    assert len(follow.read(follow.written([thing(0, 10)] * 200))) == follow.MAX_BOXES
    assert follow.written([{"label": "a", "score": 1.0}, {"label": "b", "score": 1.0, "box": None}]) == b""


@settings(max_examples=150, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=6), max_leaves=30,
        ).map(lambda value: json.dumps(value).encode()),
        st.lists(
            st.tuples(st.integers(), st.text(max_size=90), st.floats(), st.lists(st.floats(), min_size=4, max_size=4)),
            max_size=4,
        ).map(lambda rows: json.dumps(rows).encode()),
    )
)  # fmt: skip
def test_nothing_that_comes_instead_of_boxes_breaks_the_worker(data):
    found = follow.read(data)
    items = follow.answer(classifier(), ALL, scene(), found).items
    text = json.dumps([item.to_json() for item in items], allow_nan=False)
    assert len(items) <= MAX_ITEMS
    assert len(text) <= MAX_ANSWER_BYTES + 1000


def test_brackets_without_end_are_no_boxes():
    assert follow.read(b"[" * 10_000) == []


def test_answers_about_many_boxes_fit_into_one_message():
    graph = parse_graph({"labels": ["x" * 80] * 300, "postprocess": {"kind": "classification", "top_k": 200}})

    class Many(Brightness):
        outputs = (TensorSpec("y", "float32", (1, 300)),)

        def run(self):
            return (np.linspace(0, 1, 300, dtype=np.float32)[None],)

    found = follow.read(follow.written([thing(0, 10, "y" * 80)] * 64))
    items = follow.answer(Pipeline(Many(), graph, (), ()), follow.Crops((), 0, 1, 64), scene(), found).items
    assert 0 < len(items) <= MAX_ITEMS
    protocol.encode(protocol.Result(1, 2, 3, [0] * 4, [item.to_json() for item in items]))


@pytest.mark.parametrize("value", [{}, {"labels": [], "margin": "x", "least_px": 1, "most": 1},
                                   {"labels": [1], "margin": 0, "least_px": 1, "most": 1},
                                   {"labels": [], "margin": 0, "least_px": 1, "most": 1000}])  # fmt: skip
def test_crops_that_are_none_are_refused(value):
    with pytest.raises(AgentError) as caught:
        follow.parse_crops(value)
    assert caught.value.reason is Reason.BAD_MESSAGE


def test_a_model_of_windows_cannot_follow():
    graph = {"task": "raw", "preprocess": {"kind": "signal", "rate_hz": 100, "window": 64, "channels": 3,
                                           "features": [{"kind": "raw"}]}}  # fmt: skip
    with pytest.raises(ModelError) as caught:
        Pipeline(Brightness(), parse_graph(graph), (), ()).run_parts(np.zeros((64, 3), np.float32), [])
    assert caught.value.reason is Reason.MODEL_SHAPE
