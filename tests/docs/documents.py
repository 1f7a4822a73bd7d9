"""The project's documents, the fenced blocks in them, and what a shell block shows of the two commands.

Conventions of the documents: a block `sh` is carried out by the tests as it stands (`world`); one marked `sh device`
changes a real board or needs another machine, so only its commands are checked against the parsers. A block `toml`
stands for the file it describes: agent.toml when it has a [[line]], else spec.toml; a `toml example` is no file of the
guide's own device, and only has to be valid. Other blocks are for reading.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "guides"
REFERENCE = ROOT / "docs" / "reference"
COMMANDS = ("edge-agent", "edge-ota", "make")
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"<<'?(\w+)'?\n.*?^\1$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: where it begins, what its fence says (`sh`, `sh device`, `toml`, …) and its text."""

    path: Path
    line: int
    info: str
    text: str

    @property
    def place(self) -> str:
        """`docs/guides/fleet.md:12`, for messages."""
        return f"{self.path.name}:{self.line}"


def documents() -> list[Path]:
    """Every document a user reads."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("models/*/card.md"))]


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    text = path.read_text()
    return [
        Block(path, text.count("\n", 0, match.start()) + 2, match[1].strip(), match[2])
        for match in _FENCE.finditer(text)
    ]


def shown(script: str) -> list[list[str]]:
    """The words of every `edge-agent`, `edge-ota` and `make` in a shell script, program first, without folder, sudo,
    prompt, comment and redirection."""
    text = _HEREDOC.sub("", script).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        for words in _simple_commands(line.removeprefix("$ ")):
            while words and (words[0] in ("sudo", "until", "while", "if", "!", "do") or "=" in words[0]):
                words = words[3:] if words[:2] == ["sudo", "-u"] else words[1:]
            if words and words[0].split("/")[-1] in COMMANDS:
                found.append([words[0].split("/")[-1], *words[1:]])
    return found


def _simple_commands(line: str) -> Iterator[list[str]]:
    """`line` cut at |, ;, & and redirections; a redirection's file is dropped."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>()")
    lexer.whitespace_split = True
    words: list[str] = []
    skip = False
    for word in lexer:
        if skip:
            skip = False
        elif set(word) <= set("|;&()"):
            yield words
            words = []
        elif set(word) <= set("<>&"):
            skip = True
        else:
            words.append(word)
    yield words
