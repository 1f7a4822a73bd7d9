"""Loads the model lines' scripts by path: each line has a train.py and an evaluate.py of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load(line: str, script: str) -> ModuleType:
    name = f"models_under_test_{line}_{script}"
    spec = importlib.util.spec_from_file_location(name, ROOT / "models" / line / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models_folder() -> Path:
    return ROOT / "models"


@pytest.fixture(scope="session")
def parts_evaluate() -> ModuleType:
    return _load("parts", "evaluate")


@pytest.fixture(scope="session")
def parts_clip() -> ModuleType:
    return _load("parts", "clip")


@pytest.fixture(scope="session")
def digits_evaluate() -> ModuleType:
    return _load("digits", "evaluate")


@pytest.fixture(scope="session")
def vibration_evaluate() -> ModuleType:
    return _load("vibration", "evaluate")
