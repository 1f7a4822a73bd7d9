"""Folders that are expensive to make and that tests only read: made once for all processes of a test run."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_CLIP = Path(__file__).resolve().parents[1] / "models" / "parts" / "clip.py"


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder `name` that `make` has filled, in this process or in another one of the same run."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # a worker's own folder lies in that of the run
    folder = base / name
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = base / f"{name}.unfinished-{os.getpid()}"
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def belt_clip(factory: pytest.TempPathFactory) -> Path:
    """Two seconds of parts on a belt, 30 frames each."""

    def make(folder: Path) -> None:
        command = [sys.executable, str(_CLIP), str(folder / "clip.avi"), "--seconds", "2", "--fps", "30"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    return once(factory, "clip", make) / "clip.avi"
