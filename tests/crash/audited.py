"""Runs `edge-agent` as it is, and notes who opens, creates, renames or removes a file for writing.

    python tests/crash/audited.py REPORT WORDS...

REPORT gets one JSON object a line: what was done, to which path, by which module (`ota.client.fsops` if it is anywhere
among the callers) and through which of its recipes. Python's own audit events tell it, so nothing is replaced.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

FSOPS = "ota.client.fsops"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
RECIPES = ("make_dirs", "write_atomic", "write_at", "flush", "truncate", "remove", "sweep")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def caller(frame: FrameType | None) -> tuple[str, str]:
    """Module and function behind an audit event: fsops and its recipe, else the nearest module of this project."""
    nearest = ("", "")
    while frame is not None:
        module, function = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        if module == FSOPS and function in RECIPES:
            return module, function
        if not nearest[0] and module.partition(".")[0] in ("agent", "ota"):
            nearest = (module, function)
        frame = frame.f_back
    return nearest


def main() -> int:
    """Run the command; returns its exit status."""
    from agent import app

    report = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    sys.argv = ["edge-agent", *sys.argv[2:]]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        if (event == "open" or event in CHANGES) and isinstance(arguments[0], str | bytes | os.PathLike):
            module, function = caller(sys._getframe(1))
            path = os.path.abspath(os.fsdecode(arguments[0]))
            said = {"event": event, "path": path, "module": module, "function": function}
            os.write(report, json.dumps(said).encode() + b"\n")

    sys.addaudithook(note)
    return app.main()


if __name__ == "__main__":
    sys.exit(main())
