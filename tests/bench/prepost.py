"""What a frame costs before and behind the model: the shipped plan and head against the fastest call sequence known.

The hand-written side makes the same answer from the same arrays with the calls that were measured to be the fastest
(one resize into a kept buffer, one colour conversion in place, one XOR or one widening; comparisons on the model's own
integers), without a declaration to look at, classes, labels or checks. Frames are 640x480; outputs are made up, with as
many things in them as a busy scene has, because no model runs here. Rounds take turns; figures are minima.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.worker.graph import Preprocess, parse_graph
from agent.worker.postprocess import compile_postprocess
from agent.worker.preprocess import Plan
from agent.worker.tensor import TensorSpec
from tests.bench.setting import Pressure, Setting

FRAME = (480, 640, 3)
THINGS = 12
THRESHOLD, IOU = 0.35, 0.5
PARTS = ("pre", "post", "both")
ROUNDS_EACH, RUNS = 4, 200
_KERNEL = np.ones((3, 3), np.uint8)

Array = NDArray[Any]
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """The same work twice. `goal_us` is what the shipped side may cost."""

    name: str
    goal_us: float
    shipped: tuple[Call, Call]
    fastest: tuple[Call, Call]


def picture() -> Array:
    """A frame as a ring holds it: read-only."""
    coarse = np.random.default_rng(3).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    frame = cv2.resize(coarse, (FRAME[1], FRAME[0]), interpolation=cv2.INTER_CUBIC)
    frame.flags.writeable = False
    return frame


def shipped(graph: dict[str, Any], spec: TensorSpec, outputs: Sequence[tuple[TensorSpec, Array]]) -> tuple[Call, Call]:
    """Both ends of a pipeline, as a worker runs them; the answers as they are sent."""
    declared = parse_graph(graph)
    tensor = spec.empty()
    assert isinstance(declared.preprocess, Preprocess)
    plan = Plan(declared.preprocess, spec, tensor, *FRAME[:2])
    read = compile_postprocess(declared, [o for o, _ in outputs], [spec])
    frame, arrays, given = picture(), tuple(array for _, array in outputs), (tensor,)
    return lambda: plan.run(frame), lambda: [item.to_json() for item in read(arrays, plan.inverse, given)]


def same_fill(spec: TensorSpec, size: int) -> Call:
    """Resize, swap colours, flip the sign bit: what an int8 model of scale 1/255 needs."""
    frame = picture()
    small, tensor = np.empty((size, size, 3), np.uint8), np.empty(spec.shape, np.int8)
    target = tensor.view(np.uint8)[0]

    def fill() -> None:
        cv2.resize(frame, (size, size), dst=small, interpolation=cv2.INTER_LINEAR)
        cv2.cvtColor(small, cv2.COLOR_BGR2RGB, dst=small)
        np.bitwise_xor(small, 0x80, out=target)

    return fill


def float_fill(size: int) -> Call:
    """Resize, split into planes in the other order, widen, scale: what a float32 model of NCHW needs."""
    frame = picture()
    small, tensor = np.empty((size, size, 3), np.uint8), np.empty((3, size, size), np.float32)
    planes = np.empty((3, size, size), np.uint8)
    backwards = [planes[2], planes[1], planes[0]]
    gain = np.float32(1 / 255)

    def fill() -> None:
        cv2.resize(frame, (size, size), dst=small, interpolation=cv2.INTER_LINEAR)
        cv2.split(small, backwards)
        np.copyto(tensor, planes)
        np.multiply(tensor, gain, out=tensor)

    return fill


PICTURE_KEYS = {"color": "rgb", "mean": [0.0], "std": [255.0]}


def classifier() -> Case:
    """96x96, two classes, int8: `vww_96_int8`."""
    spec = TensorSpec("x", "int8", (1, 96, 96, 3), 1 / 255, -128)
    answer = TensorSpec("y", "int8", (1, 2), 1 / 256, -128)
    scores = np.asarray([[-57, 57]], np.int8)
    graph = {"task": "classification", "labels": ["no", "yes"], "preprocess": PICTURE_KEYS,
             "postprocess": {"kind": "classification", "top_k": 1}}  # fmt: skip
    names = ("no", "yes")

    def read() -> list[dict[str, object]]:
        row = scores[0]
        best = int(row.argmax())
        return [{"label": names[best], "score": round((int(row[best]) + 128) / 256, 6)}]

    return Case("classifier 96x96 int8", 40, shipped(graph, spec, [(answer, scores)]), (same_fill(spec, 96), read))


def centres() -> Case:
    """320x320, a heat map and a box map, int8: the shipped detector's head."""
    spec = TensorSpec("x", "int8", (1, 320, 320, 3), 1 / 255, -128)
    heat_spec = TensorSpec("heat", "int8", (1, 40, 40, 3), 1 / 256, -128)
    box_spec = TensorSpec("box", "int8", (1, 40, 40, 4), 0.05, -100)
    rng = np.random.default_rng(1)
    heat = rng.integers(-128, -100, heat_spec.shape).astype(np.int8)
    box = rng.integers(-80, -40, box_spec.shape).astype(np.int8)
    for cell in rng.choice(1600, THINGS, replace=False):
        heat[0, cell // 40, cell % 40, rng.integers(3)] = rng.integers(60, 127)
    graph = {"task": "detection", "labels": ["bolt", "nut", "washer"], "preprocess": PICTURE_KEYS,
             "postprocess": {"kind": "centernet", "stride": 8, "threshold": THRESHOLD, "max_detections": 50,
                             "nms_iou": IOU}}  # fmt: skip
    names = ("bolt", "nut", "washer")
    limit, zoom = round(THRESHOLD * 256), np.asarray([2.0, 1.5, 2.0, 1.5]) * 8

    def read() -> list[dict[str, object]]:
        shifted = heat[0].view(np.uint8) ^ 0x80
        found = np.flatnonzero(shifted >= limit)
        found = found[shifted.reshape(-1)[found] >= cv2.dilate(shifted, _KERNEL).reshape(-1)[found]]
        scores = shifted.reshape(-1)[found] * (1 / 256)
        cells, kinds = np.divmod(found, 3)
        d = (box.reshape(-1, 4)[cells].astype(np.float32) + 100) * np.float32(0.05)
        d[:, 0] += cells % 40
        d[:, 1] += cells // 40
        d[:, :2] -= d[:, 2:] / 2
        boxes = d * zoom
        kept = cv2.dnn.NMSBoxesBatched(boxes.tolist(), scores.tolist(), kinds.tolist(), THRESHOLD, IOU)
        return plain(names, boxes[kept], scores[kept], kinds[kept])

    outputs = [(heat_spec, heat), (box_spec, box)]
    return Case("detector 320x320 int8", 450, shipped(graph, spec, outputs), (same_fill(spec, 320), read))


def yolo() -> Case:
    """320x320, 80 classes, float32, NCHW: a YOLOv8 as commonly exported."""
    spec = TensorSpec("x", "float32", (1, 3, 320, 320))
    answer = TensorSpec("y", "float32", (1, 84, 2100))
    rng = np.random.default_rng(2)
    table = rng.uniform(0, 0.05, answer.shape).astype(np.float32)
    for column in rng.choice(2100 - 8, THINGS, replace=False):
        centre, kind = rng.uniform(40, 280, 2), rng.integers(80)
        for near in range(6):  # several answers of one thing lie beside each other
            table[0, :4, column + near] = (*centre + rng.normal(0, 1, 2), 40, 50)
            table[0, 4 + kind, column + near] = rng.uniform(0.5, 0.9)
    names = [str(i) for i in range(80)]
    graph = {"task": "detection", "labels": names, "preprocess": PICTURE_KEYS,
             "postprocess": {"kind": "yolov8", "threshold": THRESHOLD, "nms_iou": IOU}}  # fmt: skip
    zoom = np.asarray([2.0, 1.5, 2.0, 1.5])

    def read() -> list[dict[str, object]]:
        rows = table[0]
        best = rows[4:].max(axis=0)
        found = np.flatnonzero(best >= THRESHOLD)
        columns = rows[:, found]
        scores, kinds = best[found], columns[4:].argmax(axis=0)
        boxes = columns[:4].T * zoom
        boxes[:, :2] -= boxes[:, 2:] / 2
        kept = cv2.dnn.NMSBoxesBatched(boxes.tolist(), scores.tolist(), kinds.tolist(), THRESHOLD, IOU)
        return plain(names, boxes[kept], scores[kept], kinds[kept])

    return Case("YOLOv8 320x320 float32", 450, shipped(graph, spec, [(answer, table)]), (float_fill(320), read))


def plain(names: Sequence[str], sized: Array, scores: Array, kinds: Array) -> list[dict[str, object]]:
    """The answers as dictionaries, from x, y, width and height."""
    sized[:, 2:] += sized[:, :2]
    return [
        {"label": names[kind], "score": round(score, 4), "box": edges}
        for kind, score, edges in zip(kinds.tolist(), scores.tolist(), np.round(sized, 2).tolist(), strict=True)
    ]


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Least microseconds of each round, both sides in turn: preprocess, postprocess, and both."""
    kept: dict[str, list[float]] = {f"{side}_{part}_us": [] for side in ("shipped", "fastest") for part in PARTS}
    for _ in range(rounds):
        for side, (fill, read) in (("shipped", case.shipped), ("fastest", case.fastest)):
            least = [float("inf")] * len(PARTS)
            for _ in range(RUNS):
                started = time.perf_counter_ns()
                fill()
                filled = time.perf_counter_ns()
                read()
                done = time.perf_counter_ns()
                for i, took in enumerate((filled - started, done - filled, done - started)):
                    least[i] = min(least[i], took / 1000)
            for part, value in zip(PARTS, least, strict=True):
                kept[f"{side}_{part}_us"].append(round(value, 2))
    return kept


def bench(setting: Setting) -> dict[str, Any]:
    """Measure every case and print the table; every round is in what is returned."""
    cv2.setNumThreads(1)
    found: dict[str, Any] = {}
    rounds = ROUNDS_EACH * setting.rounds
    print(f"\nbefore and behind the model, 640x480 source, one thread, us, minima of {rounds} rounds of {RUNS} runs")
    print(f"  {'':24}{'pre':>8}{'post':>8}{'both':>8}{'fastest known':>15}{'ratio':>7}{'goal':>12}{'CPU pressure':>14}")
    for case in (classifier(), centres(), yolo()):
        pressure = Pressure()
        kept = measure(case, rounds)
        stalled = round(pressure.percent, 1)
        least = {key: min(values) for key, values in kept.items()}
        ratio = least["shipped_both_us"] / least["fastest_both_us"]
        goal = f"{case.goal_us:.0f}, 1.5x"
        print(
            f"  {case.name:24}{least['shipped_pre_us']:8.1f}{least['shipped_post_us']:8.1f}"
            f"{least['shipped_both_us']:8.1f}{least['fastest_both_us']:15.1f}{ratio:7.2f}{goal:>12}{stalled:12.1f} %"
        )
        found[case.name] = {"goal_us": case.goal_us, "least": least, "rounds": kept, "cpu_pressure_percent": stalled}
    return found
