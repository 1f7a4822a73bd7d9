"""Every shell block of the guides and the README works as it stands, in order, with real processes; what devices then
say has the fields that the reference shows."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.docs.documents import GUIDES, REFERENCE, ROOT, blocks
from tests.docs.listener import Listener, tell
from tests.docs.world import World


def test_the_operators_guide_ends_with_an_update_by_delta(fleet: str) -> None:
    assert "from 1.0.0: " in fleet
    assert "belt-01  parts 1.1.0" in fleet
    logged = [json.loads(line) for line in fleet.splitlines() if line.startswith('{"t"')]
    assert [entry for entry in logged if entry["level"] == "error"] == []
    assert missing("fleet.md", fleet) == set()


def test_the_lifecycle_guide_ends_with_a_device_that_is_gone(lifecycle: str) -> None:
    assert "belt-02 is revoked: no grants, no renewal" in lifecycle
    assert "belt-02  nothing granted  revoked 20" in lifecycle
    assert "state: reset" in lifecycle


def test_the_own_model_guide_ends_with_the_model_serving_on_a_device(own_model: str) -> None:
    assert "label 7" in own_model
    assert "digits 1.0.0 on " in own_model
    assert missing("own-model.md", own_model) == set()


def test_the_sensors_guide_ends_with_a_rule_that_a_replayed_fault_meets(sensors: str) -> None:
    assert "label normal" in sensors
    assert "label anomalous" in sensors
    assert "lasts: shakes" in sensors
    assert missing("sensors.md", sensors) == set()


def test_every_message_in_the_telemetry_reference_has_the_fields_that_a_device_sends(
    own_model: str, heard: Listener, world: World
) -> None:
    tell(world.folder / "repo" / "keys", world.port, "belt-01", {"v": 1, "id": "a", "action": "rollback",
         "line": "nobody", "expires_at": int(time.time()) + 60})  # fmt: skip
    world.shell("kill -SEGV $(edge-agent status --json | python -c "
                "\"import json, sys; print(json.load(sys.stdin)['lines']['digits']['worker_pid'])\")")  # fmt: skip
    shown = [json.loads(block.text) for block in blocks(REFERENCE / "telemetry.md") if block.info == "json"]
    assert len(shown) >= 10
    for example in shown:
        wanted = fields(example)
        heard.first(json.dumps(example)[:200], lambda _, body, wanted=wanted: any(wanted == f for f in parts(body)))


def test_the_status_that_the_guides_show_has_the_lines_of_a_real_one(own_model: str, world: World) -> None:
    printed = labels(world.shell("edge-agent status 2>/dev/null"))
    for name in ("device.md", "field.md"):
        shown = [labels(block.text) for block in blocks(GUIDES / name) if "custody" in block.text]
        assert shown, name
        assert printed <= shown[0] <= printed | {"condition", "last update"}, name


def test_the_technicians_guide_installs_and_rolls_back_without_a_network(field: str) -> None:
    assert "link       waiting" in field
    assert "digits: 1.1.0 committed" in field
    assert "version: 1.0.0\noutcome: rolled_back" in field
    assert missing("field.md", field) == set()


def test_the_readme_does_what_it_says(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    readme = blocks(ROOT / "README.md")
    labels_shown = next(block.text for block in readme if block.info == "toml").split("labels = [")[1].split("]")[0]
    write_classifier(onnx, tmp_path / "model.onnx", labels_shown.count(",") + 1)
    (tmp_path / "picture.png").write_bytes((ROOT / "models/digits/golden/seven.png").read_bytes())
    world = World(tmp_path)
    try:
        printed = world.run([block for block in readme if not block.text.startswith("make")])
    finally:
        world.close()
    assert "signed" in printed


# --- comparing output ------------------------------------------------------------------------------------------------


def missing(guide: str, printed: str) -> set[str]:
    """Lines of output that a guide shows and that were not printed, apart from figures and which delegate won."""
    shown = {
        plain(line) for block in blocks(GUIDES / guide) if block.info == "text" for line in block.text.splitlines()
    }
    assert shown, guide
    return shown - {plain(line) for line in printed.splitlines()}


def plain(line: str) -> str:
    """`line` with every figure as N, every delegate and verdict as a word, and single blanks."""
    line = re.sub(r"\b[a-z]+:(cpu|xnnpack)\b", "DELEGATE", line)
    line = re.sub(r"[█▶]* ?\bfastest\b|[█▶]* ?\b[\d.]+x( slower)?(?=$| )", "VERDICT", line)
    return " ".join(re.sub(r"\d[\d.]*", "N", line).split())


# --- comparing messages ----------------------------------------------------------------------------------------------

# their keys are names of lines, and causes that not every run has
_NAMED = ("lines", "counts", "bytes")


def fields(value: Any, named: bool = False) -> frozenset[str]:
    """Every field below `value` as a dotted path; a list counts as its first element."""
    if isinstance(value, dict):
        paths = ((("*" if named else key), fields(item, key in _NAMED)) for key, item in value.items())
        return frozenset(f"{key}.{path}" for key, below in paths for path in (below or {""}))
    if isinstance(value, list):
        return frozenset(f"[].{path}" for path in fields(value[0])) if value else frozenset()
    return frozenset()


def parts(body: dict[str, Any]) -> list[frozenset[str]]:
    """The fields of a batch, once for each of its records, and of each with one line at a time."""
    body = {key: value for key, value in body.items() if key != "lost"}
    records = next((key for key in ("events", "results", "dropped", "metrics") if key in body), None)
    return [fields(body)] if records is None else [fields({**body, records: [one]}) for one in body[records]]


def labels(status: str) -> set[str]:
    """The words that lines of `edge-agent status` begin with."""
    words = {line.split("  ")[0] for line in status.splitlines() if line[:1].isalpha()}
    return words & {"device", "isolation", "custody", "link", "source", "line", "condition"}


def write_classifier(onnx: Any, path: Path, classes: int) -> None:
    """An ONNX classifier of 16x16 RGB pictures: the mean of each channel, times a matrix."""
    helper = onnx.helper
    weights = [((3 * i + j) % 7 - 3) / 3 for i in range(3) for j in range(classes)]
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "means",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, classes])],
        [helper.make_tensor("w", onnx.TensorProto.FLOAT, [3, classes], weights)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
