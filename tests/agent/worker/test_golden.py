"""Golden files: what is read, what is refused, and what counts as reproduced."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from workerdriver import ask, load, load_message

from agent import memfd, protocol
from agent.errors import ModelError, Reason
from agent.worker import golden
from agent.worker.graph import parse_graph
from agent.worker.pipeline import Pipeline
from agent.worker.tensor import TensorSpec

CLASSES = parse_graph({"task": "classification", "postprocess": {"kind": "classification"}})


class Echo:
    """A session that gives its input back, plus an error of the test's choice."""

    inputs = (TensorSpec("x", "float32", (1, 3)),)
    outputs = (TensorSpec("y", "float32", (1, 3)),)
    actual, coverage = "echo", 1.0

    def __init__(self, error=0.0):
        self.tensors = (self.inputs[0].empty(),)
        self.error = np.asarray(error, np.float32)

    def run(self):
        return (self.tensors[0] + self.error,)


def vector(*values: float, expected=None) -> golden.Vector:
    tensor = np.asarray([values], np.float32)
    return golden.Vector(None, (tensor,), {"m": (tensor if expected is None else np.asarray([expected], np.float32),)})


def check(session, *vectors, atol=0.1, margin=0.1, graph=CLASSES) -> float:
    pipeline = Pipeline(session, graph, (), ())
    return golden.check(pipeline, graph, "m", vectors, golden.Tolerance({"m": (atol,)}, margin))


def test_what_is_dumped_is_loaded_again():
    vectors = [
        golden.Vector(b"\x89PNG...", (), {"int8.tflite": (np.arange(6, dtype=np.int8).reshape(1, 6),)}),
        golden.Vector(None, (np.ones((1, 2), np.float32), np.zeros(3, np.int8)), {"int8.tflite": ()}),
    ]
    again = golden.load_vectors(golden.dump_vectors(vectors))
    assert again[0].image == vectors[0].image
    np.testing.assert_array_equal(again[0].expected["int8.tflite"][0], vectors[0].expected["int8.tflite"][0])
    assert [t.dtype for t in again[1].tensors] == [np.float16, np.int8] or [t.dtype for t in again[1].tensors] == [
        np.float32,
        np.int8,
    ]


def test_the_same_vectors_give_the_same_bytes():
    assert golden.dump_vectors([vector(1, 2, 3)]) == golden.dump_vectors([vector(1, 2, 3)])


def test_float32_answers_are_stored_as_float16_unless_they_do_not_fit():
    data = [vector(1, 2, 3), vector(1e6, 0, 0)]
    stored = [v.expected["m"][0].dtype for v in golden.load_vectors(golden.dump_vectors(data))]
    assert stored == [np.float16, np.float32]


def test_the_worst_error_comes_back_as_a_share_of_its_tolerance():
    assert check(Echo(0.025), vector(0.1, 0.8, 0.1)) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (0.11, Reason.GOLDEN_MISMATCH), (-0.11, Reason.GOLDEN_MISMATCH),
        (np.nan, Reason.OUTPUT_NOT_FINITE), (np.inf, Reason.OUTPUT_NOT_FINITE),
    ],
)  # fmt: skip
def test_an_error_beyond_the_tolerance_is_a_mismatch_and_no_number_at_all_is_told_apart(error, reason):
    with pytest.raises(ModelError) as caught:
        check(Echo(error), vector(0.1, 0.8, 0.1))
    assert caught.value.reason is reason
    assert "vector 0" in caught.value.message


def test_another_winner_is_a_mismatch_only_where_the_first_led_clearly():
    clear, close = vector(0.6, 0.4, 0.0), vector(0.52, 0.48, 0.0)
    turn = np.asarray([-0.15, 0.15, 0.0])
    assert check(Echo(turn), close, atol=0.5)
    with pytest.raises(ModelError) as caught:
        check(Echo(turn), clear, atol=0.5)
    assert "class 1 wins instead of 0" in caught.value.message


@pytest.mark.parametrize(
    "vectors",
    [
        [golden.Vector(None, (np.zeros((1, 3), np.float32),), {})],
        [golden.Vector(None, (np.zeros((1, 3), np.float32),), {"m": (np.zeros((1, 4), np.float32),)})],
        [golden.Vector(None, (np.zeros((1, 4), np.float32),), {"m": (np.zeros((1, 3), np.float32),)})],
        [golden.Vector(None, (), {"m": (np.zeros((1, 3), np.float32),)})],
    ],
)
def test_vectors_of_another_model_are_a_mismatch(vectors):
    with pytest.raises(ModelError) as caught:
        check(Echo(), *vectors)
    assert caught.value.reason is Reason.GOLDEN_MISMATCH


def test_a_component_without_a_tolerance_is_a_mismatch():
    pipeline = Pipeline(Echo(), CLASSES, (), ())
    with pytest.raises(ModelError):
        golden.check(pipeline, CLASSES, "m", [vector(1, 2, 3)], golden.Tolerance({}, 0.1))


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return out.getvalue()


def npy(array, **header) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=True)
    return out.getvalue()


def header_only(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue()


def headed(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(1)


BOMB = npy(np.zeros(1 << 20, np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a zip",
        archive({}),
        archive({"image_0.npy": BOMB}, zipfile.ZIP_DEFLATED),
        archive({"image_0.npy": npy(np.asarray([{"a": 1}], object))}),
        archive({"image_0.npy": header_only((1 << 60,))}),
        archive({"image_0.npy": npy(np.zeros(9, np.uint8))[:-4]}),
        archive({"image_0.npy": b"\x93NUMPY\x01\x00"}),
        archive({"image_0.npy": headed("(")}),
        archive({"image_0.npy": headed("-" * 9000 + "1")}),
        archive({"image_0.npy": headed("{'descr': (), 'fortran_order': False, 'shape': (1,), }")}),
        archive({"image_0.npy": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (True,), }")}),
        archive({"../../etc/passwd": npy(np.zeros(3, np.uint8))}),
        archive({"tensor_0_1.npy": npy(np.zeros(3, np.float32))}),
        golden.dump_vectors([vector(1, 2, 3)])[:-30],
    ],
)
def test_a_file_that_is_no_golden_file_is_a_mismatch_and_allocates_nothing(data):
    with pytest.raises(ModelError) as caught:
        golden.load_vectors(data)
    assert caught.value.reason is Reason.GOLDEN_MISMATCH


@pytest.mark.parametrize(
    "tolerance", [{"atol": []}, {"atol": {"m": 1}}, {"atol": {"m": [-1]}}, {"margin": True}, {"margin": float("inf")}]
)
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ModelError):
        golden.parse_tolerance(tolerance)


@pytest.mark.fault("F72")
def test_a_worker_passes_its_own_golden_vectors_and_fails_those_of_another_network(daemon, digits):
    """Recorded by one release, run by the other: the trial must notice that the answers are not the signed ones."""
    graph = {"task": "classification", "preprocess": {"color": "gray", "std": [255.0]}}
    pictures = [(digits / "golden" / f"{name}.png").read_bytes() for name in ("seven", "three", "eight")]
    models = {version: (digits / version / "int8.tflite").read_bytes() for version in ("1.0.0", "1.1.0")}
    from agent.worker.delegates import DELEGATES, Options

    parsed = parse_graph(graph)
    fd = memfd.of_bytes("model", models["1.0.0"])
    pipeline = Pipeline(DELEGATES["litert:cpu"]().load(fd, "tflite", Options()), parsed, (), ())
    vectors = [
        golden.Vector(
            picture, (), {"m": tuple(o.copy() for o in golden.outputs_of(pipeline, golden.Vector(picture, (), {})))}
        )
        for picture in pictures
    ]
    atol = golden.default_atol(pipeline.outputs[0], [v.expected["m"][0] for v in vectors])
    data = golden.dump_vectors(vectors)
    answers = {}
    for version, model in models.items():
        worker = daemon.spawn("trial")
        assert isinstance(load(worker, model, load_message("litert:xnnpack", graph)), protocol.ModelLoaded)
        answers[version] = ask(worker, protocol.RunGolden("m", {"atol": {"m": [atol]}, "margin": 0.1}), data)
    assert isinstance(answers["1.0.0"], protocol.GoldenPassed)
    assert answers["1.0.0"].vectors == 3
    assert 0 <= answers["1.0.0"].worst <= 1
    assert answers["1.1.0"].reason == Reason.GOLDEN_MISMATCH.value


def test_the_default_tolerance_covers_the_other_delegates_but_no_wrong_one():
    spec = TensorSpec("y", "int8", (1, 2), 0.01, 0)
    recorded = [np.asarray([[-100, 100]], np.int8)]  # -1 to 1: a range of 2

    def atol(*others):
        return golden.default_atol(spec, recorded, [np.asarray([other], np.int8) for other in others])

    assert atol() == pytest.approx(0.06)
    assert atol((-98, 100)) == pytest.approx(0.06)
    assert atol((-98, 100), (-90, 100)) == pytest.approx(0.15)
    assert atol((100, -100)) == pytest.approx(0.2)


def test_recorded_floats_are_rounded_well_inside_their_tolerance_and_integers_are_kept() -> None:
    floats = np.random.default_rng(3).normal(0, 5, 1000).astype(np.float32)
    kept = golden.rounded(floats, 0.24)
    assert kept.dtype == np.float32
    assert np.abs(kept - floats).max() <= 0.24 / 16
    assert len(np.unique(kept)) < len(np.unique(floats))
    assert np.array_equal(kept.astype(np.float16).astype(np.float32), kept)
    integers = np.arange(-128, 128, dtype=np.int8)
    assert golden.rounded(integers, 3.0) is integers


def test_a_score_among_pixels_is_compared_as_a_score(tmp_path):
    """A YOLO tensor holds both: a tolerance made for 640 pixels would let every score pass."""
    graph = parse_graph({"task": "detection", "labels": ["a"], "postprocess": {"kind": "yolov8"}})
    spec = TensorSpec("y", "float32", (1, 5, 8))

    class Detector:
        inputs = (TensorSpec("x", "float32", (1, 640, 640, 3)),)
        outputs = (spec,)
        tensors = (inputs[0].empty(),)
        actual, coverage = "fake", 1.0
        answer = np.full(spec.shape, 300.0, np.float32)

        def run(self):
            return (self.answer.copy(),)

    session = Detector()
    session.answer[0, 4] = 0.875
    pipeline = Pipeline(session, graph, (), ())
    atol = golden.default_atol(spec, [session.answer])
    (unit,) = golden.units(pipeline, graph)
    kept = golden.rounded(session.answer, atol, unit)
    assert np.abs(kept[0, 4] - 0.875).max() < 0.01, "the score is not rounded away"
    vector = golden.Vector(None, (session.tensors[0],), {"m": (kept,)})
    tolerance = golden.Tolerance({"m": (atol,)}, 0.1)
    golden.check(pipeline, graph, "m", [vector], tolerance)
    session.answer[0, :4] += 2.0
    golden.check(pipeline, graph, "m", [vector], tolerance)
    session.answer[0, 4] = 0.7
    with pytest.raises(ModelError) as caught:
        golden.check(pipeline, graph, "m", [vector], tolerance)
    assert caught.value.reason is Reason.GOLDEN_MISMATCH
