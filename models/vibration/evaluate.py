#!/usr/bin/env python3
"""Measure the committed components of the vibration line on held-out machines: `evaluate.py [--write]`.

Prints the table of the model card; `--write` stores it as metrics.json beside each release. Held-out machines were
never read by training, calibration or the choice of a threshold. Needs numpy, LiteRT and onnxruntime alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from models.vibration import dataset, machine, score  # noqa: E402

VERSIONS = ("1.0.0", "1.1.0")
HEALTHY_EACH = 12
FAULTY_EACH = 4
FIT_EACH = 4
RESAMPLES = 400
LOADS = (0.3, 1.0)
ALL = "all faults"
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """How well one scorer tells a fault: area under the ROC curve with its 95 % interval over machines, and the share
    of windows above the threshold where there is one (`fault` healthy: false alarms, no AUC)."""

    scorer: str
    fault: str
    auc: float | None
    low: float | None
    high: float | None
    above: float | None
    windows: int


@dataclass(frozen=True, slots=True)
class Heldout:
    """Windows of the held-out machines: features as the device computes them, true values, machine and fault."""

    recordings: list[machine.Samples]
    units: NDArray[np.int64]
    faults: NDArray[Any]


def heldout(healthy_each: int = HEALTHY_EACH, faulty_each: int = FAULTY_EACH) -> Heldout:
    """The held-out windows at every load, so many of each machine and fault."""
    found = list(dataset.windows("heldout", machine.HEALTHY, healthy_each, LOADS))
    for fault in machine.FAULTS:
        found += dataset.windows("heldout", fault, faulty_each, LOADS)
    return Heldout([w.samples for w in found], np.array([w.unit for w in found]),
                   np.array([w.state.fault for w in found]))


def auc(healthy: Array, faulty: Array) -> float:
    """Area under the ROC curve: the chance that a faulty window scores higher than a healthy one, ties half."""
    order = np.sort(healthy)
    below, upto = np.searchsorted(order, faulty), np.searchsorted(order, faulty, side="right")
    return float((below + upto).mean() / 2 / len(healthy))


def interval(scores: Array, units: NDArray[np.int64], chosen: NDArray[np.bool_], healthy: NDArray[np.bool_],
             ) -> tuple[float, float]:
    """95 % of the AUC when machines, not windows, are drawn again: windows of one machine are alike."""
    rng = np.random.default_rng(0)
    numbers = np.unique(units)
    sick, well = ([scores[kind & (units == n)] for n in numbers] for kind in (chosen, healthy))
    found = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, len(numbers), len(numbers))
        found.append(auc(np.concatenate([well[i] for i in drawn]), np.concatenate([sick[i] for i in drawn])))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def rows(name: str, scores: Array, data: Heldout, threshold: float | None) -> list[Row]:
    """One row per fault, one for all of them, and one for false alarms."""
    healthy = data.faults == machine.HEALTHY
    kinds: dict[str, NDArray[np.bool_]] = {ALL: ~healthy, **{f: data.faults == f for f in machine.FAULTS}}
    found = []
    for fault, chosen in kinds.items():
        above = None if threshold is None else float((scores[chosen] > threshold).mean())
        found.append(Row(name, fault, auc(scores[healthy], scores[chosen]),
                         *interval(scores, data.units, chosen, healthy), above, int(chosen.sum())))
    alarms = None if threshold is None else float((scores[healthy] > threshold).mean())
    return [*found, Row(name, machine.HEALTHY, None, None, None, alarms, int(healthy.sum()))]


def features(preprocess: Mapping[str, Any], data: Heldout) -> NDArray[np.float32]:
    """The tensor's values of every window, [n, values]."""
    tensors = dataset.Tensors(preprocess)
    return np.stack([tensors(samples) for samples in data.recordings])


def mahalanobis(preprocess: Mapping[str, Any], values: NDArray[np.float32]) -> Array:
    """Squared Mahalanobis distance from the healthy training machines, covariance shrunk a tenth to its diagonal: a
    baseline that sees the very numbers that the network sees."""
    tensors = dataset.Tensors(preprocess)
    known = np.stack([tensors(w.samples) for w in dataset.windows("train", machine.HEALTHY, FIT_EACH, LOADS)])
    mean, covariance = known.mean(axis=0), np.cov(known.T)
    shrunk = 0.9 * covariance + 0.1 * np.diag(np.diag(covariance)) + 1e-9 * np.eye(len(mean))
    apart = (values - mean).astype(np.float64)
    return np.einsum("ij,ij->i", apart, np.linalg.solve(shrunk, apart.T).T)


def strength(data: Heldout) -> Array:
    """RMS of the acceleration without gravity, over all axes: the baseline of every handheld meter."""
    return np.array([float(np.sqrt(((s - s.mean(axis=0)) ** 2).mean())) for s in data.recordings])


def baselines(data: Heldout, root: Path = HERE) -> list[Row]:
    """Rows of the two baselines, which know no release."""
    preprocess = tomllib.loads((root / VERSIONS[-1] / "spec.toml").read_text())["preprocess"]
    distance = mahalanobis(preprocess, features(preprocess, data))
    return rows("baseline: RMS", strength(data), data, None) + rows("baseline: Mahalanobis", distance, data, None)


def measure(version: str, data: Heldout, root: Path = HERE) -> list[Row]:
    """Rows of a release's components."""
    spec = tomllib.loads((root / version / "spec.toml").read_text())
    values = features(spec["preprocess"], data)
    openers: dict[str, Callable[[Path], score.Score]] = {".tflite": score.tflite, ".onnx": score.onnx}
    found = []
    for component in spec["component"]:
        score_of = openers[Path(component["file"]).suffix](root / version / component["file"])
        scores = np.array([score_of(one) for one in values])
        found += rows(component["file"], scores, data, spec["postprocess"]["threshold"])
    return found


def document(version: str, table: list[Row]) -> dict[str, object]:
    """The content of a release's metrics.json."""
    return {"line": "vibration", "version": version, "metric": "AUC",
            "data": f"simulated, {machine.MACHINES['heldout'][1]} held-out machines, load {LOADS[0]:g} to {LOADS[1]:g}",
            "interval": "95 % bootstrap over machines",
            "rows": [{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in table]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="folder with the releases")
    parser.add_argument("--write", action="store_true", help="store metrics.json beside each release")
    arguments = parser.parse_args()
    data = heldout()
    plain = baselines(data, arguments.root)
    for version in VERSIONS:
        table = measure(version, data, arguments.root) + plain
        for r in table:
            shown = "–" if r.auc is None else f"{r.auc:.3f} ({r.low:.3f} to {r.high:.3f})"
            above = "–" if r.above is None else f"{r.above:.3f}"
            print(f"| {version} | {r.scorer} | {r.fault} | {shown} | {above} | {r.windows} |")
        if arguments.write:
            text = json.dumps(document(version, table), indent=1) + "\n"
            (arguments.root / version / "metrics.json").write_text(text)


if __name__ == "__main__":
    main()
