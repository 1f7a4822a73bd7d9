#!/usr/bin/env python3
"""Write cli.md from the parsers of both commands: `python docs/reference/make_cli.py > docs/reference/cli.md`.

A test compares the file with what this prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent import cli as agent_cli
from agent.config import DEFAULT_PATH
from agent.errors import Reason as AgentReason
from agent.errors import exit_code as agent_exit_code
from ota.errors import Reason as OtaReason
from ota.errors import exit_code as ota_exit_code
from ota.publisher import cli as ota_cli

HEAD = """\
# Commands

Made by `docs/reference/make_cli.py` from the parsers; a test keeps it current.

Results go to stdout, everything else to stderr. An error is a line `error:`, mostly a line `hint:`, and the exit code
of its [reason](reasons.md). Every verb takes `--help` and `--json`, which prints what a program can read, errors
included.
"""
SHARED = {
    "edge-agent": "`--config FILE`, for every verb but `bench` and `infer`: agent.toml (default: `{config}`).",
    "edge-ota": "`REPO`: the directory of the repository.",
}
"""What nearly every verb of a command takes, told once."""
TOLD_ONCE = ("json", "config", "repository")
EXIT_CODES = {
    0: "done",
    64: "the command line is wrong",
    65: "input that cannot be used: a file, a picture, a request",
    66: "something named is not there",
    69: "a service, runtime or worker cannot be reached",
    70: "a model or a process failed",
    73: "a file or socket cannot be written",
    74: "the disk fails, is full, or holds damaged state",
    75: "try again later",
    77: "refused: not trusted, not allowed, or unfit",
    78: "the configuration or the enrolment is wrong",
    130: "interrupted from the keyboard",
}
"""Both commands'; those of <sysexits.h> mean what they mean there."""


def verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Name, help and parser of every verb."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield choice.dest, choice.help or "", action.choices[choice.dest]


def used_exit_codes() -> set[int]:
    """Every exit code that a reason leads to."""
    return {agent_exit_code(r) for r in AgentReason} | {ota_exit_code(r) for r in OtaReason}


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return [a for a in actions if not a.option_strings] + [a for a in actions if a.option_strings]


def _name(action: argparse.Action) -> str:
    """`--from MODEL`, `LINE VERSION`, `check|example`."""
    value = ""
    if action.nargs != 0:
        choices = "|".join(map(str, action.choices or ()))
        value = str(action.metavar) if action.metavar is not None else choices or action.dest.upper()
    return " ".join(filter(None, [*action.option_strings[-1:], value]))


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    words = [name]
    groups = {id(action): group for group in parser._mutually_exclusive_groups for action in group._group_actions}
    for action in _arguments(parser):
        if action.dest in ("json", "config"):
            continue
        group = groups.get(id(action))
        if group is not None:
            if action is group._group_actions[0]:
                word = " | ".join(_name(member) for member in group._group_actions)
                words.append(f"({word})" if group.required else f"[{word}]")
            continue
        word = _name(action) + (" …" if action.nargs in ("*", "+") else "")
        optional = not action.required if action.option_strings else action.nargs == "*"
        words.append(f"[{word}]" if optional else word)
    return " ".join(words)


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": ""}
    shown = isinstance(action.default, (str, int)) and not isinstance(action.default, bool)
    if shown and action.default != argparse.SUPPRESS and "default" not in text:
        text = f"{text} (default: {action.default})".strip()
    return text


def _section(name: str, text: str, parser: argparse.ArgumentParser) -> str:
    rows = [
        f"- `{_name(action)}`: {_meaning(action)}\n"
        for action in _arguments(parser)
        if _meaning(action) and action.dest not in TOLD_ONCE
    ]
    listed = "".join(["\n", *rows]) if rows else ""
    return f"\n### {name}\n\n{text[:1].upper() + text[1:].rstrip('.')}.\n\n    {_usage(name, parser)}\n{listed}"


def document() -> str:
    """The text of cli.md."""
    parts = [HEAD]
    for parser in (agent_cli._parser(), ota_cli._parser()):
        shared = SHARED[parser.prog].format(config=DEFAULT_PATH)
        parts.append(f"\n## {parser.prog}\n\n{parser.description}\n\n{shared}\n")
        parts += [_section(f"{parser.prog} {name}", text, verb) for name, text, verb in verbs(parser)]
    rows = [f"| {code} | {EXIT_CODES[code]} |" for code in sorted({0, 64, 130} | used_exit_codes())]
    parts.append("\n".join(["\n## Exit codes", "", "| code | meaning |", "|---|---|", *rows, ""]))
    return "".join(parts)


if __name__ == "__main__":
    print(document(), end="")
