"""`make bench`: what the pipeline costs beside a bare loop, what the daemon weighs, what a delta saves, how fast 20 MB
arrive over MQTT and over HTTPS.

Rounds are interleaved, figures are minima over rounds (other load only ever adds), and the CPU pressure of the machine
stands beside them. Nothing is asserted; build/bench.json keeps every round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import device, pipeline, transfer  # noqa: E402

FPS = 30.0
PARTS = ROOT / "models" / "parts"


def pressure() -> str:
    """Share of the last ten seconds in which something waited for a CPU."""
    try:
        return Path("/proc/pressure/cpu").read_text().split()[1].partition("=")[2] + " %"
    except OSError:
        return "unknown"


def bench_pipeline(folder: Path, clip: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """CPU and latency per frame, shipped against bare."""
    model = pipeline.candidate(folder, PARTS / "1.0.0" / "spec.toml")
    kept: dict[str, list[pipeline.Figures]] = {"bare": [], "shipped": []}
    for _ in range(rounds):
        kept["bare"].append(pipeline.bare(clip, PARTS / "1.0.0" / "int8.tflite", FPS, seconds))
        kept["shipped"].append(asyncio.run(pipeline.shipped(clip, FPS, seconds, model)))
    least = {
        name: {key: min(getattr(f, key) for f in figures) for key in ("cpu_ms", "daemon_cpu_ms", "p50_ms", "p99_ms")}
        for name, figures in kept.items()
    }
    ours, theirs = least["shipped"], least["bare"]
    print(f"\nper frame, 640x480 MJPEG at {FPS:.0f} fps, parts 1.0.0 on litert:xnnpack, minima of {rounds} rounds")
    print(f"  CPU pressure {pressure()}")
    print(f"  {'':22}{'bare loop':>12}{'shipped':>12}{'ratio':>9}")
    for key, name in (("p50_ms", "tick to result p50 ms"), ("p99_ms", "p99 ms"), ("cpu_ms", "CPU ms, workers")):
        print(f"  {name:22}{theirs[key]:12.3f}{ours[key]:12.3f}{ours[key] / theirs[key]:9.2f}")
    whole = ours["cpu_ms"] + ours["daemon_cpu_ms"]
    print(f"  {'CPU ms, with daemon':22}{theirs['cpu_ms']:12.3f}{whole:12.3f}{whole / theirs['cpu_ms']:9.2f}")
    return {"least": least, "rounds": {name: [asdict(f) for f in figures] for name, figures in kept.items()}}


def make_clip(folder: Path) -> Path:
    """The video that pipeline and device look at."""
    clip = folder / "clip.avi"
    if not clip.exists():
        command = [sys.executable, str(PARTS / "clip.py"), str(clip), "--seconds", "12", "--fps", "30"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return clip


def main() -> int:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", choices=("pipeline", "device", "transfer"), action="append", default=[])
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as name:
        folder = Path(name)
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "pipeline": lambda: bench_pipeline(folder, make_clip(folder), args.rounds, args.seconds),
            "device": lambda: device.bench(folder / "device", make_clip(folder), pressure),
            "transfer": lambda: transfer.bench(folder / "transfer", pressure),
        }
        kept = {section: measure() for section, measure in sections.items() if not args.only or section in args.only}
    out = ROOT / "build" / "bench.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\n{time.monotonic() - began:.0f} s; every round is in {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
