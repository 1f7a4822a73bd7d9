"""The shipped pipeline at a camera's pace: source process, ring, model worker, results; beside the bare loop."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from agent import memfd
from agent.config import LineConfig
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


@dataclass(frozen=True)
class Figures:
    """One round: CPU milliseconds per frame, and tick-to-result latency."""

    cpu_ms: float
    daemon_cpu_ms: float
    p50_ms: float
    p99_ms: float


def candidate(folder: Path, spec_file: Path) -> Candidate:
    """A release of the spec, its files opened from the publisher's own plaintexts."""
    repository = create(folder / "repo")
    release = build_release(repository, spec.load(spec_file), recorder=WorkerRecorder())

    async def open_plain(component: Component) -> int:
        return memfd.of_bytes(component.name, (folder / "repo/vault/plain" / component.plain_sha256).read_bytes())

    return Candidate(release, release.components[0], open_plain)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, every thread, exact: what /proc/PID/stat says is sampled at the timer's ticks,
    at which a paced process likes to be awake."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def shipped(clip: Path, fps: float, seconds: float, model: Candidate) -> Figures:
    """One round of the shipped pipeline."""
    results: list[Result] = []
    supervisor = Supervisor(listen=None, host_command=default_host_command(), on_lost=lambda: None)
    await supervisor.start()
    options = {"path": str(clip), "policy": "live", "loop": True, "queue_frames": 4, "fps": fps}
    source = SourceRuntime(
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
    pids = [line.serving.worker.pid, source.pid]
    results.clear()
    before, own = sum(map(cpu_s, pids)), time.process_time()
    await asyncio.sleep(seconds)
    after, own_after = sum(map(cpu_s, pids)), time.process_time()
    got = list(results)
    await line.stop()
    await source.stop()
    await supervisor.stop()
    latencies = [(r.t_done_ns - r.t_frame_ns) / 1e6 for r in got]
    return Figures(
        1000 * (after - before) / len(got),
        1000 * (own_after - own) / len(got),
        quantile(latencies, 0.5),
        quantile(latencies, 0.99),
    )


def bare(clip: Path, model: Path, fps: float, seconds: float) -> Figures:
    """One round of the bare loop."""
    command = [sys.executable, str(Path(__file__).with_name("inline.py")), clip, model, fps, seconds]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    return Figures(1000 * figures["cpu_s"] / figures["frames"], 0.0, figures["p50_ms"], figures["p99_ms"])
