"""Model workers for real: loading, refusing, answering pictures, serving frames, dying."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from workerdriver import ROOT, Camera, Daemon, ask, load, load_message, make_clip

from agent import memfd, protocol
from agent.errors import Reason

VWW = {
    "task": "classification",
    "labels": ["no person", "person"],
    "preprocess": {"color": "rgb", "mean": [0.0], "std": [255.0]},
    "postprocess": {"kind": "classification"},
}
PERSON_DETECT = {
    "task": "classification",
    "labels": ["no person", "person"],
    "preprocess": {"color": "gray", "mean": [127.0], "std": [1 / 0.007843137718737125]},
    "postprocess": {"kind": "classification"},
}
DETECTOR = {
    "task": "detection",
    "labels": ["bolt", "nut", "washer"],
    "preprocess": {"std": [255.0]},
    "postprocess": {"kind": "centernet", "stride": 8},
}
FAKES = (str(ROOT / "tests/agent/worker/entry_with_fakes.py"),)


def steps(result: protocol.Result) -> dict[str, float]:
    """Scores of a classification as int8 steps (scale 1/256, zero point -128)."""
    return {item["label"]: item["score"] * 256 - 128 for item in result.items}


@pytest.mark.parametrize("delegate", ["litert:xnnpack", "litert:cpu"])
@pytest.mark.parametrize(
    ("model", "graph", "person", "nobody"),
    [
        ("mlperf-tiny/vww_96_int8.tflite", VWW, (-93, 93), (57, -57)),
        ("tflite-micro/person_detect_fixed.tflite", PERSON_DETECT, (-113, 113), (77, -77)),
    ],
)
def test_published_models_answer_their_published_pictures(
    daemon: Daemon, shared_data, delegate, model, graph, person, nobody
):
    worker = daemon.spawn("model")
    loaded = load(worker, (shared_data / model).read_bytes(), load_message(delegate, graph))
    assert loaded.actual == delegate
    assert loaded.coverage > 0.9
    for picture, expected in (("person.png", person), ("no_person.png", nobody)):
        result = ask(worker, protocol.RunImage(), (shared_data / "tflite-micro" / picture).read_bytes())
        got = steps(result)
        assert got["no person"] == pytest.approx(expected[0], abs=3)
        assert got["person"] == pytest.approx(expected[1], abs=3)


@pytest.mark.parametrize("delegate", ["litert:xnnpack", "openvino:cpu"])
def test_a_published_model_with_a_broken_field_is_refused_in_one_line_and_the_worker_stays(
    daemon: Daemon, shared_data, delegate
):
    if delegate.startswith("openvino"):
        pytest.importorskip("openvino")
    worker = daemon.spawn("trial")
    model = (shared_data / "tflite-micro/person_detect.tflite").read_bytes()
    fault = load(worker, model, load_message(delegate, PERSON_DETECT))
    assert fault.reason == Reason.MODEL_UNLOADABLE.value
    assert "quantized_dimension" in fault.message or "axis" in fault.message
    assert "\n" not in fault.message
    assert fault.hint
    again = (shared_data / "tflite-micro/person_detect_fixed.tflite").read_bytes()
    assert isinstance(load(worker, again, load_message("litert:cpu", PERSON_DETECT)), protocol.ModelLoaded)


@pytest.mark.fault("F67")
@pytest.mark.parametrize("delegate", ["litert:xnnpack", "litert:cpu"])
def test_a_model_that_kills_its_runtime_kills_only_its_worker(daemon: Daemon, vectors, delegate):
    other = daemon.spawn("model")
    worker = daemon.spawn("trial")
    fd = memfd.of_bytes("model", (vectors / "crash.tflite").read_bytes())
    worker.send(load_message(delegate, DETECTOR), fd)
    os.close(fd)
    assert worker.receive() is None
    assert daemon.wait_exit(worker).status == -11
    assert load(other, b"still here?", load_message(delegate)).reason == Reason.MODEL_UNLOADABLE.value


@pytest.mark.fault("F68")
@pytest.mark.parametrize(
    ("model", "delegate"),
    [("hang.onnx", "onnx:cpu"), ("hang.tflite", "litert:xnnpack"), ("hang.tflite", "litert:cpu")],
)
def test_a_model_that_never_returns_loads_hangs_and_can_be_killed(daemon: Daemon, vectors, model, delegate):
    worker = daemon.spawn("trial")
    loaded = load(worker, (vectors / model).read_bytes(), load_message(delegate, DETECTOR))
    assert isinstance(loaded, protocol.ModelLoaded)
    worker.send(protocol.Measure(0, 1))
    with pytest.raises(TimeoutError):
        worker.receive(1.0)
    daemon.kill(worker)
    assert daemon.wait_exit(worker).status == -9


@pytest.mark.parametrize("delegate", ["litert:xnnpack", "onnx:cpu"])
def test_a_model_that_could_still_change_is_refused(daemon: Daemon, digits, delegate):
    format = "onnx" if delegate.startswith("onnx") else "tflite"
    data = (digits / "1.0.0" / f"int8.{format}").read_bytes()
    worker = daemon.spawn("model")
    fd = memfd.create("model", len(data))
    os.pwrite(fd, data, 0)
    worker.send(load_message(delegate), fd)
    os.close(fd)
    fault = worker.receive().message
    assert (fault.reason, "sealed" in fault.message) == (Reason.BAD_MESSAGE.value, True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"delegate": "gpu:quantum"}, Reason.UNKNOWN_DELEGATE),
        ({"delegate": "tflite:cpu"}, Reason.RUNTIME_MISSING),
        ({"format": "onnx"}, Reason.UNKNOWN_FORMAT),
        ({"threads": 0}, Reason.BAD_MESSAGE),
        ({"inputs": [{"name": "x"}]}, Reason.MODEL_SHAPE),
        ({"inputs": [{"name": "x", "dtype": "int8", "shape": [1, 8, 8, 1]}]}, Reason.MODEL_SHAPE),
        ({"outputs": [{"name": "PartitionedCall:0", "dtype": "int8", "shape": [1, 11]}]}, Reason.MODEL_SHAPE),
        ({"outputs": [{"name": "PartitionedCall:0", "dtype": "float32", "shape": [1, 10]}]}, Reason.MODEL_SHAPE),
        ({"graph": {"task": "classification", "labels": ["one", "two"]}}, Reason.MODEL_SHAPE),
        ({"graph": {"task": "juggling"}}, Reason.MODEL_UNLOADABLE),
    ],
)
def test_a_request_that_does_not_fit_the_model_is_a_fault_with_a_hint_and_the_worker_stays(
    daemon: Daemon, digits, changes, reason
):
    model = (digits / "1.0.0" / "int8.tflite").read_bytes()
    if changes.get("delegate") == "tflite:cpu" and int(np.__version__.split(".")[0]) < 2:
        pytest.skip("tflite-runtime may well be there under numpy 1")
    worker = daemon.spawn("model")
    fault = load(worker, model, load_message(**{"delegate": "litert:cpu", **changes}))
    assert fault.reason == reason.value
    assert "\n" not in fault.message
    if reason is Reason.RUNTIME_MISSING:
        assert "pip install 'edge-runtime-agent[tflite]'" in fault.hint
    assert isinstance(load(worker, model, load_message("litert:cpu")), protocol.ModelLoaded)


def test_requests_out_of_order_are_refused(daemon: Daemon, digits):
    worker = daemon.spawn("model")
    worker.send(protocol.Measure(1, 1))
    assert worker.receive().message.reason == Reason.BAD_MESSAGE.value
    model = (digits / "1.0.0" / "int8.tflite").read_bytes()
    assert isinstance(load(worker, model, load_message("litert:cpu")), protocol.ModelLoaded)
    assert load(worker, model, load_message("litert:cpu")).reason == Reason.BAD_MESSAGE.value


def test_measuring_counts_whole_runs_and_none_is_a_sign_of_life(daemon: Daemon, digits):
    worker = daemon.spawn("trial")
    load(worker, (digits / "1.0.0" / "int8.tflite").read_bytes(), load_message("litert:xnnpack"))
    worker.send(protocol.Measure(2, 7))
    measured = worker.expect(protocol.Measured)
    assert len(measured.runs_ns) == 7
    assert min(measured.runs_ns) > 10_000
    assert measured.rss_bytes > 20 << 20
    worker.send(protocol.Measure(0, 0))
    assert worker.expect(protocol.Measured).runs_ns == []


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 100])
def test_a_picture_that_is_none_is_a_fault(daemon: Daemon, digits, data):
    worker = daemon.spawn("model")
    load(worker, (digits / "1.0.0" / "int8.tflite").read_bytes(), load_message("litert:cpu"))
    assert ask(worker, protocol.RunImage(), data).reason == Reason.IMAGE_UNREADABLE.value


def serve_digits(daemon: Daemon, digits, delegate: str = "litert:xnnpack"):
    worker = daemon.spawn("model")
    graph = {"task": "classification", "preprocess": {"color": "gray", "std": [255.0]}}
    format = "onnx" if delegate.startswith("onnx") else "tflite"
    loaded = load(worker, (digits / "1.0.0" / f"int8.{format}").read_bytes(), load_message(delegate, graph))
    assert isinstance(loaded, protocol.ModelLoaded)
    return worker


def results(messages) -> list[protocol.Result]:
    return [message for message in messages if isinstance(message, protocol.Result)]


def test_every_frame_of_a_clip_is_answered_once_in_order_with_its_times(daemon: Daemon, digits, clip):
    camera = Camera.open(daemon, {"path": str(clip), "policy": "every"})
    worker = serve_digits(daemon, digits)
    camera.attach(1, worker)
    answered = []
    while len(answered) < 200:
        answered.append(worker.expect(protocol.Result))
    assert [result.seq for result in answered] == list(range(200))
    for result in answered:
        assert len(result.stages_us) == 4
        assert result.t_frame_ns <= result.t_done_ns
        assert sum(result.stages_us) <= (result.t_done_ns - result.t_frame_ns) / 1000 + 1
        assert len(result.items) == 5


def test_a_swap_to_another_delegate_answers_every_frame_exactly_once(daemon: Daemon, digits, clip):
    camera = Camera.open(daemon, {"path": str(clip), "loop": True, "queue_frames": 16})
    old, new = serve_digits(daemon, digits, "litert:xnnpack"), serve_digits(daemon, digits, "onnx:cpu")
    camera.attach(1, old)
    old.expect(protocol.Result)
    camera.attach(2, new, active=False)
    camera.send(protocol.SwitchReader("line", 2))
    switched = camera.expect(protocol.Switched)
    finished = old.expect(protocol.Finished)
    by_new = [new.expect(protocol.Result).seq for _ in range(30)]
    by_old = [0] + [result.seq for result in results(old.unasked)]
    lost = [seq for m in camera.collect(0.05) if isinstance(m, protocol.Dropped) for seq in m.seqs]
    assert finished == protocol.Finished(len(by_old), by_old[-1])
    assert by_new[0] == switched.first_seq
    assert sorted(by_old + by_new + [seq for seq in lost if seq <= by_new[-1]]) == list(range(by_new[-1] + 1))
    assert lost == []


def test_killing_the_serving_worker_drops_one_frame_and_another_goes_on(daemon: Daemon, digits, clip):
    camera = Camera.open(daemon, {"path": str(clip), "policy": "every", "loop": True})
    worker, other = serve_digits(daemon, digits), serve_digits(daemon, digits)
    camera.attach(1, worker)
    worker.expect(protocol.Result)
    daemon.kill(worker)
    daemon.wait_exit(worker)
    answered = {0} | {result.seq for result in results(worker.collect(0.2))}
    camera.attach(2, other)
    first = other.expect(protocol.Result).seq
    lost = [(m.seqs, m.reason) for m in camera.collect(0.05) if isinstance(m, protocol.Dropped)]
    assert len(lost) <= 1
    dropped = set(lost[0][0]) if lost else set()
    assert not lost or lost[0][1] == "worker_lost"
    # Killed between its answer and its credit, the frame is both answered and given up; never neither.
    assert len(dropped) <= 1
    assert answered | dropped == set(range(first))


def test_when_the_source_ends_the_worker_says_what_it_answered(daemon: Daemon, digits, clip):
    camera = Camera.open(daemon, {"path": str(clip), "loop": True})
    worker = serve_digits(daemon, digits)
    camera.attach(1, worker)
    worker.expect(protocol.Result)
    daemon.kill(camera)
    finished = worker.expect(protocol.Finished)
    assert finished.answered == 1 + len(results(worker.unasked))
    worker.send(protocol.Measure(0, 0))
    assert worker.expect(protocol.Measured)


def test_a_ring_that_is_not_what_was_said_is_refused(daemon: Daemon, digits, clip):
    camera = Camera.open(daemon, {"path": str(clip)})
    worker = serve_digits(daemon, digits)
    ours, theirs = protocol.socket_pair()
    o = camera.opened
    wrong = protocol.AttachRing(o.dtype, [o.shape[0] * 2, *o.shape[1:]], o.slots, o.slot_bytes)
    worker.send(wrong, camera.ring, theirs.fileno())
    assert worker.receive().message.reason == Reason.BAD_MESSAGE.value
    ours.close()
    theirs.close()


def test_a_session_that_fails_on_a_frame_ends_its_worker_so_that_the_frame_is_counted(tmp_path):
    path = tmp_path / "dark.avi"
    make_clip(path, 10)  # its first frame is black
    daemon = Daemon(FAKES)
    try:
        worker = daemon.spawn("model")
        assert load(worker, b"fake:cpu", load_message("fake:cpu")).actual == "fake:cpu"
        camera = Camera.open(daemon, {"path": str(path), "policy": "every"})
        ours, theirs = protocol.socket_pair()
        camera.send(protocol.AttachReader(1, "line", True), ours.fileno())
        worker.send(camera.geometry(), camera.ring, theirs.fileno())
        ours.close()
        theirs.close()
        worker.expect(protocol.RingAttached)
        assert worker.receive().message == protocol.Fault(
            "model_unloadable", "fake refuses the dark", "switch the light on"
        )
        assert daemon.wait_exit(worker).status == 1
        assert camera.expect(protocol.Dropped) == protocol.Dropped("line", [0], "worker_lost")
    finally:
        daemon.stop()


def test_what_really_runs_is_reported_not_what_was_asked_for():
    daemon = Daemon(FAKES)
    try:
        worker = daemon.spawn("trial")
        assert load(worker, b"fake:slow", load_message("fake:cpu")).actual == "fake:slow"
    finally:
        daemon.stop()


_AS_NOBODY = """
import os, sys
from agent import memfd
from agent.worker import channel
from agent.worker.delegates import DELEGATES, Options
for name, path in zip(sys.argv[1::2], sys.argv[2::2]):
    data = open(path, "rb").read()
    fd = memfd.of_bytes("model", data)  # root's, as a daemon's would be
    delegate = DELEGATES[name]()
    format = path.rsplit(".", 1)[1]
    delegate.load(fd, format, Options())  # whatever is imported lazily is there now
    if os.fork() == 0:
        os.setgid(65534)
        os.setuid(65534)
        channel.confine(0)
        session = delegate.load(fd, format, Options())
        session.run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, name
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_an_undumpable_process_of_another_user_loads_from_the_daemons_memfd(digits):
    models = [str(digits / "1.0.0" / f"int8.{format}") for format in ("tflite", "onnx")]
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, "litert:xnnpack", models[0], "onnx:cpu", models[1]],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_first_result_comes_soon_after_the_spawn(daemon: Daemon, digits):
    _, picture = cv2.imencode(".png", np.full((64, 64, 3), 128, np.uint8))
    started = time.monotonic()
    worker = serve_digits(daemon, digits)
    assert isinstance(ask(worker, protocol.RunImage(), picture.tobytes()), protocol.Result)
    assert time.monotonic() - started < 3.0  # generous: the machine may be busy
