"""The shipped pipeline at a camera's pace and as fast as it can: source process, ring, model worker, results; the same
in one process (fused); beside the bare loop."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from agent import memfd
from agent.config import LineConfig
from agent.daemon.fusedsource import FusedSource
from agent.daemon.lines import LineRuntime
from agent.daemon.selection import Verdict, quantile
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import Supervisor, default_host_command
from agent.protocol import Result
from agent.recording import WorkerRecorder
from agent.sourceconfig import SourceConfig
from agent.workbench import LIMITS
from ota.client.ports import Candidate
from ota.publisher import spec
from ota.publisher.build import build_release
from ota.publisher.create import create
from ota.release import Component
from tests.bench.setting import DATA, PARTS, Pressure, Setting

FPS = 30.0
VWW = DATA / "mlperf-tiny" / "vww_96_int8.tflite"
VWW_SPEC = {
    "line": "vww", "version": "1.0.0", "task": "classification", "licence": "Apache-2.0",
    "labels": ["no person", "person"],
    "preprocess": {"resize": "stretch", "interpolation": "linear", "color": "rgb",
                   "mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0]},
    "golden": {"images": [str(DATA / "tflite-micro" / "person.png")]},
}  # fmt: skip
ROUNDS, LENGTH = 3, 0.4
"""How many times more rounds than of other comparisons, and of what share of their length."""
GOALS = {"p50": 1.05, "shipped": 1.15, "fused": 1.08, "p99_ms": 2.0, "rate": 1.3}


@dataclass(frozen=True)
class Figures:
    """One round: CPU milliseconds per frame, tick-to-result latency, frames per second, the machine's CPU pressure in
    percent meanwhile, and what the bare loop's process holds."""

    cpu_ms: float
    daemon_cpu_ms: float
    p50_ms: float
    p99_ms: float
    fps: float
    pressure: float
    rss_mb: float = 0.0


def bench(setting: Setting) -> dict[str, Any]:
    """Every model in every way, paced and unpaced; prints the ratios."""
    models = {"parts 1.0.0": (PARTS / "1.0.0" / "int8.tflite", spec.load(PARTS / "1.0.0" / "spec.toml"))}
    if VWW.exists():
        models["vww_96_int8"] = (VWW, spec.parse({**VWW_SPEC, "component": [{"file": VWW.name}]}, VWW.parent))
    else:
        print(f"\npipeline: vww_96_int8 left out: {VWW} is absent")
    kept: dict[str, Any] = {}
    for name, (file, described) in models.items():
        model = candidate(setting.folder / name.replace(" ", "-"), described)
        for fps in (FPS, 0.0):
            rounds: dict[str, list[Figures]] = {"bare": [], "shipped": [], "fused": []}
            # short ones and many: the speed of a virtual machine's cores changes by a third within a minute
            seconds = setting.seconds * LENGTH
            for _ in range(setting.rounds * ROUNDS):
                rounds["bare"].append(bare(setting.clip, file, fps, seconds))
                for way in ("shipped", "fused"):
                    rounds[way].append(asyncio.run(shipped(setting.clip, fps, seconds, model, fused=way == "fused")))
            report(name, fps, rounds)
            key = f"{name}, {'30 fps' if fps else 'full rate'}"
            kept[key] = {way: [asdict(f) for f in figures] for way, figures in rounds.items()}
    return kept


def report(name: str, fps: float, rounds: dict[str, list[Figures]]) -> None:
    """Print one comparison: best of each way's rounds, its ratio to the bare loop's, and the median of the ratios of
    rounds that followed each other."""
    ways = list(rounds)
    pressures = [f.pressure for figures in rounds.values() for f in figures]
    pace = f"at {fps:.0f} fps" if fps else "as fast as it can"
    print(f"\n640x480 MJPEG {pace}, {name} on litert:xnnpack, best of {len(rounds['bare'])} rounds;"
          f" CPU pressure {min(pressures):.0f} to {max(pressures):.0f} %")  # fmt: skip
    print(f"  {'':24}" + "".join(f"{way:>11}" for way in ways) + "".join(f"{way:>19}" for way in ways[1:]))
    if not fps:
        rates = {way: [f.fps for f in figures] for way, figures in rounds.items()}
        _row("frames/s", rates, max, f"goal {GOALS['rate']}x where decoding dominates")
        return
    for key, title, goal in (
        ("p50_ms", "tick to result p50, ms", f"goal {GOALS['p50']}"),
        ("p99_ms", "p99, ms", f"goal bare + {GOALS['p99_ms']:.0f} ms"),
        ("cpu_ms", "CPU ms, workers", f"goals {GOALS['shipped']}, {GOALS['fused']}"),
    ):
        _row(title, {way: [getattr(f, key) for f in figures] for way, figures in rounds.items()}, min, goal)
    _row("CPU ms, with the daemon", {w: [f.cpu_ms + f.daemon_cpu_ms for f in fs] for w, fs in rounds.items()}, min, "")
    print(f"  the bare loop's process holds {max(f.rss_mb for f in rounds['bare']):.1f} MB")


def _row(title: str, values: dict[str, list[float]], best: Callable[[list[float]], float], goal: str) -> None:
    bare, *ways = values
    print(f"  {title:24}" + "".join(f"{best(found):11.3f}" for found in values.values()), end="")
    for way in ways:
        paired = median(own / other for own, other in zip(values[way], values[bare], strict=True))
        print(f"{best(values[way]) / best(values[bare]):11.2f}x ({paired:.2f})", end="")
    print(f"  {goal}")


def candidate(folder: Path, described: spec.Spec) -> Candidate:
    """A release of the spec, its files opened from the publisher's own plaintexts."""
    folder.mkdir()
    repository = create(folder / "repo")
    release = build_release(repository, described, recorder=WorkerRecorder())

    async def open_plain(component: Component) -> int:
        return memfd.of_bytes(component.name, (folder / "repo/vault/plain" / component.plain_sha256).read_bytes())

    return Candidate(release, release.components[0], open_plain)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, every thread, exact: what /proc/PID/stat says is sampled at the timer's ticks,
    at which a paced process likes to be awake."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def shipped(clip: Path, fps: float, seconds: float, model: Candidate, *, fused: bool = False) -> Figures:
    """One round of the shipped pipeline, paced or, for 0, as fast as the model takes frames."""
    results: list[Result] = []
    supervisor = Supervisor(listen=None, host_command=default_host_command(), on_lost=lambda: None)
    await supervisor.start()
    policy = "live" if fps else "every"
    options = {"path": str(clip), "policy": policy, "loop": True, "queue_frames": 4, "fps": fps}
    source = (FusedSource if fused else SourceRuntime)(
        SourceConfig("belt", "video", options), supervisor,
        on_dropped=lambda *_: None, on_restarted=lambda _: None, on_state=lambda _: None,
    )  # fmt: skip
    line = LineRuntime(
        LineConfig("parts", "belt", 1, "never", ()), source, supervisor, LIMITS,
        on_result=lambda _, result: results.append(result), on_event=lambda *_: None,
    )  # fmt: skip
    source.start()
    await line.serve(model, Verdict(model.component.name, "litert:xnnpack"))
    await asyncio.sleep(1.0)
    assert line.serving is not None
    pids = sorted({line.serving.worker.pid, source.pid})
    results.clear()
    pressure, began = Pressure(), time.monotonic()
    before, own = sum(map(cpu_s, pids)), time.process_time()
    await asyncio.sleep(seconds)
    after, own_after = sum(map(cpu_s, pids)), time.process_time()
    got, took, pressed = list(results), time.monotonic() - began, pressure.percent
    await line.stop()
    await source.stop()
    await supervisor.stop()
    latencies = [(r.t_done_ns - r.t_frame_ns) / 1e6 for r in got]
    return Figures(
        1000 * (after - before) / len(got),
        1000 * (own_after - own) / len(got),
        quantile(latencies, 0.5),
        quantile(latencies, 0.99),
        len(got) / took,
        pressed,
    )


def bare(clip: Path, model: Path, fps: float, seconds: float) -> Figures:
    """One round of the bare loop."""
    pressure = Pressure()
    command = [sys.executable, str(Path(__file__).with_name("inline.py")), clip, model, fps, seconds]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    f = json.loads(done.stdout.splitlines()[-1])
    rate = f["frames"] / f["seconds"]
    return Figures(1000 * f["cpu_s"] / f["frames"], 0.0, f["p50_ms"], f["p99_ms"], rate, pressure.percent, f["rss_mb"])
