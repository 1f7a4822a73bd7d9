#!/usr/bin/env python3
"""Train, calibrate and write both releases of the parts line: `train.py [--out DIR] [--cache DIR] [--only VERSION]`.

1.0.0 learns day pictures. 1.1.0 starts from it, learns day and evening, and may change its last layers alone: the
frozen backbone, calibrated on the same pictures, quantizes to the same bytes, so the delta between the two is small.
Data, seeds, epochs, batches and rates come from recipe.toml, the losses and the ranges of augmentation stand here. The
held-out configuration is never read; the threshold was chosen on the validation part of the training configuration.
Needs what recipe.toml pins; TensorFlow and onnx are no part of a device.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import cv2
import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from models.parts import pipeline, scene  # noqa: E402

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]
GRID = (30, 40)
THRESHOLDS = (0.3, 0.35, 0.4, 0.45, 0.5)


@dataclass(frozen=True, slots=True)
class Dataset:
    """RGB pictures [n, 240, 320, 3] and the true boxes of each in source pixels (640x480)."""

    pictures: Picture
    boxes: list[tuple[scene.Box, ...]]


def _draw(job: tuple[scene.Light, int]) -> tuple[Picture, tuple[scene.Box, ...]]:
    cv2.setNumThreads(1)
    frame = scene.render(scene.TRAIN, *job)
    return pipeline.preprocess(frame.image), frame.boxes


def dataset(light: scene.Light, start: int, number: int, cache: Path, workers: int) -> Dataset:
    """Pictures `start` to `start + number` of the training configuration, drawn once and kept in `cache`."""
    kept = cache / f"{light}-{start}-{number}.npz"
    if not kept.exists():
        # Spawned: a child forked after TensorFlow started its threads may wait for ever on one of their locks.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(_draw, [(light, start + i) for i in range(number)], chunksize=16))
        flat = np.array([(i, *box) for i, (_, boxes) in enumerate(rows) for box in boxes], np.float32)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(kept, pictures=np.stack([picture for picture, _ in rows]), boxes=flat)
    stored = np.load(kept)
    boxes: list[list[scene.Box]] = [[] for _ in range(number)]
    for row in stored["boxes"].tolist():
        boxes[int(row[0])].append((int(row[1]), row[2], row[3], row[4], row[5]))
    return Dataset(stored["pictures"], [tuple(b) for b in boxes])


def augment(picture: Picture, boxes: tuple[scene.Box, ...], rng: np.random.Generator,
            jitter: float) -> tuple[Picture, list[scene.Box]]:
    """Mirror, shift, scale and tint a picture; boxes come back in network pixels."""
    zoom = rng.uniform(0.85, 1.15)
    sx, sy = (zoom * (1 if rng.uniform() < 0.5 else -1) for _ in range(2))
    tx = 160 * (1 - sx) + rng.uniform(-24, 24)
    ty = 120 * (1 - sy) + rng.uniform(-18, 18)
    # Boxes count from a pixel's edge, warpAffine from its centre.
    turn = np.array([[sx, 0, tx + (sx - 1) / 2], [0, sy, ty + (sy - 1) / 2]], np.float32)
    moved = cv2.warpAffine(picture, turn, (320, 240), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    gain = rng.uniform(1 - jitter, 1 + jitter, 3) * rng.uniform(1 - jitter, 1 + jitter)
    moved = np.clip(moved * gain.astype(np.float32), 0, 255)
    placed: list[scene.Box] = []
    for label, *corners in boxes:
        xs = sorted(sx * v / 2 + tx for v in (corners[0], corners[2]))
        ys = sorted(sy * v / 2 + ty for v in (corners[1], corners[3]))
        x0, x1 = (min(max(v, 0.0), 320.0) for v in xs)
        y0, y1 = (min(max(v, 0.0), 240.0) for v in ys)
        if (x1 - x0) * (y1 - y0) > 0.35 * (xs[1] - xs[0]) * (ys[1] - ys[0]):
            placed.append((label, x0, y0, x1, y1))
    return np.asarray(moved, np.uint8), placed


def targets(boxes: list[scene.Box]) -> Array:
    """[30, 40, 8]: three heat maps, (dx, dy, w, h) in cells, and the weight of the box loss."""
    result = np.zeros((*GRID, 8), np.float32)
    rows, columns = np.mgrid[0:GRID[0], 0:GRID[1]].astype(np.float32)
    for label, x0, y0, x1, y1 in boxes:
        x, y, w, h = (x0 + x1) / 16, (y0 + y1) / 16, (x1 - x0) / 8, (y1 - y0) / 8
        column, row = min(int(x), GRID[1] - 1), min(int(y), GRID[0] - 1)
        spread = max(0.7, 0.16 * math.sqrt(w * h))
        bump = np.exp(-((columns - column) ** 2 + (rows - row) ** 2) / (2 * spread**2))
        result[..., label] = np.maximum(result[..., label], bump)
        # Cells around the centre learn the box too: after quantization the peak may sit one cell off.
        near = (np.abs(columns - column) <= 1) & (np.abs(rows - row) <= 1) & (bump > result[..., 7])
        result[near, 3] = x - columns[near]
        result[near, 4] = y - rows[near]
        result[near, 5:7] = (w, h)
        result[near, 7] = bump[near]
    return result


def _loss(tf: Any, truth: Any, heat: Any, box: Any) -> Any:
    """Penalty-reduced focal loss of the heat map plus size-relative L1 of the boxes (Zhou et al. 2019, 'Objects as
    Points', eq. 1 to 3, with the box error divided by the part's size)."""
    goal = truth[..., :3]
    probability = tf.clip_by_value(tf.sigmoid(heat), 1e-5, 1 - 1e-5)
    centre = tf.cast(goal > 0.999, tf.float32)
    hit = -tf.math.log(probability) * (1 - probability) ** 2 * centre
    miss = -tf.math.log(1 - probability) * probability**2 * (1 - goal) ** 4 * (1 - centre)
    parts = tf.maximum(tf.reduce_sum(centre), 1.0)
    weight = truth[..., 7:]
    size = tf.maximum(truth[..., 5:7], 1.0)
    error = tf.concat([tf.abs(box[..., :2] - truth[..., 3:5]) * 2, tf.abs(box[..., 2:] - truth[..., 5:7])], -1)
    error = error / tf.concat([size, size], -1) * weight
    return tf.reduce_sum(hit + miss) / parts + 2.0 * tf.reduce_sum(error) / tf.maximum(tf.reduce_sum(weight), 1.0)


def _batches(sets: list[Dataset], batch: int, jitter: float, rng: np.random.Generator) -> Any:
    index = [(s, i) for s, data in enumerate(sets) for i in range(len(data.boxes))]
    order = rng.permutation(len(index))
    for first in range(0, len(order) - batch + 1, batch):
        pictures = np.empty((batch, 240, 320, 3), np.uint8)
        truth = np.empty((batch, *GRID, 8), np.float32)
        for slot, at in enumerate(order[first:first + batch]):
            s, i = index[at]
            pictures[slot], boxes = augment(sets[s].pictures[i], sets[s].boxes[i], rng, jitter)
            truth[slot] = targets(boxes)
        yield pictures, truth


class Ahead:
    """Batches of one epoch, made one step ahead in a thread while TensorFlow works."""

    def __init__(self, sets: list[Dataset], batch: int, jitter: float, rng: np.random.Generator) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._batches = _batches(sets, batch, jitter, rng)

    def __enter__(self) -> Any:
        return self._ahead()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def _ahead(self) -> Any:
        waiting = self._pool.submit(next, self._batches, None)
        while (ready := waiting.result()) is not None:
            waiting = self._pool.submit(next, self._batches, None)
            yield ready


def fit(model: Any, sets: list[Dataset], plan: dict[str, Any], jitter: float) -> None:
    """Train what is trainable in `model` for `plan`'s epochs; Adam with a warm-up and a cosine."""
    import tensorflow as tf

    rng = np.random.default_rng(plan["seed"])
    steps = plan["epochs"] * (sum(len(s.boxes) for s in sets) // plan["batch"])
    rate = tf.keras.optimizers.schedules.CosineDecay(0.0, steps, alpha=0.02, warmup_target=plan["rate"],
                                                     warmup_steps=plan["warmup"])
    optimizer = tf.keras.optimizers.Adam(rate)

    @tf.function
    def step(pictures: Any, truth: Any) -> Any:
        with tf.GradientTape() as tape:
            heat, box = model(tf.cast(pictures, tf.float32) / 255.0, training=True)
            value = _loss(tf, truth, heat, box)
        variables = model.trainable_variables
        gradients, _ = tf.clip_by_global_norm(tape.gradient(value, variables), 10.0)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return value

    for epoch in range(plan["epochs"]):
        began = time.monotonic()
        with Ahead(sets, plan["batch"], jitter, rng) as batches:
            losses = [float(step(*b)) for b in batches]
        print(f"epoch {epoch + 1}/{plan['epochs']} loss {np.mean(losses):.3f} {time.monotonic() - began:.0f} s",
              flush=True)


def validate(network: Any, weights: Any, data: Dataset) -> dict[float, float]:
    """F1 of the float network on validation pictures by score threshold: spec.toml's threshold is chosen here."""
    from models import export

    heat, box = export.float_outputs(network, weights, data.pictures.astype(np.float32) / np.float32(255))
    scores = {}
    for threshold in THRESHOLDS:
        counts = [pipeline.count(pipeline.decode(h, b, (640, 480), threshold), t)
                  for h, b, t in zip(heat, box, data.boxes, strict=True)]
        scores[threshold] = round(pipeline.score(counts, resamples=10).f1, 4)
    return scores


def conversion_error(network: Any, weights: Any, data: Dataset, folder: Path) -> dict[str, float]:
    """Mean absolute difference of each component's outputs from the float network's, on validation pictures."""
    from models import export

    few = data.pictures[:32]
    wanted = export.float_outputs(network, weights, few.astype(np.float32) / np.float32(255))
    names = export.tflite_output_names(folder / "int8.tflite", (3, 4))
    runs = {"tflite": pipeline.tflite_network(folder / "int8.tflite", names),
            "onnx": pipeline.onnx_network(folder / "int8.onnx", ("heat", "box"))}
    errors = {}
    for runtime, run in runs.items():
        got = [run(picture) for picture in few]
        hot = np.max(wanted[0], axis=-1) > 0.3
        errors[f"{runtime}_heat"] = float(np.mean([np.abs(g[0] - w).mean() for g, w in zip(got, wanted[0],
                                                                                         strict=True)]))
        errors[f"{runtime}_box_at_parts"] = float(np.abs(np.stack([g[1] for g in got]) - wanted[1])[hot].mean())
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that receives 1.0.0/ and 1.1.0/")
    parser.add_argument("--cache", type=Path, required=True, help="folder for drawn pictures and float weights")
    parser.add_argument("--only", choices=["1.0.0", "1.1.0"], help="build one release (1.1.0 needs the cached 1.0.0)")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    import tensorflow as tf

    from models import export
    from models.parts.network import PARTS

    recipe = tomllib.loads((HERE / "recipe.toml").read_text())
    tf.keras.utils.set_random_seed(recipe["seed"])
    drawn = recipe["data"]

    def load(light: scene.Light, what: str) -> Dataset:
        start, number = drawn[what][light]
        return dataset(light, start, number, arguments.cache, arguments.workers)

    check = {light: load(light, "validation") for light in scene.LIGHTS}
    calibration = load("day", "calibration").pictures.astype(np.float32) / np.float32(255)
    model = export.training_model(PARTS, {"heat": -4.0})
    print(f"{model.count_params()} parameters", flush=True)
    for version in ("1.0.0", "1.1.0"):
        plan = recipe["release"][version]
        stored = arguments.cache / f"{version}.weights.h5"
        if arguments.only in (None, version):
            for layer in model.layers:
                layer.trainable = not plan["tuned"] or layer.name.startswith(tuple(plan["tuned"]))
            fit(model, [load(light, "train") for light in plan["lights"]], plan, recipe["augment"]["jitter"])
            model.save_weights(stored)
            weights = export.fold(PARTS, model)
            print(version, {light: validate(PARTS, weights, data) for light, data in check.items()})
            folder = arguments.out / version
            folder.mkdir(parents=True, exist_ok=True)
            export.write_tflite(PARTS, weights, calibration, folder / "int8.tflite")
            export.write_onnx(PARTS, weights, calibration, folder / "int8.onnx")
            print(version, conversion_error(PARTS, weights, check["day"], folder))
        else:
            model.load_weights(stored)


if __name__ == "__main__":
    main()
