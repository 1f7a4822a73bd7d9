"""The vibration line: its machines are deterministic and disjoint, its physics is what the card says, and its committed
components find the faults of machines they never saw as often as is written beside them."""

from __future__ import annotations

import json
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from models.vibration import dataset, machine, score
from ota import delta

VERSIONS = ("1.0.0", "1.1.0")
HEALTHY_EACH, FAULTY_EACH = 3, 1


@pytest.fixture(scope="module")
def heldout(vibration_evaluate: ModuleType) -> Any:
    """A quarter of the committed held-out windows, of every held-out machine."""
    return vibration_evaluate.heldout(HEALTHY_EACH, FAULTY_EACH)


def committed(models_folder: Path, version: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((models_folder / "vibration" / version / "metrics.json").read_text())["rows"]
    return {(row["scorer"], row["fault"]): row for row in rows}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_part_of_the_heldout_windows_scores_within_the_committed_interval(
    version: str, heldout: Any, vibration_evaluate: ModuleType, models_folder: Path
) -> None:
    written = committed(models_folder, version)
    found = {(row.scorer, row.fault): row for row in vibration_evaluate.measure(version, heldout)}
    assert {scorer for scorer, _ in found} == {"int8.tflite", "int8.onnx"}
    for key, row in found.items():
        if row.auc is None:
            assert row.above == pytest.approx(written[key]["above"], abs=0.03), key
        else:
            # the part's own interval and the committed one estimate the same figure, so they overlap
            assert row.low <= written[key]["high"], key
            assert row.high >= written[key]["low"], key


def test_the_components_beat_a_handheld_meter_and_the_card_says_where_they_do_not(models_folder: Path) -> None:
    card = (models_folder / "vibration" / "card.md").read_text()
    for version in VERSIONS:
        written = committed(models_folder, version)
        for component in ("int8.tflite", "int8.onnx"):
            assert written[component, "all faults"]["low"] > written["baseline: RMS", "all faults"]["high"]
            for fault in ("outer_race", "inner_race", "looseness"):
                assert written[component, fault]["low"] > written["baseline: RMS", fault]["high"]
            # a meter of plain strength finds an unbalance more often: the card has to say so
            assert written[component, "unbalance"]["auc"] < written["baseline: RMS", "unbalance"]["auc"]
    assert "unbalance is found more often by plain RMS" in " ".join(card.split())


def test_the_update_is_better_at_every_load_than_the_release_that_saw_full_load_alone(models_folder: Path) -> None:
    old, new = (committed(models_folder, version) for version in VERSIONS)
    for component in ("int8.tflite", "int8.onnx"):
        assert new[component, "all faults"]["auc"] > old[component, "all faults"]["auc"]
        assert new[component, "all faults"]["above"] > old[component, "all faults"]["above"]
        assert new[component, "healthy"]["above"] < old[component, "healthy"]["above"]


def test_the_card_shows_the_committed_figures(vibration_evaluate: ModuleType, models_folder: Path) -> None:
    shown = (models_folder / "vibration" / "card.md").read_text()
    for version in VERSIONS:
        for row in json.loads((models_folder / "vibration" / version / "metrics.json").read_text())["rows"]:
            if row["scorer"].startswith("int8.onnx") or (row["scorer"].startswith("base") and version == "1.0.0"):
                continue  # the same as the TFLite file's to the third digit; a baseline knows no release
            name = row["scorer"] if row["scorer"].startswith("base") else f"{version} {row['scorer']}"
            above = "–" if row["above"] is None else f"{100 * row['above']:.1f} %"
            if row["auc"] is not None:
                figures = f"{row['auc']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {above} | {row['windows']}"
                assert f"| {name} | {row['fault']} | {figures} |" in shown, row
            elif row["above"] is not None:  # false alarms, which the card shows of no fault
                assert f"| {name} | none | – | – | {above} | {row['windows']} |" in shown, row


def test_the_card_says_what_the_update_costs(models_folder: Path) -> None:
    folder = models_folder / "vibration"
    old, new = ((folder / version / "int8.tflite").read_bytes() for version in VERSIONS)
    share = len(delta.encode("zstd-patch", new, old)) / len(delta.encode("zstd", new))
    assert share == pytest.approx(0.51, abs=0.02)
    assert "51 % of the compressed full file" in " ".join((folder / "card.md").read_text().split())


@pytest.mark.parametrize("version", VERSIONS)
def test_both_formats_give_the_same_scores(version: str, models_folder: Path) -> None:
    folder = models_folder / "vibration" / version
    tensors = dataset.Tensors(tomllib.loads((folder / "spec.toml").read_text())["preprocess"])
    for path in (models_folder / "vibration" / "golden").glob("*.npy"):
        values = tensors(np.load(path))
        first, second = score.tflite(folder / "int8.tflite")(values), score.onnx(folder / "int8.onnx")(values)
        assert first == pytest.approx(second, rel=0.1)


def test_the_parts_of_the_data_share_no_machine() -> None:
    ranges = sorted((first, first + count) for first, count in machine.MACHINES.values())
    assert all(one[1] <= other[0] for one, other in pairwise(ranges))


def test_a_recording_is_the_same_again_and_another_seed_is_another_one() -> None:
    unit = machine.machine(7)
    state = machine.State(0.7, "inner_race", 1.0)
    first, again, other = (machine.record(unit, state, seed) for seed in (1, 1, 2))
    assert first.dtype == np.float32
    assert first.shape == (machine.WINDOW, machine.AXES)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def line_of(samples: np.ndarray, hertz: float) -> float:
    """Amplitude of the strongest line within two per cent of a frequency, over the axes."""
    x = samples - samples.mean(axis=0)
    n = np.arange(len(x))
    window = np.hanning(len(x))
    found = []
    for f in np.linspace(0.98 * hertz, 1.02 * hertz, 41):
        turned = np.exp(-2j * np.pi * f * n / machine.RATE_HZ)
        found.append(np.abs((x * window[:, None] * turned[:, None]).sum(axis=0)).max() * 2 / window.sum())
    return float(max(found))


@pytest.mark.parametrize(
    ("fault", "order"), [("unbalance", 1.0), ("misalignment", 2.0), ("looseness", 0.5), ("looseness", 2.5)]
)
def test_a_fault_of_the_shaft_shows_at_its_orders(fault: str, order: float) -> None:
    grown = 0
    for seed in range(12):
        unit = machine.machine(seed)
        shaft_hz = unit.shaft_hz * (1 - 0.02 * 0.9)
        sick, well = (
            line_of(machine.record(unit, machine.State(0.9, kind, 3.0), seed, 4096), order * shaft_hz)
            for kind in (fault, machine.HEALTHY)
        )
        grown += sick > 1.5 * well
    assert grown >= 11


@pytest.mark.parametrize(("fault", "sign"), [("outer_race", -1), ("inner_race", 1)])
def test_a_fault_of_the_bearing_shows_in_the_envelope_at_its_race_frequency(fault: str, sign: int) -> None:
    """The usual diagnosis: the band of a resonance, its envelope, and there the line of the race."""
    found = 0
    for seed in range(12):
        unit = machine.machine(seed)
        samples = machine.record(unit, machine.State(1.0, fault, 3.0), seed, 16384)
        spectrum = np.fft.rfft(samples - samples.mean(axis=0), axis=0)
        hertz = np.fft.rfftfreq(len(samples), 1 / machine.RATE_HZ)
        spectrum[(hertz < 300) | (hertz > 1500)] = 0
        envelope = np.abs(np.fft.irfft(spectrum, axis=0))
        power = np.abs(np.fft.rfft((envelope - envelope.mean(axis=0)) * np.hanning(len(samples))[:, None], axis=0))
        race = unit.elements / 2 * (1 + sign * unit.ratio) * unit.shaft_hz * 0.98
        near, around = (np.abs(hertz / race - 1) < width for width in (0.02, 0.25))
        found += bool((power[near].max(axis=0) > 3 * np.median(power[around], axis=0)).any())
    assert found >= 10


def test_an_unbalance_grows_with_the_square_of_the_speed() -> None:
    unit = machine.machine(3)
    turns = np.cumsum(np.full(4096, 25.0)) / machine.RATE_HZ
    slow, fast = (
        np.abs(machine._shaft_fault("unbalance", turns, hz, 1.0, np.random.default_rng(0))).max() for hz in (20, 40)
    )
    assert fast / slow == pytest.approx(4)
    assert unit.shaft_hz != machine.machine(4).shaft_hz
