"""A recording through the real processes: source, ring, features, the shipped autoencoder, score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from workerdriver import ROOT, Camera, Daemon, ask, load, load_message

from agent import protocol
from agent.errors import AgentError, Reason
from agent.worker.windowfile import decode_frame, encode_window
from models.vibration import machine
from ota.publisher import spec

LINE = ROOT / "models" / "vibration"
VERSION = "1.1.0"
WINDOWS = 5
# a machine of the validation part, at full severity: what the end-to-end test asks is whether the chain is whole
UNIT = 1003


def graph() -> dict[str, Any]:
    return dict(spec.load(LINE / VERSION / "spec.toml").graph)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Healthy windows, then as many with a broken inner race, as a CSV."""
    unit = machine.machine(UNIT)
    parts = [
        machine.record(unit, machine.State(0.8, fault, 3.0), seed)
        for fault in (machine.HEALTHY, "inner_race")
        for seed in range(WINDOWS)
    ]
    path = tmp_path_factory.mktemp("recording") / "pump.csv"
    np.savetxt(path, np.concatenate(parts), "%.4f", delimiter=",", header="x,y,z", comments="")
    return path


def replay(path: Path) -> dict[str, Any]:
    return {"path": str(path), "columns": ["x", "y", "z"], "rate_hz": 3200.0, "window": 1024, "policy": "every"}


@pytest.mark.parametrize(
    ("component", "delegate"), [("int8.tflite", "litert:xnnpack"), ("int8.onnx", "onnx:cpu")], ids=["litert", "onnx"]
)
def test_a_fault_in_a_replayed_recording_raises_the_score_over_the_threshold(
    daemon: Daemon, recording: Path, component: str, delegate: str
) -> None:
    camera = Camera.open(daemon, replay(recording), "csv")
    assert (camera.opened.dtype, camera.opened.shape, camera.opened.fps) == ("float32", [1024, 3], 3.125)
    model = daemon.spawn("model")
    loaded = load(model, (LINE / VERSION / component).read_bytes(), load_message(delegate, graph()))
    assert isinstance(loaded, protocol.ModelLoaded), loaded
    camera.attach(1, model)
    items = [model.expect(protocol.Result).items for _ in range(2 * WINDOWS)]
    assert all(len(found) == 1 for found in items)
    scores = [found[0] for found in items]
    threshold = graph()["postprocess"]["threshold"]
    assert [answer["threshold"] for answer in scores] == [pytest.approx(threshold)] * len(scores)
    assert [answer["label"] for answer in scores] == ["normal"] * WINDOWS + ["anomalous"] * WINDOWS
    assert max(a["score"] for a in scores[:WINDOWS]) < threshold <= min(a["score"] for a in scores[WINDOWS:])


def test_a_window_in_a_file_is_answered_like_one_of_the_source(daemon: Daemon) -> None:
    model = daemon.spawn("model")
    data = (LINE / VERSION / "int8.tflite").read_bytes()
    assert isinstance(load(model, data, load_message("litert:xnnpack", graph())), protocol.ModelLoaded)
    scores = {}
    for name in ("healthy", "inner_race"):
        answer = ask(model, protocol.RunImage(), (LINE / "golden" / f"{name}.npy").read_bytes())
        scores[name] = answer.items[0]
    assert {name: answer["label"] for name, answer in scores.items()} == {
        "healthy": "normal",
        "inner_race": "anomalous",
    }


def test_a_source_of_other_windows_than_the_release_wants_is_refused_with_what_to_set(
    daemon: Daemon, recording: Path
) -> None:
    camera = Camera.open(daemon, {**replay(recording), "window": 512}, "csv")
    model = daemon.spawn("model")
    data = (LINE / VERSION / "int8.tflite").read_bytes()
    load(model, data, load_message("litert:xnnpack", graph()))
    ours, theirs = protocol.socket_pair()
    with ours, theirs:
        camera.send(protocol.AttachReader(1, "line", True), ours.fileno())
        model.send(camera.geometry(), camera.ring, theirs.fileno())
        packet = model.receive()
    assert packet is not None
    assert isinstance(packet.message, protocol.Fault)
    assert packet.message.reason == "model_shape"
    assert "window = 1024" in packet.message.hint


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([np.float32, np.float64]))
def test_a_window_comes_out_of_its_file_as_it_went_in(samples: int, channels: int, dtype: type) -> None:
    window = np.random.default_rng(samples).standard_normal((samples, channels)).astype(dtype)
    found = decode_frame(encode_window(window))
    assert found.dtype == np.float32
    assert np.array_equal(found, window.astype(np.float32))


def saved(array: Any, **given: Any) -> bytes:
    import io

    out = io.BytesIO()
    np.save(out, array, **given)
    return out.getvalue()


def headed(header: str, data: bytes = b"") -> bytes:
    """A file of version 1.0 with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2), }", bytes(16)),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (True, True), }", bytes(4)),
        headed("{'descr': (), 'fortran_order': False, 'shape': (1, 1), }", bytes(4)),
        headed("("),
        headed("-" * 9000 + "1"),
        saved(np.full((2, 2), 1e300)),
        saved(np.zeros(4, np.float32)),
        saved(np.zeros((2, 2), np.int16)),
        saved(np.zeros((0, 2), np.float32)),
        saved(np.asfortranarray(np.zeros((3, 2), np.float32))),
        saved(np.array([[1, np.nan]], np.float32)),
        saved(np.array([[{}]], object), allow_pickle=True),
        saved(np.zeros((2, 2), np.float32))[:-1],
        saved(np.zeros((2, 2), np.float32)) + b"x",
        saved(np.zeros((2, 2), np.float32)).replace(b"(2, 2)", b"(9, 9)"),
        b"\x93NUMPY\x02\x00" + saved(np.zeros((2, 2), np.float32))[8:],
        b"\x93NUMPY\x01\x00\xff\xff",
    ],
)
def test_what_is_no_window_is_refused_as_no_picture_is(data: bytes) -> None:
    with pytest.raises(AgentError) as refused:
        decode_frame(data)
    assert refused.value.reason is Reason.IMAGE_UNREADABLE
