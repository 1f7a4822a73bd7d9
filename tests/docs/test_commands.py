"""Every command that a document shows exists, and its options and arguments are ones that it takes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from agent import cli as agent_cli
from agent.errors import AgentError
from ota.errors import OtaError
from ota.publisher import cli as ota_cli
from tests.docs.documents import ROOT, blocks, documents, shown

PARSERS = {"edge-agent": agent_cli._parser, "edge-ota": ota_cli._parser}


def check(words: list[str]) -> None:
    """Raise AssertionError unless the command `words` is one that exists."""
    command, *rest = words
    if command == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in rest if "=" not in word and word not in targets] == [], f"make has {targets}"
        return
    parser: argparse.ArgumentParser = PARSERS[command]()
    try:
        parsed = parser.parse_args(rest)
    except (AgentError, OtaError) as e:
        raise AssertionError(f"{' '.join(words)}: {e}") from e
    assert hasattr(parsed, "verb"), f"{command} is shown without a verb"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_in_a_document_exists(path: Path) -> None:
    for block in blocks(path):
        if block.info.split(" ")[0] == "sh":
            for words in shown(block.text):
                check(words)


def test_the_readme_shows_how_to_set_up_and_both_commands() -> None:
    found = {words[0] for block in blocks(ROOT / "README.md") for words in shown(block.text)}
    assert found >= {"make", "edge-agent", "edge-ota"}


@pytest.mark.parametrize(
    "line",
    [
        "edge-agent frobnicate",
        "edge-ota init --no-such-option x repo",
        "edge-agent infer model.onnx",
        "make nothing",
        "$ sudo .venv/bin/edge-ota nope",
        "sudo -u edge-agent edge-agent enroll --gadget x >request.json",
        "until edge-agent status --jsn | grep idle; do sleep 1; done",
        "{ true; sed x; } | edge-ota show repo parts",
        "edge-agent",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (words,) = shown(line)
    with pytest.raises(AssertionError):
        check(words)


def test_only_commands_are_taken_for_commands() -> None:
    linked = "sudo ln -s /opt/edge-agent/bin/edge-agent /bin/\n"
    written = "cat >x <<'END'\nedge-agent frobnicate\nEND\n"
    assert shown(f"{linked}{written}edge-ota devices repo\n") == [["edge-ota", "devices", "repo"]]
