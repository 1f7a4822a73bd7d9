#!/usr/bin/env python3
"""Measure the committed components of the digits line on heldout.npz: `evaluate.py [--write]`.

Prints the table of the model card; `--write` stores it as metrics.json beside each release. Needs numpy, LiteRT and
onnxruntime alone.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
VERSIONS = ("1.0.0", "1.1.0")
Picture = NDArray[np.uint8]
Classifier = Callable[[Picture], int]


@dataclass(frozen=True, slots=True)
class Row:
    """Accuracy of one component or baseline with its 95 % Wilson interval over `n` pictures."""

    component: str
    accuracy: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Heldout:
    """Pictures [n, 8, 8] with their digits, and the baselines' training statistics."""

    images: Picture
    labels: NDArray[np.uint8]
    centroids: NDArray[np.float32]
    majority: int


def heldout(root: Path = HERE) -> Heldout:
    """The committed held-out pictures."""
    stored = np.load(root / "heldout.npz")
    return Heldout(stored["images"], stored["labels"], stored["centroids"], int(stored["majority"]))


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927)."""
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def tflite_classifier(path: Path) -> Classifier:
    """The int8 TFLite component at one thread."""
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    source, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def classify(picture: Picture) -> int:
        interpreter.set_tensor(source, (picture ^ np.uint8(0x80)).view(np.int8)[None, ..., None])
        interpreter.invoke()
        return int(interpreter.get_tensor(result)[0].argmax())

    return classify


def onnx_classifier(path: Path) -> Classifier:
    """The int8 ONNX component on onnxruntime's CPU at one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def classify(picture: Picture) -> int:
        tensor = picture[None, None].astype(np.float32) / np.float32(255)
        return int(session.run(["probs"], {"x": tensor})[0][0].argmax())

    return classify


def measure(version: str, data: Heldout, root: Path = HERE) -> list[Row]:
    """Accuracy of a release's components and of the two baselines on `data`."""
    spec = tomllib.loads((root / version / "spec.toml").read_text())
    openers = {".tflite": tflite_classifier, ".onnx": onnx_classifier}
    classifiers: dict[str, Classifier] = {
        c["file"]: openers[Path(c["file"]).suffix](root / version / c["file"]) for c in spec["component"]}
    classifiers["baseline: majority class"] = lambda _: data.majority
    classifiers["baseline: nearest centroid"] = lambda picture: int(
        ((data.centroids - picture) ** 2).sum(axis=(1, 2)).argmin())
    rows = []
    for name, classify in classifiers.items():
        hits = sum(classify(picture) == label for picture, label in zip(data.images, data.labels, strict=True))
        n = len(data.labels)
        rows.append(Row(name, hits / n, *wilson(hits, n), n))
    return rows


def document(version: str, rows: list[Row]) -> dict[str, object]:
    """The content of a release's metrics.json."""
    return {"line": "digits", "version": version, "metric": "accuracy", "data": "heldout.npz (UCI optdigits)",
            "interval": "95 % Wilson",
            "rows": [{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="folder with the releases and heldout.npz")
    parser.add_argument("--write", action="store_true", help="store metrics.json beside each release")
    arguments = parser.parse_args()
    data = heldout(arguments.root)
    for version in VERSIONS:
        rows = measure(version, data, arguments.root)
        for row in rows:
            print(f"| {version} | {row.component} | {row.accuracy:.3f} | {row.low:.3f} to {row.high:.3f} | {row.n} |")
        if arguments.write:
            (arguments.root / version / "metrics.json").write_text(json.dumps(document(version, rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
