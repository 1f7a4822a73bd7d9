"""What each camera and each model costs, and a picture of it over time.

One run goes through phases: a camera, a model on it, a second model on the same camera, a second camera with a model of
its own, the first model replaced under its camera. CPU and memory of every process are looked at twice a second; the
cost of a thing is the difference between the phases with and without it. The picture is build/resources.svg.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import memfd, protocol
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import Supervisor, default_host_command
from agent.daemon.worker import Worker
from agent.sourceconfig import SourceConfig
from tests.bench.memory import pss_mb
from tests.bench.pipeline import cpu_s
from tests.bench.setting import PARTS, ROOT, Pressure, Setting

FPS = 30.0
PHASE_S = 6.0
SAMPLE_S = 0.5
TIMEOUT_S = 60.0
SETTLE_SAMPLES = 4
"""Samples at the start of a phase that belong to what starts in it."""
DIGITS = ROOT / "models" / "digits" / "1.1.0" / "int8.tflite"
DETECTOR = PARTS / "1.0.0" / "int8.tflite"
COLOURS = ("#4c6a92", "#d08a4e", "#6a9a5b", "#b5555a", "#8a6fa8", "#5aa0a8", "#a8905a")

_DETECT = {
    "task": "detection",
    "labels": ["a", "b", "c"],
    "preprocess": {"resize": "stretch", "color": "rgb", "mean": [0.0], "std": [255.0]},
    "postprocess": {"kind": "centernet", "stride": 8, "threshold": 0.35, "max_detections": 100, "nms_iou": 0.5},
}
_CLASSIFY = {"task": "raw", "preprocess": {"color": "gray", "mean": [0.0], "std": [255.0]}}


@dataclass(slots=True)
class _Process:
    """One process of the run: what it is called and what was seen of it, (time, CPU share of a core, PSS in MB)."""

    name: str
    pid: int
    seen: list[tuple[float, float, float]] = field(default_factory=list)
    last: tuple[float, float] = (0.0, 0.0)


class _Run:
    """The processes of a small device, started one after the other."""

    def __init__(self, clip: Path) -> None:
        self._clip = clip
        self._supervisor = Supervisor(listen=None, host_command=default_host_command(), on_lost=lambda: None)
        self._sources: list[SourceRuntime] = []
        self.processes: list[_Process] = []
        self.phases: list[tuple[float, str]] = []
        self._began = time.perf_counter()

    async def start(self) -> None:
        """The host alone."""
        await self._supervisor.start()
        probe = await self._supervisor.spawn("model")
        self._watch("host", int(Path(f"/proc/{probe.pid}/stat").read_text().split()[3]))
        probe.kill()

    async def camera(self, name: str) -> SourceRuntime:
        """One more camera; it rests until somebody looks."""
        options = {"path": str(self._clip), "policy": "live", "loop": True, "queue_frames": 4, "fps": FPS}
        source = SourceRuntime(
            SourceConfig(name, "video", options), self._supervisor,
            on_dropped=lambda *_: None, on_restarted=lambda _: None, on_state=lambda _: None,
        )  # fmt: skip
        source.start()
        self._sources.append(source)
        return source

    async def model(self, name: str, source: SourceRuntime, file: Path, graph: dict[str, Any]) -> Worker:
        """One more model that looks at `source`."""
        worker = await self._supervisor.spawn("model")
        worker.on_message = lambda packet: packet.close()
        outputs = await self._outputs(file) if graph is _DETECT else []
        await _load(worker, file, graph, outputs)
        await source.attach(name, worker, active=True, timeout_s=TIMEOUT_S)
        if not any(process.pid == source.pid for process in self.processes):
            self._watch(source.config.name, source.pid)
        self._watch(name, worker.pid)
        return worker

    async def _outputs(self, file: Path) -> list[Any]:
        """The detector's outputs in the order of its release: the heat map has fewer channels than the boxes."""
        probe = await self._supervisor.spawn("trial")
        loaded = await _load(probe, file, {"task": "raw"}, [])
        probe.kill()
        return sorted(loaded.outputs, key=lambda spec: spec["shape"][-1])

    async def phase(self, name: str) -> None:
        """Look at everything for a while."""
        self.phases.append((time.perf_counter() - self._began, name))
        end = time.perf_counter() + PHASE_S
        while time.perf_counter() < end:
            await asyncio.sleep(SAMPLE_S)
            self._look()

    async def stop(self) -> None:
        """End everything."""
        for source in self._sources:
            await source.stop()
        await self._supervisor.stop()

    def _watch(self, name: str, pid: int) -> None:
        self.processes.append(_Process(name, pid, last=(time.perf_counter(), cpu_s(pid))))

    def _look(self) -> None:
        looked = time.perf_counter() - self._began  # one for all, so that the chart stacks what belongs together
        for process in self.processes:
            try:
                computed = cpu_s(process.pid)
            except OSError:
                continue  # it was replaced
            now, (before, was) = time.perf_counter(), process.last
            process.last = (now, computed)
            process.seen.append((looked, (computed - was) / (now - before), pss_mb(process.pid)))


def bench(setting: Setting) -> dict[str, Any]:
    """Run, print, draw."""
    pressure = Pressure()
    run = _Run(setting.clip)
    asyncio.run(_scenario(run))
    phases = [name for _, name in run.phases]
    totals = {name: _total(run, index) for index, name in enumerate(phases)}
    print(f"\nwhat each part costs, 640x480 MJPEG at {FPS:g} frames a second; CPU pressure {pressure.percent:.0f} %")
    before: tuple[float, float] | None = None
    for name, (cpu, mb) in totals.items():
        more = "" if before is None else f"   {100 * (cpu - before[0]):+6.1f} %   {mb - before[1]:+6.1f} MB"
        print(f"  {name:34s} {100 * cpu:6.1f} % of a core   {mb:6.1f} MB PSS{more}")
        before = (cpu, mb)
    place = ROOT / "build" / "resources.svg"
    place.write_text(draw(run.processes, run.phases))
    print(f"  over time: {place}")
    seen = {process.name: process.seen for process in run.processes}
    return {"cpu_pressure_percent": pressure.percent, "totals": totals, "phases": run.phases, "seen": seen}


async def _load(worker: Worker, file: Path, graph: dict[str, Any], outputs: list[Any]) -> protocol.ModelLoaded:
    fd = memfd.of_bytes("model", file.read_bytes())
    message = protocol.LoadModel("bench", "1.0.0", "m", "tflite", "litert:xnnpack", 1, {}, graph, [], outputs)
    try:
        packet = await worker.request(message, protocol.ModelLoaded, fds=(fd,), timeout_s=TIMEOUT_S)
    finally:
        os.close(fd)
    loaded: protocol.ModelLoaded = packet.message
    return loaded


async def _scenario(run: _Run) -> None:
    await run.start()
    await run.phase("the host alone")
    front = await run.camera("camera 1")
    first = await run.model("detector on camera 1", front, DETECTOR, _DETECT)
    await run.phase("a camera and a detector")
    await run.model("classifier on camera 1", front, DIGITS, _CLASSIFY)
    await run.phase("a second model on the camera")
    back = await run.camera("camera 2")
    await run.model("detector on camera 2", back, DETECTOR, _DETECT)
    await run.phase("a second camera with a detector")
    await run.model("its successor", front, DETECTOR, _DETECT)
    await first.stop()
    await run.phase("the first model replaced")
    await run.stop()


def _total(run: _Run, index: int) -> tuple[float, float]:
    """CPU in cores and PSS in MB of all processes in a phase, after what starts in it has settled."""
    begin = run.phases[index][0] + SETTLE_SAMPLES * SAMPLE_S
    end = run.phases[index + 1][0] if index + 1 < len(run.phases) else float("inf")
    cpu = mb = 0.0
    for process in run.processes:
        mine = [(share, memory) for at, share, memory in process.seen if begin <= at < end]
        if mine:
            cpu += sum(share for share, _ in mine) / len(mine)
            mb += mine[-1][1]
    return cpu, mb


def draw(processes: Sequence[_Process], phases: Sequence[tuple[float, str]]) -> str:
    """Two stacked charts, CPU above memory, as an SVG."""
    width, left, chart, gap = 900, 60, 190, 46
    last = max((at for process in processes for at, *_ in process.seen), default=1.0)
    times = sorted({at for process in processes for at, *_ in process.seen})

    def x(at: float) -> float:
        return left + at / last * (width - left - 20)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * chart + 3 * gap + 40}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for row, (title, column, factor) in enumerate((("CPU, % of a core", 1, 100.0), ("memory, MB PSS", 2, 1.0))):
        stack = _stack(processes, times, column, factor)
        top = max((sum(values) for values in zip(*stack, strict=True)), default=1.0) * 1.08 or 1.0
        base = gap + chart + row * (chart + gap)

        def y(value: float, base: float = base, top: float = top) -> float:
            return base - value / top * chart

        floor = [0.0] * len(times)
        for number, values in enumerate(stack):
            ceiling = [a + b for a, b in zip(floor, values, strict=True)]
            points = [(x(t), y(v)) for t, v in zip(times, ceiling, strict=True)]
            points += [(x(t), y(v)) for t, v in zip(reversed(times), reversed(floor), strict=True)]
            text = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            parts.append(f'<polygon points="{text}" fill="{COLOURS[number % len(COLOURS)]}" fill-opacity=".85"/>')
            floor = ceiling
        parts.append(f'<text x="{left}" y="{base - chart - 8}" font-weight="bold">{title}</text>')
        for share in (0.0, 0.5, 1.0):
            value = top / 1.08 * share
            parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ccc"/>')
            parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0f}</text>')
        for at, _ in phases:
            line = f'x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{base - chart}" y2="{base}"'
            parts.append(f'<line {line} stroke="#333" stroke-dasharray="3"/>')
    bottom = gap + 2 * chart + gap + 18
    for number, (at, name) in enumerate(phases):
        parts.append(f'<text x="{x(at) + 3:.1f}" y="{bottom + 14 * (number % 2)}" font-size="11">{name}</text>')
    for number, process in enumerate(processes):
        px, py = left + (number % 4) * 205, bottom + 38 + 18 * (number // 4)
        parts.append(f'<rect x="{px}" y="{py - 10}" width="12" height="12" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{px + 17}" y="{py}">{process.name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _stack(processes: Sequence[_Process], times: Sequence[float], column: int, factor: float) -> list[list[float]]:
    """For each process its value at each time, 0 where it was not there."""
    rows = []
    for process in processes:
        known = {look[0]: look[column] * factor for look in process.seen}
        rows.append([known.get(at, 0.0) for at in times])
    return rows
