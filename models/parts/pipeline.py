"""The shortest honest way from a picture to boxes, and from boxes to a score: what the parts line is measured with.

What it is: a reference in plain numpy, independent of the agent's own stages, so that the committed figures do not
inherit their faults. What it is not: fast, or used on a device.
Boxes here are (class, x0, y0, x1, y1) in pixels of the 640x480 picture; detections add a score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]
Box = tuple[int, float, float, float, float]
Detection = tuple[int, float, float, float, float, float]
"""(class, score, x0, y0, x1, y1)."""
Network = Callable[[Picture], tuple[Array, Array]]
"""[240, 320, 3] uint8 RGB in; heat [30, 40, 3] and box [30, 40, 4] out, both float32."""

INPUT_WIDTH, INPUT_HEIGHT, STRIDE = 320, 240, 8
NMS_IOU, MAX_DETECTIONS = 0.5, 50


def preprocess(image: Picture) -> Picture:
    """A BGR picture stretched to the network's size, RGB."""
    small = cv2.resize(image, (INPUT_WIDTH, INPUT_HEIGHT), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_BGR2RGB), np.uint8)


def tflite_network(path: Path, outputs: Sequence[str]) -> Network:
    """The int8 TFLite component at one thread; `outputs` names heat and box."""
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]
    details = {d["name"]: d for d in interpreter.get_output_details()}
    wanted = [details[name] for name in outputs]

    def run(picture: Picture) -> tuple[Array, Array]:
        interpreter.set_tensor(source["index"], (picture ^ np.uint8(0x80)).view(np.int8)[None])
        interpreter.invoke()
        heat, box = (_dequantized(interpreter.get_tensor(d["index"])[0], d["quantization"]) for d in wanted)
        return heat, box

    return run


def _dequantized(values: NDArray[np.int8], quantization: tuple[float, int]) -> Array:
    scale, zero_point = quantization
    return ((values.astype(np.float32) - zero_point) * np.float32(scale)).astype(np.float32)


def onnx_network(path: Path, outputs: Sequence[str]) -> Network:
    """The int8 ONNX component on onnxruntime's CPU at one thread; `outputs` names heat and box."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(picture: Picture) -> tuple[Array, Array]:
        tensor = np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32) / np.float32(255)
        heat, box = session.run(list(outputs), {"x": tensor})
        return np.asarray(heat[0], np.float32), np.asarray(box[0], np.float32)

    return run


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two (x0, y0, x1, y1)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def decode(heat: Array, box: Array, size: tuple[int, int], threshold: float) -> list[Detection]:
    """Peaks of the heat map as boxes in a picture of `size` (width, height), best first, after class-wise NMS."""
    around = cv2.dilate(heat, np.ones((3, 3), np.uint8))
    rows, columns, classes = np.nonzero((heat >= threshold) & (heat >= around))
    scores = heat[rows, columns, classes]
    order = np.argsort(-scores, kind="stable")
    fx, fy = size[0] / INPUT_WIDTH * STRIDE, size[1] / INPUT_HEIGHT * STRIDE
    kept: list[Detection] = []
    for row, column, label, score in zip(rows[order], columns[order], classes[order], scores[order], strict=True):
        dx, dy, w, h = (float(v) for v in box[row, column])
        x, y = column + dx, row + dy
        corners = (max((x - w / 2) * fx, 0.0), max((y - h / 2) * fy, 0.0),
                   min((x + w / 2) * fx, float(size[0])), min((y + h / 2) * fy, float(size[1])))
        if all(k[0] != label or iou(k[2:], corners) <= NMS_IOU for k in kept):
            kept.append((int(label), float(score), *corners))
        if len(kept) == MAX_DETECTIONS:
            break
    return kept


def count(found: Sequence[Detection], truth: Sequence[Box], at: float = 0.5) -> tuple[int, int, int]:
    """(true positives, false positives, missed) of one picture: best score first, each true box used once."""
    free = list(truth)
    hits = 0
    for detection in sorted(found, key=lambda d: -d[1]):
        best = max((b for b in free if b[0] == detection[0]), key=lambda b: iou(b[1:], detection[2:]), default=None)
        if best is not None and iou(best[1:], detection[2:]) >= at:
            free.remove(best)
            hits += 1
    return hits, len(found) - hits, len(free)


@dataclass(frozen=True, slots=True)
class Score:
    """F1 at IoU 0.5 over `images` pictures with `parts` true boxes, its 95 % interval, precision and recall."""

    f1: float
    low: float
    high: float
    precision: float
    recall: float
    images: int
    parts: int


def _f1(counts: NDArray[np.int64]) -> float:
    tp, fp, fn = (float(v) for v in counts)
    return 2 * tp / max(2 * tp + fp + fn, 1.0)


def score(counts: Sequence[tuple[int, int, int]], seed: int = 7, resamples: int = 2000) -> Score:
    """Score of per-picture counts; the interval is a percentile bootstrap over pictures."""
    table = np.asarray(counts, np.int64)
    draws = np.random.default_rng(seed).integers(0, len(table), (resamples, len(table)))
    f1s = [_f1(table[draw].sum(axis=0)) for draw in draws]
    tp, fp, fn = (int(v) for v in table.sum(axis=0))
    low, high = np.percentile(f1s, [2.5, 97.5])
    return Score(_f1(table.sum(axis=0)), float(low), float(high), tp / max(tp + fp, 1), tp / max(tp + fn, 1),
                 len(table), tp + fn)


def blob_detections(image: Picture) -> list[Detection]:
    """The trivial baseline: Otsu's threshold, connected blobs, class by shape (long: bolt, with a hole: nut or washer
    by how round it is)."""
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (0, 0), 2.0)
    _, mask = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    if np.count_nonzero(mask) > mask.size // 2:
        mask = cv2.bitwise_not(mask)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    found: list[Detection] = []
    for outline in outlines:
        area = cv2.contourArea(outline)
        if not 300 < area < 20_000:
            continue
        x, y, w, h = cv2.boundingRect(outline)
        (_, _), (a, b), _ = cv2.minAreaRect(outline)
        _, radius = cv2.minEnclosingCircle(outline)
        label = 0 if max(a, b) > 1.6 * min(a, b) else (2 if area > 0.9 * np.pi * radius**2 else 1)
        found.append((label, 1.0, float(x), float(y), float(x + w), float(y + h)))
    return found
