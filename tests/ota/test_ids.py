"""Ids that become paths, topics or questions to a database are checked at the boundary, and nowhere is a text put
together that a file system or a database would read otherwise."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.daemon.topics import Topics
from agent.errors import AgentError
from ota import blocks
from ota.client.transports import layout
from ota.client.transports.directory import DirectoryTransport
from ota.errors import OtaError, PublishError, Reason
from ota.publisher.create import create
from ota.publisher.repository import Repository, check_device, check_line
from tests.meta.sources import modules

HOSTILE = [
    *("", ".", "..", "../secret", "../../etc/passwd", "/etc/passwd", "a/../../secret", "cam 1", "cam\n1", "cam\0"),
    *("CAM", "cäm", "-cam", "cam;rm", "'; DROP TABLE devices; --", "%2e%2e", "cam\\..", "#", "+", "$SYS"),
    *("\x1b[31m", "cam\u202e", "~", "*"),
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("publisher")
    (folder / "secret").write_bytes(b"secret")
    (folder / "secret.json").write_bytes(b"secret")
    return create(folder / "repository")


def _names(below: Path) -> set[str]:
    return {str(path.relative_to(below)) for path in below.rglob("*")}


@pytest.mark.fault("F95")
@pytest.mark.parametrize("name", [*HOSTILE, "cam.json", "a" * 49])
def test_an_id_out_of_the_grammar_never_becomes_a_path_of_the_publisher(repository: Repository, name: str) -> None:
    before = _names(repository.path.parent)
    with pytest.raises(PublishError) as refusal:
        repository.device_path(name)
    assert refusal.value.reason is Reason.UNKNOWN_DEVICE
    for check in (check_device, check_line):
        with pytest.raises(PublishError) as refusal:
            check(name)
        assert refusal.value.hint
        assert refusal.value.message.isprintable()
    assert repository.read_desired(name) is None
    assert repository.read_metadata(f"release-{name}", 1) is None
    assert repository.read_target(name, "a" * 64) is None
    assert repository.open_payload(name) is None
    assert _names(repository.path.parent) == before


@pytest.mark.fault("F95")
@pytest.mark.parametrize("name", HOSTILE)
def test_an_id_out_of_the_grammar_never_becomes_a_path_of_a_device(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    places: list[Callable[[], object]] = [
        lambda: layout.metadata_place(f"release-{name}", 1),
        lambda: layout.desired_place(name),
        lambda: layout.target_place(name, "a" * 64),
        lambda: layout.payload_place(name),
        lambda: DirectoryTransport(tmp_path / "root", name),
        lambda: asyncio.run(DirectoryTransport(tmp_path / "root", "cam-1").target(name, "a" * 64, 100)),
        lambda: blocks.parse_request(blocks.Request(1, blocks.Target(name, "a" * 64), 0, 1, 1).encode()),
        lambda: blocks.parse_request(blocks.Request(1, blocks.Blob(name), 0, 1, None).encode()),
        lambda: blocks.parse_request(blocks.Request(1, blocks.Metadata(f"release-{name}", 1), 0, 1, 1).encode()),
    ]
    for place in places:
        with pytest.raises(OtaError) as refusal:
            place()
        assert refusal.value.reason in (Reason.BAD_TARGET_NAME, Reason.BAD_JSON)
        assert refusal.value.message.isprintable()
    with pytest.raises(AgentError):
        Topics("edge", name)


def test_no_question_to_a_database_is_put_together_from_text() -> None:
    """Every statement is a constant; values are parameters."""
    wrong = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in ("execute", "executemany", "executescript") or not node.args:
                continue
            if not isinstance(node.args[0], ast.Constant | ast.Name):
                wrong.append(f"{name}: {ast.unparse(node)}")
    assert not wrong
