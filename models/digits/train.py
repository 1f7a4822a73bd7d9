#!/usr/bin/env python3
"""Train, calibrate and write both releases of the digits line, and the held-out data: `train.py [--out DIR]`.

1.0.0 learns the first 250 pictures; 1.1.0 starts from it and learns 850, with only the last two layers free.
Every number comes from recipe.toml. Held-out pictures are written to heldout.npz and not otherwise read.
Needs tensorflow-cpu, onnx, onnxruntime and scikit-learn (see recipe.toml); nothing on a device does.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import cv2
import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]
GOLDEN = {"seven.png": 7, "three.png": 3, "eight.png": 8}


def network() -> Any:
    """Three 3x3 convolutions that halve the picture twice, a 3x3 that reaches 1x1, ten probabilities."""
    from models.export import Layer, Network

    return Network((8, 8, 1), (
        Layer("conv", "conv1", ("x",), 16, kernel=3),
        Layer("conv", "conv2", ("conv1",), 32, kernel=3, stride=2),
        Layer("conv", "conv3", ("conv2",), 64, kernel=3, stride=2),
        Layer("conv", "conv4", ("conv3",), 32, kernel=3, stride=2),
        Layer("conv", "probs", ("conv4",), 10, activation="softmax", normed=False),
    ), ("probs",))


def pictures() -> tuple[Picture, NDArray[np.int64]]:
    """All 1797 pictures as uint8 0..255 [n, 8, 8], and their digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def augment(batch: Picture, options: dict[str, float], rng: np.random.Generator) -> Array:
    """Shift, turn and zoom each picture a little; [n, 8, 8, 1] in 0..1."""
    result = np.empty((len(batch), 8, 8, 1), np.float32)
    for slot, picture in enumerate(batch):
        turn = cv2.getRotationMatrix2D((3.5, 3.5), float(rng.normal(0, options["turn_degrees"])),
                                       1 + float(rng.normal(0, options["zoom"])))
        shift = np.zeros((2, 3))
        shift[:, 2] = rng.normal(0, options["shift_px"] / 2, 2)
        result[slot, ..., 0] = cv2.warpAffine(picture.astype(np.float32) / np.float32(255), turn + shift, (8, 8))
    return result


def fit(model: Any, images: Picture, labels: NDArray[np.int64], plan: dict[str, Any],
        options: dict[str, float]) -> None:
    """Train what is trainable in `model` with Adam and a cosine, on fresh augmentations each epoch."""
    import tensorflow as tf

    rng = np.random.default_rng(plan["seed"])
    steps = plan["epochs"] * (len(images) // plan["batch"])
    optimizer = tf.keras.optimizers.Adam(tf.keras.optimizers.schedules.CosineDecay(plan["rate"], steps, 0.02))

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = tf.reshape(tf.nest.flatten(model(x, training=True))[0], [-1, 10])
            value = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        optimizer.apply_gradients(zip(tape.gradient(value, model.trainable_variables), model.trainable_variables,
                                      strict=True))
        return value

    for epoch in range(plan["epochs"]):
        order = rng.permutation(len(images))
        losses = []
        for first in range(0, len(order) - plan["batch"] + 1, plan["batch"]):
            chosen = order[first:first + plan["batch"]]
            losses.append(float(step(augment(images[chosen], options, rng), labels[chosen])))
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1} loss {np.mean(losses):.4f}", flush=True)


def write_heldout(images: Picture, labels: NDArray[np.int64], data: dict[str, list[int]], out: Path) -> None:
    """heldout.npz: the held-out pictures, their digits, and what the two trivial baselines learned from training."""
    train, held = slice(*data["train"]), slice(*data["heldout"])
    centroids = np.stack([images[train][labels[train] == d].mean(axis=0) for d in range(10)]).astype(np.float32)
    np.savez_compressed(out / "heldout.npz", images=images[held], labels=labels[held].astype(np.uint8),
                        centroids=centroids, majority=np.bincount(labels[train]).argmax().astype(np.uint8))
    (out / "golden").mkdir(exist_ok=True)
    for name, digit in GOLDEN.items():
        cv2.imwrite(str(out / "golden" / name), images[held][labels[held] == digit][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that receives the releases and heldout.npz")
    arguments = parser.parse_args()
    import tensorflow as tf

    from models import export

    recipe = tomllib.loads((HERE / "recipe.toml").read_text())
    tf.keras.utils.set_random_seed(recipe["seed"])
    images, labels = pictures()
    graph = network()
    model = export.training_model(graph, {})
    scaled = images[..., None].astype(np.float32) / np.float32(255)
    check = slice(*recipe["data"]["validation"])
    for version in ("1.0.0", "1.1.0"):
        plan = recipe["release"][version]
        for layer in model.layers:
            layer.trainable = not plan["tuned"] or layer.name.startswith(tuple(plan["tuned"]))
        chosen = slice(*plan["train"])
        fit(model, images[chosen], labels[chosen], plan, recipe["augment"])
        weights = export.fold(graph, model)
        (found,) = export.float_outputs(graph, weights, scaled[check])
        print(version, "validation accuracy", float((found.argmax(axis=1) == labels[check]).mean()))
        folder = arguments.out / version
        folder.mkdir(parents=True, exist_ok=True)
        calibration = scaled[slice(*recipe["data"]["calibration"])]
        export.write_tflite(graph, weights, calibration, folder / "int8.tflite")
        export.write_onnx(graph, weights, calibration, folder / "int8.onnx")
        print(version, export.tflite_output_names(folder / "int8.tflite", (10,)))
    write_heldout(images, labels, recipe["data"], arguments.out)


if __name__ == "__main__":
    main()
