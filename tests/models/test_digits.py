"""The digits line: the committed components score on the held-out pictures exactly what is written beside them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_components_and_baselines_reproduce_the_committed_accuracy(
    version: str, digits_evaluate: ModuleType, models_folder: Path
) -> None:
    committed = json.loads((models_folder / "digits" / version / "metrics.json").read_text())["rows"]
    found = {row.component: row for row in digits_evaluate.measure(version, digits_evaluate.heldout())}
    assert [row["component"] for row in committed] == list(found)
    for row in committed:
        # Another CPU may round a handful of pictures otherwise; the interval says how far that may reach.
        assert row["low"] <= found[row["component"]].accuracy <= row["high"]
        assert found[row["component"]].n == row["n"] == 797


def test_components_beat_both_baselines_beyond_the_intervals(models_folder: Path) -> None:
    for version in ("1.0.0", "1.1.0"):
        rows = json.loads((models_folder / "digits" / version / "metrics.json").read_text())["rows"]
        baseline = max(row["high"] for row in rows if row["component"].startswith("baseline"))
        assert all(row["low"] > baseline for row in rows if row["component"].startswith("int8"))


def test_the_heldout_pictures_hold_every_digit_and_span_the_range(digits_evaluate: ModuleType) -> None:
    data = digits_evaluate.heldout()
    assert data.images.shape == (797, 8, 8)
    assert data.images.dtype == np.uint8
    assert (data.images.min(), data.images.max()) == (0, 255)
    assert set(data.labels.tolist()) == set(range(10))


def test_the_split_by_position_has_no_shared_picture(models_folder: Path) -> None:
    data = tomllib.loads((models_folder / "digits" / "recipe.toml").read_text())["data"]
    assert data["train"][1] <= data["validation"][0] < data["validation"][1] <= data["heldout"][0]
    assert data["calibration"][1] <= data["train"][1]


@pytest.mark.parametrize(("hits", "n", "low", "high"), [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775)])
def test_the_wilson_interval_matches_published_values(
    hits: int, n: int, low: float, high: float, digits_evaluate: ModuleType
) -> None:
    assert digits_evaluate.wilson(hits, n) == pytest.approx((low, high), abs=5e-4)
