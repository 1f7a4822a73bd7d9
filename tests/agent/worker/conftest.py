"""A real host with real workers, and small clips, for the tests of the unprivileged side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The suite imports by file; this makes the synchronous daemon importable by its own name.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from workerdriver import ROOT, Daemon, make_clip


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon's end with a host that runs; everything it started is gone afterwards."""
    daemon = Daemon()
    yield daemon
    daemon.stop()


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 numbered frames of 160x120 at 100 frames a second."""
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.avi", 200, fps=100.0)


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of the committed bad models."""
    return ROOT / "tests" / "vectors"


@pytest.fixture(scope="session")
def digits() -> Path:
    """A small classifier that this project trained, in two formats."""
    return ROOT / "models" / "digits"
