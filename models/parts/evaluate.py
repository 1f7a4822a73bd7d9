#!/usr/bin/env python3
"""Measure the committed components of the parts line: `evaluate.py [--images N] [--write | --golden]`.

Prints the table of the model card; `--write` stores it as metrics.json beside each release. The pictures come from the
held-out configuration, which training and calibration never read; needs numpy, OpenCV, LiteRT and onnxruntime alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from models.parts import pipeline, scene  # noqa: E402
from models.parts.belt import HEIGHT, WIDTH  # noqa: E402
from models.parts.sprites import LABELS  # noqa: E402

VERSIONS = ("1.0.0", "1.1.0")
IMAGES = 300
"""Held-out pictures per light in the committed table."""
GOLDEN_FROM = 10_000
"""First held-out picture that may become a golden one."""
COLORS = ((80, 220, 80), (60, 160, 255), (255, 170, 60))
"""BGR of a drawn bolt, nut and washer."""
Counts = list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: who (`int8.tflite`, `int8.onnx`, `baseline`), under which light, how well."""

    component: str
    light: str
    score: pipeline.Score


def _detector(run: pipeline.Network, threshold: float) -> Callable[[pipeline.Picture], list[pipeline.Detection]]:
    def detect(image: pipeline.Picture) -> list[pipeline.Detection]:
        heat, box = run(pipeline.preprocess(image))
        return pipeline.decode(heat, box, (WIDTH, HEIGHT), threshold)

    return detect


def components(version: str, root: Path = HERE) -> dict[str, Callable[[pipeline.Picture], list[pipeline.Detection]]]:
    """Detectors of a release by file name, opened as its spec.toml says."""
    spec = tomllib.loads((root / version / "spec.toml").read_text())
    openers = {".tflite": pipeline.tflite_network, ".onnx": pipeline.onnx_network}
    threshold = spec["postprocess"]["threshold"]
    return {c["file"]: _detector(openers[Path(c["file"]).suffix](root / version / c["file"], c["outputs"]), threshold)
            for c in spec["component"]}


def measure(versions: Iterable[str], indices: Iterable[int], root: Path = HERE) -> dict[str, list[Row]]:
    """Scores by release on held-out pictures `indices` of each light, the blob baseline among them."""
    detectors = {(version, name): detect for version in versions for name, detect in components(version, root).items()}
    chosen = list(indices)
    counts: dict[tuple[str, str, str], Counts] = {}
    for light in scene.LIGHTS:
        for index in chosen:
            frame = scene.render(scene.HELDOUT, light, index)
            blobs = pipeline.count(pipeline.blob_detections(frame.image), frame.boxes)
            for (version, name), detect in detectors.items():
                counts.setdefault((version, name, light), []).append(pipeline.count(detect(frame.image), frame.boxes))
                if name == "int8.tflite":
                    counts.setdefault((version, "baseline", light), []).append(blobs)
    rows: dict[str, list[Row]] = {}
    for (version, name, under), table in counts.items():
        rows.setdefault(version, []).append(Row(name, under, pipeline.score(table)))
    return rows


def document(version: str, rows: Iterable[Row]) -> dict[str, object]:
    """The content of a release's metrics.json."""
    return {
        "line": "parts", "version": version, "metric": "f1@iou0.5", "data": "heldout configuration, synthetic",
        "interval": "95 % percentile bootstrap over pictures, 2000 resamples, seed 7",
        "rows": [{"component": r.component, "light": r.light,
                  **{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(r.score).items()}}
                 for r in rows],
    }


def write_golden(folder: Path) -> None:
    """The release's golden pictures: one held-out frame of each light, beyond the measured ones, as JPEG.

    They have the network's own size: every device fetches them with its first release, and what a larger picture adds
    is bytes. Resizing is the agent's own code, tested there.
    """
    folder.mkdir(exist_ok=True)
    for light in scene.LIGHTS:
        wanted = (scene.render(scene.HELDOUT, light, GOLDEN_FROM + i) for i in range(100))
        frame = next(f for f in wanted if len(f.boxes) >= 5 and len({b[0] for b in f.boxes}) == len(LABELS))
        small = cv2.cvtColor(pipeline.preprocess(frame.image), cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / f"{light}.jpg"), small, (cv2.IMWRITE_JPEG_QUALITY, 90))


def write_sheet(out: Path, root: Path) -> None:
    """A contact sheet: what 1.0.0 (upper) and 1.1.0 (lower) see by day, at dusk and in the evening of the demo clip."""
    wanted = (150, 345, 520)
    chosen = [frame for n, frame in enumerate(islice(scene.clip_frames(20.0, 30), wanted[-1] + 1)) if n in wanted]
    rows = []
    for version in VERSIONS:
        detect = components(version, root)["int8.tflite"]
        drawn = []
        for frame in chosen:
            image = frame.image.copy()
            for label, confidence, *corners in detect(frame.image):
                x0, y0, x1, y1 = (round(v) for v in corners)
                cv2.rectangle(image, (x0, y0), (x1, y1), COLORS[label], 2)
                text = f"{LABELS[label]} {confidence:.2f}"
                cv2.putText(image, text, (x0, max(y0 - 6, 16)), cv2.FONT_HERSHEY_SIMPLEX, 0.55, COLORS[label], 2,
                            cv2.LINE_AA)
            cv2.putText(image, version, (12, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 2, cv2.LINE_AA)
            drawn.append(image)
        rows.append(np.hstack(drawn))
    small = cv2.resize(np.vstack(rows), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(out), small, (cv2.IMWRITE_JPEG_QUALITY, 80))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, help="held-out pictures per light")
    parser.add_argument("--root", type=Path, default=HERE, help="folder with the releases")
    parser.add_argument("--write", action="store_true", help="store metrics.json beside each release")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the demo clip there and stop")
    parser.add_argument("--golden", action="store_true", help="write the golden pictures and stop")
    arguments = parser.parse_args()
    if arguments.golden:
        write_golden(arguments.root / "golden")
        return
    if arguments.sheet:
        write_sheet(arguments.sheet, arguments.root)
        return
    versions = [v for v in VERSIONS if (arguments.root / v / "spec.toml").exists()]
    for version, rows in measure(versions, range(arguments.images), arguments.root).items():
        for row in rows:
            s = row.score
            print(f"| {version} | {row.component} | {row.light} | {s.f1:.3f} | {s.low:.3f} to {s.high:.3f} | "
                  f"{s.precision:.3f} | {s.recall:.3f} | {s.images} / {s.parts} |")
        if arguments.write:
            text = json.dumps(document(version, rows), indent=1) + "\n"
            (arguments.root / version / "metrics.json").write_text(text)


if __name__ == "__main__":
    main()
