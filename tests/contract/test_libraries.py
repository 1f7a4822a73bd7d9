"""There is no way to name a library: not in a model, not in a release, not in the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from agent import config, memfd
from agent.errors import ConfigError, ModelError, Reason
from agent.worker.delegates import DELEGATES, Options


def onnx_delegates() -> list[str]:
    found = []
    for name, make in DELEGATES.items():
        try:
            found += [name] if "onnx" in make().formats else []
        except ModelError:
            pass  # not installed here
    return found


def with_foreign_operator(domain: str) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    node = helper.make_node("Own", ["x"], ["y"], domain=domain, library="/tmp/own.so")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    graph = helper.make_graph([node], "g", [x], [y])
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


@pytest.mark.fault("F71")
@pytest.mark.parametrize("delegate", onnx_delegates())
@pytest.mark.parametrize("domain", ["com.example", "ai.onnx.contrib", "../own.so"])
def test_a_model_with_an_operator_of_its_own_is_refused_and_nothing_is_looked_for(
    delegate: str, domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fd = memfd.of_bytes("model", with_foreign_operator(domain))
    with pytest.raises(ModelError) as refusal:
        DELEGATES[delegate]().load(fd, "onnx", Options())
    assert refusal.value.reason is Reason.MODEL_UNLOADABLE
    maps = Path("/proc/self/maps").read_text()
    assert "own.so" not in maps


@pytest.mark.fault("F71")
@pytest.mark.parametrize(
    "name", ["/tmp/libedgetpu.so", "litert:/tmp/own.so", "../own", "litert:xnnpack;/tmp/own.so", ""]
)
def test_delegates_in_the_configuration_are_a_closed_list(name: str) -> None:
    table = {
        "source": [{"name": "front", "kind": "video", "path": "/a.mp4"}],
        "line": [{"name": "parts", "source": "front", "delegates": [name]}],
    }
    with pytest.raises(ConfigError) as refusal:
        config.parse(table, Path("/etc/edge-agent/agent.toml"))
    assert refusal.value.reason is Reason.BAD_CONFIG
    assert refusal.value.hint


@pytest.mark.fault("F71")
@pytest.mark.parametrize("key", ["library", "delegate_path", "custom_ops", "providers", "plugin"])
def test_the_configuration_has_no_key_for_a_library(key: str) -> None:
    table = {
        "source": [{"name": "front", "kind": "video", "path": "/a.mp4"}],
        "line": [{"name": "parts", "source": "front", key: "/tmp/own.so"}],
    }
    with pytest.raises(ConfigError) as refusal:
        config.parse(table, Path("/etc/edge-agent/agent.toml"))
    assert refusal.value.reason is Reason.BAD_CONFIG
