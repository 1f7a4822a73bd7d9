"""Fixtures of the whole suite. Anything for one area belongs into that area's conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The published models that lie beside a checkout; a test that needs them skips by name where they are absent."""
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip(f"no published models at {data}")
    return data
