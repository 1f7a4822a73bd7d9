"""ONNX Runtime's providers beside the CPU's: the CPU is forbidden, and where nodes ran is read, not believed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from agent import memfd
from agent.errors import ModelError, Reason
from agent.worker.delegates import DELEGATES
from agent.worker.delegates.onnxruntime import CPU, PROVIDERS, share
from tests.contract.delegates import PAIRS, load, model

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
HERE = [name for name, format in PAIRS if name in PROVIDERS and name != CPU]
ABSENT = [name for name in PROVIDERS if name not in HERE and name != CPU]
every_provider = pytest.mark.parametrize(
    "name",
    HERE or [pytest.param("", marks=pytest.mark.skip(reason=f"this onnxruntime has none of {', '.join(ABSENT)}"))],
)


@every_provider
def test_a_model_that_fits_runs_on_the_provider_alone(name: str) -> None:
    session = load(DELEGATES[name](), model("onnx"), "onnx")
    assert (session.actual, session.coverage) == (name, 1.0)


@every_provider
def test_a_node_that_only_the_cpu_has_is_an_error_and_not_quietly_run_there(name: str) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node(
            "LabelEncoder", ["r"], ["y"], domain="ai.onnx.ml", keys_floats=[0.0, 1.0], values_floats=[5.0, 6.0]
        ),
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    data = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets, ir_version=9)
    with pytest.raises(ModelError) as caught:
        load(DELEGATES[name](), data.SerializeToString(), "onnx")
    assert caught.value.reason is Reason.DELEGATE_FELL_BACK
    session = load(DELEGATES[CPU](), data.SerializeToString(), "onnx")
    session.tensors[0][...] = [[-1, 0, 1, 1]]
    np.testing.assert_array_equal(session.run()[0], [[5, 5, 6, 6]])


@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_provider_names_the_wheel_that_has_it(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        DELEGATES[name]()
    assert caught.value.reason is Reason.RUNTIME_MISSING
    assert PROVIDERS[name].name in caught.value.message
    assert PROVIDERS[name].distribution in caught.value.hint


def profile(tmp_path: Path) -> str:
    """What ONNX Runtime itself writes of one run on the CPU."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.enable_profiling, settings.profile_file_prefix = True, str(tmp_path / "run")
    fd = memfd.of_bytes("model", model("onnx"))
    session = onnxruntime.InferenceSession(f"/proc/self/fd/{fd}", settings, ["CPUExecutionProvider"])
    (arg,) = session.get_inputs()
    session.run(None, {arg.name: np.zeros([1, *arg.shape[1:]], np.float32)})
    return str(session.end_profiling())


def test_the_share_of_a_real_profile_is_that_of_the_provider_that_ran(tmp_path: Path) -> None:
    path = profile(tmp_path)
    assert share(path, "CPUExecutionProvider") == 1.0
    assert share(path, "CUDAExecutionProvider") == 0.0


def test_each_node_counts_once_however_often_it_ran(tmp_path: Path) -> None:
    events = [
        {"cat": "Node", "name": name, "args": {"provider": provider}}
        for name, provider in [("a", "X"), ("a", "X"), ("a", "X"), ("b", "X"), ("c", "CPU"), ("d", "CPU")]
    ]
    events += [{"cat": "Session", "name": "model_run", "args": {}}, {"cat": "Node", "name": "fence", "args": {}}]
    (tmp_path / "p.json").write_text(json.dumps(events))
    assert share(str(tmp_path / "p.json"), "X") == 0.5


@pytest.mark.parametrize("text", ["", "no json", "{}", '[{"cat": "Node", "args": 3}]', "[[]]", '{"a": 1}'])
def test_a_profile_that_says_nothing_is_no_proof(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    try:
        found = share(str(tmp_path / "p.json"), "X")
    except ModelError as e:
        found = 0.0 if e.reason is Reason.MODEL_UNLOADABLE else 1.0
    assert found == 0.0
