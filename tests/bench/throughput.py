"""What batches, threads and further sessions bring, for each runtime, on the shipped detector.

The agent runs batch 1 on one thread: a camera's frames come one by one, and a device has other things to do. This says
what that costs on this machine. Best of interleaved rounds, each in a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx

from tests.bench.setting import PARTS, Pressure, Setting

BATCHES = (1, 4, 8, 16)
RUNTIMES = ("litert", "onnx", "openvino")
SIDE_BY_SIDE = (("1 thread", 1, 1), ("2 threads", 2, 1), ("2 sessions", 1, 2))
ROUND_S = 1.0

Key = tuple[str, str]


def bench(setting: Setting) -> dict[str, Any]:
    """Measure and print."""
    models = {"litert": PARTS / "1.0.0" / "int8.tflite", "onnx": _open_batch(setting.folder)}
    models["openvino"] = models["onnx"]
    plans: dict[Key, tuple[int, int, int]] = {}
    for runtime in RUNTIMES:
        plans |= {(runtime, f"batch {batch}"): (batch, 1, 1) for batch in BATCHES}
        plans |= {(runtime, name): (1, threads, sessions) for name, threads, sessions in SIDE_BY_SIDE[1:]}
    rounds: dict[Key, list[dict[str, float]]] = {key: [] for key in plans}
    pressure = Pressure()
    for _ in range(setting.rounds):
        for key, plan in plans.items():
            rounds[key].append(_once(key[0], models[key[0]], *plan))
    best = {key: max(found, key=lambda one: one["images"] / one["wall_s"]) for key, found in rounds.items()}
    _show(best, pressure.percent, setting.rounds)
    return {
        "cpu_pressure_percent": pressure.percent,
        "rounds": {f"{runtime} {name}": found for (runtime, name), found in rounds.items()},
    }


def _show(best: dict[Key, dict[str, float]], pressure: float, rounds: int) -> None:
    print(
        f"\nthroughput of the shipped detector (320x240, int8), best of {rounds} rounds; CPU pressure {pressure:.0f} %"
    )
    for title, names in (
        ("images a second by batch, one thread (ratio to batch 1; CPU ms an image)", [f"batch {b}" for b in BATCHES]),
        ("batch 1, side by side", ["batch 1", "2 threads", "2 sessions"]),
    ):
        print(f"  {title}")
        for runtime in RUNTIMES:
            one = best[runtime, "batch 1"]
            cells = []
            for name in names:
                found = best[runtime, name]
                rate = found["images"] / found["wall_s"]
                ratio = rate / (one["images"] / one["wall_s"])
                cells.append(f"{name}: {rate:6.0f}/s {ratio:4.2f}x {1000 * found['cpu_s'] / found['images']:5.2f} ms")
            print(f"    {runtime:9s} " + "   ".join(cells))


def _once(runtime: str, model: Path, batch: int, threads: int, sessions: int) -> dict[str, float]:
    words = [runtime, model, batch, threads, sessions, ROUND_S]
    command = [sys.executable, str(Path(__file__).with_name("batched.py")), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _open_batch(folder: Path) -> Path:
    """The shipped .onnx detector with its batch left open; nothing in it depends on it."""
    model = onnx.load(str(PARTS / "1.0.0" / "int8.onnx"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    place = folder / "batch.onnx"
    onnx.save(model, str(place))
    return place
