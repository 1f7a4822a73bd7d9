"""Fixtures of the whole suite. Anything for one area belongs into that area's conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What takes longest starts first, so that no process is left with it at the end; the rest in the usual order.
SLOWEST_FIRST = ("system", "integration", "docs")


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    order = {name: position for position, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(_folder(item), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For several processes (`pytest -n`): a module stays in one, and so does everything that shares the container."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/system" if nodeid.startswith("tests/system/") else nodeid.partition("::")[0]

    return ByModule(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The published models that lie beside a checkout; a test that needs them skips by name where they are absent."""
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip(f"no published models at {data}")
    return data
