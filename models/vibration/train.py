#!/usr/bin/env python3
"""Train, calibrate and write both releases of the vibration line: `train.py [--out DIR]`.

1.0.0 learns healthy machines at full load; 1.1.0 starts from it and learns part load too, with only its last two layers
free. Every number comes from recipe.toml; held-out machines are never read. Thresholds are chosen on validation
machines, with the int8 TFLite file. Needs what recipe.toml pins; TensorFlow and onnx are no part of a device.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from models.vibration import dataset, machine, score  # noqa: E402

Array = NDArray[np.float32]
SPEC = """\
line = "vibration"
version = "{version}"
task = "anomaly"
licence = "Apache-2.0"

[preprocess]
kind = "signal"
rate_hz = {rate_hz}
window = {window}
channels = {channels}
detrend = {detrend}
features = [
{features}
]
mean = {mean}
std = {std}
clip = [0.0, 1.0]

[postprocess]
kind = "anomaly"
threshold = {threshold}

[golden]
images = ["../golden/healthy.npy", "../golden/inner_race.npy", "../golden/misalignment.npy"]

[[component]]
file = "int8.tflite"
outputs = ["{tflite_output}"]

[[component]]
file = "int8.onnx"
outputs = ["y"]
"""


def network(values: int) -> Any:
    """An autoencoder through sixteen numbers: dense layers, written as convolutions over one pixel."""
    from models.export import Layer, Network

    return Network((1, 1, values), (
        Layer("conv", "narrow", ("x",), 96),
        Layer("conv", "code", ("narrow",), 16),
        Layer("conv", "widen", ("code",), 96),
        Layer("conv", "y", ("widen",), values, activation="linear", normed=False),
    ), ("y",))


def healthy(recipe: dict[str, Any], part: str, loads: str, each: int) -> Array:
    """Values of healthy windows as the features give them, [n, values]."""
    tensors = dataset.Tensors(recipe["preprocess"])
    found = dataset.windows(part, machine.HEALTHY, each, tuple(recipe["data"][loads]))
    return np.stack([tensors(window.samples) for window in found])


def fit(model: Any, values: Array, plan: dict[str, Any]) -> None:
    """Train what is trainable in `model` to give its input back, a little noise taken off; Adam and a cosine."""
    import tensorflow as tf

    rng = np.random.default_rng(plan["seed"])
    steps = plan["epochs"] * (len(values) // plan["batch"])
    optimizer = tf.keras.optimizers.Adam(tf.keras.optimizers.schedules.CosineDecay(plan["rate"], steps, 0.01))

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            error = tf.reduce_mean((tf.nest.flatten(model(x, training=True))[0] - y) ** 2)
        optimizer.apply_gradients(zip(tape.gradient(error, model.trainable_variables), model.trainable_variables,
                                      strict=True))
        return error

    for epoch in range(plan["epochs"]):
        order = rng.permutation(len(values))
        losses = []
        for first in range(0, len(order) - plan["batch"] + 1, plan["batch"]):
            chosen = values[order[first:first + plan["batch"]]][:, None, None]
            noisy = chosen + rng.normal(0, plan["noise"], chosen.shape).astype(np.float32)
            losses.append(float(step(np.clip(noisy, 0, 1), chosen)))
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1} loss {np.mean(losses):.6f}", flush=True)


def numbers(values: Array) -> str:
    """A list for TOML, four digits each."""
    return "[" + ", ".join(f"{float(v):.4g}" if float(f"{v:.4g}") % 1 else f"{v:.1f}" for v in values) + "]"


def write_spec(recipe: dict[str, Any], version: str, low: Array, span: Array, threshold: float, folder: Path,
               output: str) -> None:
    """spec.toml of a release."""
    preprocess = recipe["preprocess"]
    features = [", ".join(f"{key} = {_toml(value)}" for key, value in feature.items())
                for feature in preprocess["features"]]
    (folder / "spec.toml").write_text(SPEC.format(
        version=version, rate_hz=preprocess["rate_hz"], window=preprocess["window"], channels=preprocess["channels"],
        detrend=_toml(preprocess["detrend"]), features="\n".join(f"    {{ {f} }}," for f in features),
        mean=numbers(low), std=numbers(span), threshold=f"{threshold:.5f}", tflite_output=output))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def write_golden(out: Path) -> None:
    """golden/*.npy: one healthy window and two faulty ones, of a validation machine."""
    (out / "golden").mkdir(exist_ok=True)
    unit = machine.machine(machine.MACHINES["validation"][0])
    for seed, (name, severity) in enumerate(((machine.HEALTHY, 0.0), ("inner_race", 2.0), ("misalignment", 2.0))):
        samples = machine.record(unit, machine.State(0.9, name, severity), seed)
        np.save(out / "golden" / f"{name}.npy", samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that receives the releases and golden/")
    arguments = parser.parse_args()
    import tensorflow as tf

    from models import export

    recipe = tomllib.loads((HERE / "recipe.toml").read_text())
    tf.keras.utils.set_random_seed(recipe["seed"])
    drawn = recipe["data"]
    full = healthy(recipe, "train", "full_load", drawn["train"])
    deviation = full.std(axis=0) + np.float32(1e-6)
    span = np.array([float(f"{v:.4g}") for v in deviation * recipe["range"]["span"]], np.float32)
    low = np.array([float(f"{v:.4g}") for v in full.mean(axis=0) - deviation * recipe["range"]["below"]], np.float32)

    def scaled(values: Array) -> Array:
        return np.clip((values - low) / span, 0, 1)

    learned = {"full_load": scaled(full), "part_load": scaled(healthy(recipe, "train", "part_load", drawn["train"]))}
    checked = {name: scaled(healthy(recipe, "validation", name, drawn["validation"])) for name in learned}
    calibration = np.concatenate([values[::len(values) // (100 * drawn["calibration"])] for values in learned.values()])
    graph = network(full.shape[1])
    model = export.training_model(graph, {})
    for version, plan in recipe["release"].items():
        for layer in model.layers:
            layer.trainable = not plan["tuned"] or layer.name.startswith(tuple(plan["tuned"]))
        fit(model, learned[plan["loads"]], plan)
        weights = export.fold(graph, model)
        folder = arguments.out / version
        folder.mkdir(parents=True, exist_ok=True)
        pixels = calibration[:, None, None]
        export.write_tflite(graph, weights, pixels, folder / "int8.tflite")
        export.write_onnx(graph, weights, pixels, folder / "int8.onnx")
        (output,) = export.tflite_output_names(folder / "int8.tflite", (full.shape[1],))
        score_of = score.tflite(folder / "int8.tflite")
        scores = np.array([score_of(values) for values in checked[plan["loads"]]])
        threshold = float(np.quantile(scores, 1 - recipe["threshold"]["alarms"]))
        print(version, "threshold", threshold, "median", float(np.median(scores)))
        write_spec(recipe, version, low, span, threshold, folder, output)
    write_golden(arguments.out)


if __name__ == "__main__":
    main()
