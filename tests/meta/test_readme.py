"""Every command that the README shows exists, with the options that it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache

import pytest

from tests.meta.sources import ROOT

COMMANDS = {
    "edge-agent": "import sys; from agent.app import main; sys.exit(main())",
    "edge-ota": "import sys; from agent.app import ota_main; sys.exit(ota_main())",
}


def shown(text: str) -> list[list[str]]:
    """The words of every command line in a fenced block, without prompt, sudo, folder or comment."""
    found = []
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split(" #")[0].removeprefix("$ ").split()
            while words and (words[0] == "sudo" or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
                words = words[1:]
            if words and words[0].split("/")[-1] in (*COMMANDS, "make"):
                found.append([words[0].split("/")[-1], *words[1:]])
    return found


@cache
def help_of(command: str, verb: str) -> str:
    """What `command verb --help` prints. Raises AssertionError when there is no such verb."""
    asked = [sys.executable, "-c", COMMANDS[command], verb, "--help"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} {verb}: {done.stderr}"
    return done.stdout


def check(words: list[str]) -> None:
    command, *rest = words
    if command == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [w for w in rest if "=" not in w and w not in targets] == [], f"make has {targets}"
        return
    assert rest, f"{command} is shown without a verb"
    offered = help_of(command, rest[0])
    for option in (w.split("=")[0] for w in rest if re.match(r"--?[a-z]", w)):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", offered), f"{command} {rest[0]} has no {option}"


def test_every_command_in_the_readme_exists() -> None:
    commands = shown((ROOT / "README.md").read_text())
    assert {words[0] for words in commands} >= {"make", "edge-agent", "edge-ota"}
    for words in commands:
        check(words)


@pytest.mark.parametrize(
    "line",
    ["edge-agent frobnicate", "edge-ota init --no-such-option x", "make nothing", "$ sudo .venv/bin/edge-ota nope"],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (words,) = shown(f"```sh\n{line}\n```\n")
    with pytest.raises(AssertionError):
        check(words)
