"""The fake delegates of this folder, found by the names of their files; see `tests/fakes/delegates.py`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent


def modules() -> list[ModuleType]:
    """Every module with fakes."""
    names = ["delegates", "external", *sorted(path.stem for path in FOLDER.glob("blind_*.py"))]
    return [importlib.import_module(f"tests.fakes.{name}") for name in names]


def fakes() -> Mapping[str, Any]:
    """Loaders by delegate name."""
    return {name: load for module in modules() for name, load in module.FAKES.items()}


def expected() -> Mapping[str, Any]:
    """What a trial must say, by delegate name."""
    return {name: outcome for module in modules() for name, outcome in module.EXPECTED.items()}
