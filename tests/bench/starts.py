"""How soon a model worker answers, executed and forked from the zygote, and what each further one weighs.

The daemon's own parts (supervisor, source, lines) in this process, everything below them as shipped.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

from agent.config import LineConfig
from agent.daemon.fusedsource import FusedSource
from agent.daemon.lines import LineRuntime
from agent.daemon.selection import Verdict
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import Supervisor, default_host_command
from agent.protocol import Result
from agent.sourceconfig import SourceConfig
from agent.workbench import LIMITS
from ota.client.ports import Candidate
from tests.bench.memory import family, pss_mb

TIMES = 7
LINES = 4
SETTLE_S = 1.0


class Stand:
    """One source and some lines on it, each with the same small model."""

    def __init__(self, clip: Path, *, zygote: bool, fused: bool = False, lines: int = 1, fps: float = 0.0) -> None:
        self.results: dict[str, list[tuple[float, Result]]] = {}
        self.supervisor = Supervisor(
            listen=None, host_command=default_host_command(), on_lost=lambda: None, zygote=zygote
        )
        policy = "live" if fps else "every"
        options = {"path": str(clip), "policy": policy, "loop": True, "queue_frames": 4, "fps": fps}
        self.source = (FusedSource if fused else SourceRuntime)(
            SourceConfig("belt", "video", options), self.supervisor,
            on_dropped=lambda *_: None, on_restarted=lambda _: None, on_state=lambda _: None,
        )  # fmt: skip
        self.gaps: list[int] = []
        self.lines = [self.line(f"line-{number}") for number in range(lines)]

    def line(self, name: str) -> LineRuntime:
        """Another line on the source."""
        self.results[name] = []
        return LineRuntime(
            LineConfig(name, "belt", 1, "never", ()), self.source, self.supervisor, LIMITS,
            on_result=lambda line, result: self.results[line].append((time.perf_counter(), result)),
            on_event=self._note,
        )  # fmt: skip

    def _note(self, kind: str, facts: dict[str, Any]) -> None:
        if kind == "served_again":
            self.gaps.append(facts["gap_ms"])

    async def __aenter__(self) -> Stand:
        await self.supervisor.start()
        self.source.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for line in self.lines:
            await line.stop()
        await self.source.stop()
        await self.supervisor.stop()

    async def answer(self, line: LineRuntime, since: float) -> float:
        """Milliseconds from `since` to the line's next result."""
        results = self.results[line.config.name]
        async with asyncio.timeout(60):
            while not results or results[-1][0] < since:
                await asyncio.sleep(0.001)
        return 1000 * (next(at for at, _ in results if at >= since) - since)


def verdict(model: Candidate) -> Verdict:
    """Serve on LiteRT."""
    return Verdict(model.component.name, "litert:xnnpack")


async def starts(clip: Path, model: Candidate, *, zygote: bool) -> dict[str, list[float]]:
    """Milliseconds from the wish for a worker to its first result, and from a kill to the next worker's."""
    kept: dict[str, list[float]] = {"start_ms": [], "killed_ms": []}
    for _ in range(TIMES):
        async with Stand(clip, zygote=zygote) as stand:
            line = stand.lines[0]
            await line.serve(model, verdict(model))
            await stand.answer(line, time.perf_counter())
            assert line.serving is not None
            # to a running source, and a zygote that is there: what a second model, or the next release, meets
            other = stand.line("other")
            stand.lines.append(other)
            began = time.perf_counter()
            await other.serve(model, verdict(model))
            kept["start_ms"].append(await stand.answer(other, began))
            await asyncio.sleep(0.2)
            victim, began = line.serving.worker, time.perf_counter()
            os.kill(victim.pid, signal.SIGKILL)
            await victim.exited
            died_ms = 1000 * (time.perf_counter() - began)
            kept["killed_ms"].append(died_ms + await stand.answer(line, time.perf_counter()))
    return kept


async def weights(clip: Path, model: Candidate, *, zygote: bool, fused: bool = False) -> list[float]:
    """PSS in megabytes of everything below the daemon, with one line, two lines … (fused: with one)."""
    kept = []
    async with Stand(clip, zygote=zygote, fused=fused, lines=1 if fused else LINES, fps=10.0) as stand:
        for line in stand.lines:
            await line.serve(model, verdict(model))
            await stand.answer(line, time.perf_counter())
            await asyncio.sleep(SETTLE_S)
            assert stand.supervisor.host is not None
            kept.append(sum(map(pss_mb, family(stand.supervisor.host.pid))))
    return kept


async def fused_gap(clip: Path, model: Candidate) -> list[int]:
    """Milliseconds in which nobody served at each swap in fused mode, as the daemon tells it."""
    async with Stand(clip, zygote=False, fused=True, fps=30.0) as stand:
        line = stand.lines[0]
        for _ in range(4):
            await line.serve(model, verdict(model))
            await stand.answer(line, time.perf_counter())
        return stand.gaps
