"""What every delegate owes, run over each that can work on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent import memfd, profile
from agent.errors import ModelError, Reason
from agent.worker.delegates import DELEGATES, FORMATS, Delegate, Options, Session
from agent.worker.graph import parse_graph
from agent.worker.images import decode_image
from agent.worker.pipeline import Pipeline
from tests.contract.delegates import DIGITS, MISSING, PAIRS, load, model, over

ROOT = Path(__file__).resolve().parents[2]
GRAPH = parse_graph(
    {"task": "classification", "preprocess": {"color": "gray", "std": [255.0]}, "postprocess": {"kind": "raw"}}
)
# Of a probability: runtimes and CPUs differ by a step or two of 1/256.
STEP = 1 / 256
TOLERANCE = 3 * STEP


# tflite-runtime 2.14 trusts every offset in a file: half a model may kill it. One reason for parsing in workers alone.
CHECKS_NOTHING = {"tflite:cpu"}
_LOAD = """
import sys
from agent import memfd
from agent.errors import ModelError
from agent.worker.delegates import DELEGATES, Options
name, format, path = sys.argv[1:]
try:
    DELEGATES[name]().load(memfd.of_bytes("model", open(path, "rb").read()), format, Options())
except ModelError as e:
    sys.exit(0 if e.reason.value == "model_unloadable" else str(e))
sys.exit("it loaded")
"""

every_delegate = over()
every_onnx_delegate = over("onnx")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [decode_image((DIGITS / "golden" / f"{name}.png").read_bytes()) for name in ("seven", "three", "eight")]


def answers(session: Session, frames: list[np.ndarray]) -> list[np.ndarray]:
    pipeline = Pipeline(session, GRAPH, (), ())
    spec = pipeline.outputs[0]
    found = []
    for frame in frames:
        values = pipeline.outputs_of_image(frame)[0].reshape(-1)
        # OpenVINO keeps the int8 tensors of a TFLite model but does not tell their scale.
        quantized = values.dtype == np.int8 and not spec.quantized
        found.append((values.astype(np.float32) + 128) / 256 if quantized else spec.real(values))
    return found


def image_ready(delegate: Delegate, session: Session) -> bool:
    return session.inputs[0].quantized or session.inputs[0].dtype == "float32"


def test_at_least_the_runtimes_of_the_development_extra_are_here():
    # tflite-runtime lives in an environment of its own, with the numpy that it was built for
    old = np.__version__.startswith("1.")
    wanted = {"tflite:cpu"} if old else {"litert:xnnpack", "litert:cpu", "onnx:cpu"}
    assert {"reference", *wanted} <= {name for name, _ in PAIRS}


@pytest.mark.parametrize("name", MISSING)
def test_a_runtime_that_is_not_here_says_how_to_get_it(name):
    with pytest.raises(ModelError) as caught:
        DELEGATES[name]()
    assert caught.value.reason is Reason.RUNTIME_MISSING
    hint = caught.value.hint
    assert "pip install 'edge-runtime-agent[" in hint or hint.startswith("it comes with ")


def test_the_daemon_knows_the_same_delegates_and_formats():
    assert {name: set(formats) for name, formats in FORMATS.items()} == {
        name: set(formats) for name, formats in profile.DELEGATES.items()
    }


@every_delegate
def test_it_says_what_it_is(subject):
    delegate, format = subject
    assert delegate.formats == frozenset(FORMATS[delegate.name])
    assert format in delegate.formats
    assert delegate.runtime.split()[1][0].isdigit()


@every_delegate
def test_a_session_tells_its_tensors_and_offers_buffers_of_that_kind(subject):
    delegate, format = subject
    session = load(delegate, model(format), format)
    (spec,) = session.inputs
    assert sorted(spec.shape) == [1, 1, 8, 8]
    (tensor,) = session.tensors
    assert (tensor.shape, tensor.dtype.name, tensor.flags.c_contiguous) == (spec.shape, spec.dtype, True)
    assert session.outputs[0].shape == (1, 10)
    assert session.actual == delegate.name
    assert 0 < session.coverage <= 1


@every_delegate
def test_all_delegates_answer_alike(subject, pictures):
    delegate, format = subject
    session = load(delegate, model(format), format)
    if image_ready(delegate, session):
        found = answers(session, pictures)
    else:
        found = []
        for frame in pictures:  # pixel - 128, as the model card of the other runtimes says
            session.tensors[0].reshape(8, 8)[...] = (frame[:, :, 0].astype(np.int16) - 128).astype(np.int8)
            found.append((session.run()[0].reshape(-1).astype(np.float32) + 128) / 256)
    reference = answers(load(DELEGATES["reference"](), model("tflite"), "tflite"), pictures)
    for got, want in zip(found, reference, strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE)


@every_delegate
def test_the_same_input_gives_the_same_output_twice(subject):
    delegate, format = subject
    session = load(delegate, model(format), format)
    session.tensors[0][...] = np.arange(64).reshape(session.tensors[0].shape)
    first = [output.copy() for output in session.run()]
    session.tensors[0][...] = 0
    session.run()
    session.tensors[0][...] = np.arange(64).reshape(session.tensors[0].shape)
    for before, after in zip(first, session.run(), strict=True):
        np.testing.assert_array_equal(before, after)


@every_delegate
def test_two_sessions_do_not_share_buffers(subject):
    delegate, format = subject
    first, second = load(delegate, model(format), format), load(delegate, model(format, "1.1.0"), format)
    first.tensors[0][...] = 100
    second.tensors[0][...] = 0
    before = [output.copy() for output in first.run()]
    second.run()
    for one, two in zip(before, first.run(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.shares_memory(first.tensors[0], second.tensors[0])


@every_delegate
def test_a_memfd_that_could_still_change_is_refused(subject):
    delegate, format = subject
    data = model(format)
    fd = memfd.create("model", len(data))
    os.pwrite(fd, data, 0)
    with pytest.raises(ModelError) as caught:
        delegate.load(fd, format, Options())
    os.close(fd)
    assert caught.value.reason is Reason.BAD_MESSAGE


@every_delegate
@pytest.mark.parametrize("damage", ["empty", "text", "zeros", "half", "other format"])
def test_bytes_that_are_no_model_are_a_refusal_in_one_line(subject, damage, tmp_path):
    delegate, format = subject
    other = "onnx" if format != "onnx" else "tflite"
    data = {
        "empty": b"",
        "text": b"this is no model at all" * 10,
        "zeros": bytes(4096),
        "half": model(format)[: len(model(format)) // 2],
        "other format": model(other),
    }[damage]
    if delegate.name in CHECKS_NOTHING:
        (tmp_path / "model").write_bytes(data)
        command = [sys.executable, "-c", _LOAD, delegate.name, format, str(tmp_path / "model")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in (0, -signal.SIGSEGV, -signal.SIGABRT), done.stderr
        return
    with pytest.raises(ModelError) as caught:
        load(delegate, data, format)
    assert caught.value.reason is Reason.MODEL_UNLOADABLE
    assert "\n" not in caught.value.message
    assert caught.value.hint


# --- ONNX alone ------------------------------------------------------------------------------------------------------


def with_external_data(location: str, where: str) -> bytes:
    """A model that adds a constant it keeps in another file."""
    tensor = numpy_helper.from_array(np.ones((1, 4), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    add = helper.make_node("Add", ["x", "w"], ["y"])
    opset = [helper.make_opsetid("", 17)]
    if where == "initializer":
        return helper.make_model(
            helper.make_graph([add], "g", [x], [y], [tensor]), opset_imports=opset, ir_version=9
        ).SerializeToString()
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    if where == "constant":
        graph = helper.make_graph([constant, add], "g", [x], [y])
    else:
        out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [1, 4])
        branch = helper.make_graph([constant, helper.make_node("Identity", ["w"], ["o"])], "b", [], [out])
        condition = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.asarray(True), "t"))
        choice = helper.make_node("If", ["c"], ["w2"], then_branch=branch, else_branch=branch)
        graph = helper.make_graph([condition, choice, helper.make_node("Add", ["x", "w2"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


@every_onnx_delegate
@pytest.mark.fault("F70")
@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/proc/self/environ", "3"])
@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
def test_weights_in_another_file_are_refused_wherever_they_are_mentioned(
    subject, tmp_path, monkeypatch, location, where
):
    delegate, format = subject
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for path in (tmp_path / "weights.bin", tmp_path / "cwd" / "weights.bin"):
        path.write_bytes(np.full(4, 7, np.float32).tobytes())
    with pytest.raises(ModelError) as caught:
        load(delegate, with_external_data(location, where), format)
    assert caught.value.reason is Reason.MODEL_UNLOADABLE
    assert "other files" in caught.value.message


@every_onnx_delegate
@pytest.mark.fault("F70")
def test_a_field_number_beyond_32_bits_hides_no_weights_in_another_file(subject):
    """Runtimes drop what is above 32 bits of a tag, and then find the fields that name a file."""

    def piece(tag, content):
        return tag + bytes([len(content) & 127 | 128, len(content) >> 7]) + content

    delegate, format = subject
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4]).SerializeToString()
    weights += piece(b"\xea\x80\x80\x80\x10", b"\n\x08location\x12\x013") + b"\xf0\x80\x80\x80\x10\x01"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y]).SerializeToString()
    made = helper.make_model(onnx.GraphProto(), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    made.ClearField("graph")
    with pytest.raises(ModelError) as caught:
        load(delegate, made.SerializeToString() + piece(b"\x3a", graph + piece(b"\x2a", weights)), format)
    assert caught.value.reason is Reason.MODEL_UNLOADABLE
    assert "not a whole ONNX model" in caught.value.message


@every_onnx_delegate
@pytest.mark.fault("F70")
@pytest.mark.parametrize("embedded", [0, 1])
def test_a_node_that_a_provider_compiled_elsewhere_is_refused_before_it_names_a_file(subject, embedded):
    delegate, format = subject
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    named = {"embed_mode": embedded, "ep_cache_context": "../../../etc/passwd", "source": "OpenVINOExecutionProvider"}
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", main_context=1, **named)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=9)
    with pytest.raises(ModelError) as caught:
        load(delegate, made.SerializeToString(), format)
    assert caught.value.reason is Reason.MODEL_UNLOADABLE
    assert "names other files" in caught.value.message


@every_onnx_delegate
def test_an_open_batch_is_one_and_another_open_size_is_refused(subject):
    delegate, format = subject

    def relu(shape):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(made)
        return made.SerializeToString()

    session = load(delegate, relu(["N", 3]), format)
    assert session.inputs[0].shape == session.outputs[0].shape == (1, 3)
    session.tensors[0][...] = [[-1, 0, 2]]
    np.testing.assert_array_equal(session.run()[0], [[0, 0, 2]])
    with pytest.raises(ModelError) as caught:
        load(delegate, relu([1, "W"]), format)
    assert caught.value.reason is Reason.MODEL_SHAPE


@every_onnx_delegate
def test_floats_stay_float32(subject):
    """A sum that bfloat16 would round away: 256 + 1 in a product of matrices."""
    delegate, format = subject
    weights = numpy_helper.from_array(np.ones((2, 1), np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = load(delegate, made.SerializeToString(), format)
    session.tensors[0][...] = [[256.0, 1.0]]
    assert session.run()[0].item() == 257.0


# --- against each other on a published model -------------------------------------------------------------------------


def test_the_float_and_the_int8_network_agree_on_the_published_pictures(shared_data):
    graph = parse_graph({"task": "raw", "preprocess": {"std": [255.0]}})
    names = ("person.png", "no_person.png")
    frames = [decode_image((shared_data / "tflite-micro" / name).read_bytes()) for name in names]
    delegate = DELEGATES[next(name for name, format in PAIRS if format == "tflite")]()
    found = []
    for name in ("vww_96_int8.tflite", "vww_96_float.tflite"):
        session = load(delegate, (shared_data / "mlperf-tiny" / name).read_bytes(), "tflite")
        pipeline = Pipeline(session, graph, (), ())
        found.append([pipeline.outputs[0].real(pipeline.outputs_of_image(f)[0]).reshape(-1).copy() for f in frames])
    for int8, float32 in zip(*found, strict=True):
        np.testing.assert_allclose(int8, float32, atol=0.15)
        assert int8.argmax() == float32.argmax()
