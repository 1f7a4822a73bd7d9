"""Every kind of tensor on every delegate: the answers of plain arithmetic, or a refusal in words; nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from agent.errors import ModelError, Reason
from agent.worker.delegates import DELEGATES, Delegate, Options, Session
from tests.contract.delegates import PAIRS, load, over, ovir_of
from tests.contract.graphs import Case, cases, onnx_model
from tests.contract.tflitewriter import Op, T, write

ROOT = Path(__file__).resolve().parents[2]
CASES = {f"{case.name}-{case.format}": case for case in cases()}
REFUSALS = {Reason.MODEL_UNLOADABLE, Reason.MODEL_SHAPE, Reason.DELEGATE_FELL_BACK}
# What 256 + 1 becomes where floats have eight bits of mantissa.
ROUNDED = 256.0


def pairs() -> list[tuple[str, str]]:
    """(case, delegate) of one format; a delegate that takes .ovir gets the ONNX models that way too."""
    return [
        (name, f"{delegate}-{format}")
        for name, case in CASES.items()
        for delegate, format in PAIRS
        if format == case.format or (format, case.format) == ("ovir", "onnx")
    ]


def attempted(delegate: Delegate, data: bytes, format: str) -> Session | ModelError:
    """A session, or why there is none."""
    try:
        return load(delegate, data, format)
    except ModelError as e:
        return e


def filled(session: Session, case: Case) -> list[np.ndarray]:
    """The answers to the case's inputs."""
    for tensor, values in zip(session.tensors, case.inputs, strict=True):
        assert (tensor.shape, tensor.dtype) == (values.shape, values.dtype)
        tensor[...] = values
    return [output.copy() for output in session.run()]


@pytest.mark.parametrize(("case", "where"), pairs())
def test_answers_are_those_of_plain_arithmetic_or_it_is_refused_in_words(case: str, where: str) -> None:
    wanted = CASES[case]
    name, _, format = where.rpartition("-")
    data = ovir_of(wanted.data) if format == "ovir" else wanted.data
    session = attempted(DELEGATES[name](), data, format)
    if isinstance(session, ModelError):
        assert name not in wanted.needed, session
        assert session.reason in REFUSALS
        assert session.hint
        return
    specs = (*session.inputs, *session.outputs)
    assert [spec.shape for spec in specs] == [values.shape for values in (*wanted.inputs, *wanted.outputs)]
    assert [spec.dtype for spec in specs] == [values.dtype.name for values in (*wanted.inputs, *wanted.outputs)]
    for got, want in zip(filled(session, wanted), wanted.outputs, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=1e-5, atol=wanted.atol)


@over()
def test_a_second_run_on_other_numbers_leaves_nothing_of_the_first(subject: tuple[Delegate, str]) -> None:
    delegate, format = subject
    case = CASES[f"two-inputs-two-outputs-{'onnx' if format == 'ovir' else format}"]
    session = load(delegate, ovir_of(case.data) if format == "ovir" else case.data, format)
    first = filled(session, case)
    for tensor in session.tensors:
        tensor[...] = 1
    two, one = session.run()
    np.testing.assert_allclose(two, 2)
    np.testing.assert_allclose(one, 1)
    for before, again in zip(first, filled(session, case), strict=True):
        np.testing.assert_array_equal(before, again)


@over("onnx", "tflite")
def test_an_open_size_that_is_no_batch_is_refused(subject: tuple[Delegate, str]) -> None:
    delegate, format = subject
    if format == "onnx":
        node = helper.make_node("Relu", ["x"], ["y"])
        data = onnx_model([node], [("x", "float32", [1, "W", 3])], [("y", "float32", [1, "W", 3])])
    else:
        tensors = [T("float32", (1, 1, 3), signature=(1, -1, 3)) for _ in range(2)]
        data = write(tensors, [Op("RELU", [0], [1])], [0], [1])
    with pytest.raises(ModelError) as caught:
        load(delegate, data, format)
    assert caught.value.reason in (Reason.MODEL_SHAPE, Reason.MODEL_UNLOADABLE)


@over("tflite")
def test_an_output_with_a_scale_a_channel_is_refused_where_it_would_be_read_wrongly(
    subject: tuple[Delegate, str],
) -> None:
    """One scale and one zero point is all that a tensor spec has; OpenVINO tells no scale at all."""
    delegate, format = subject
    x = T("int8", (1, 2, 2, 3), [0.1])
    y = T("int8", (1, 2, 2, 3), [0.1, 0.2, 0.3], axis=3)
    data = write([x, T("int32", (4,), data=[1, 2, 2, 3]), y], [Op("RESHAPE", [0, 1], [2], "ReshapeOptions")], [0], [2])
    session = attempted(delegate, data, format)
    if isinstance(session, ModelError):
        assert session.reason in REFUSALS
    else:
        assert session.outputs[0].scale is None


_PUBLISHED = """
import sys
from agent import memfd
from agent.errors import ModelError
from agent.worker.delegates import DELEGATES, Options
name, path = sys.argv[1:]
try:
    DELEGATES[name]().load(memfd.of_bytes("model", open(path, "rb").read()), "tflite", Options())
except ModelError as e:
    print(e.reason.value, e.message)
    sys.exit(0 if e.hint else "no hint")
sys.exit("it loaded")
"""


@over("tflite")
def test_a_published_model_with_a_broken_field_is_refused_clearly(
    subject: tuple[Delegate, str], shared_data: Path
) -> None:
    delegate, _ = subject
    command = [
        sys.executable,
        "-c",
        _PUBLISHED,
        delegate.name,
        str(shared_data / "tflite-micro" / "person_detect.tflite"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    reason, _, message = done.stdout.strip().partition(" ")
    assert reason == Reason.MODEL_UNLOADABLE.value
    assert len(message) > len(delegate.runtime)


@over("onnx", "ovir")
def test_floats_are_computed_in_bfloat16_only_where_the_release_allows_it(subject: tuple[Delegate, str]) -> None:
    """A sum that bfloat16 rounds away. Not every runtime or processor has it: then nothing changes."""
    delegate, format = subject
    weights = [("w", np.ones((64, 64), np.float32))]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    data = onnx_model([node], [("x", "float32", (1, 64))], [("y", "float32", (1, 64))], weights)
    data = ovir_of(data) if format == "ovir" else data
    found = []
    for allowed in (False, True):
        session = load(delegate, data, format, Options(bf16=allowed))
        session.tensors[0][...] = 0
        session.tensors[0][0, 0] = 257.0  # nine bits
        found.append(float(session.run()[0][0, 0]))
    assert found[0] == 257.0
    assert found[1] in (257.0, ROUNDED, 258.0)


@pytest.mark.skipif(not any(name == "openvino:cpu" for name, _ in PAIRS), reason="OpenVINO is not installed")
def test_openvino_does_use_bfloat16_where_it_is_allowed_and_the_processor_has_it() -> None:
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no bfloat16")
    weights = [("w", np.ones((64, 64), np.float32))]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    data = onnx_model([node], [("x", "float32", (1, 64))], [("y", "float32", (1, 64))], weights)
    session = load(DELEGATES["openvino:cpu"](), data, "onnx", Options(bf16=True))
    session.tensors[0][...] = 0
    session.tensors[0][0, 0] = 257.0
    assert float(session.run()[0][0, 0]) != 257.0
