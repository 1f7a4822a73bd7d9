"""One source and one line in this process's event loop, their workers real; what happens is written down."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from agent.config import LineConfig, UpdateConfig
from agent.daemon.fusedsource import FusedSource
from agent.daemon.lines import LineRuntime
from agent.daemon.selection import Verdict
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import Supervisor
from agent.errors import Reason
from agent.protocol import Result
from agent.sourceconfig import SourceConfig
from ota.client.ports import Candidate
from tests import workerpython
from tests.bench.memory import role_of

LIMITS = UpdateConfig(
    poll_s=3600, probation_s=1, probation_results=10, probation_scale=1, load_timeout_s=20, run_timeout_s=10,
    crash_limit=5, crash_window_s=600, settings_probation_s=120, trial_memory_mb=4096, metered=False,
)  # fmt: skip


def hostile_host(behaviour: str) -> list[str]:
    """A host whose workers do `behaviour` instead of their work."""
    return workerpython.program(str(Path(__file__).with_name("hostile.py")), behaviour, "host")


class Rig:
    """Attributes: what was answered and dropped, in order, and the supervisor, source and line that did it."""

    def __init__(
        self,
        clip: Path,
        limits: UpdateConfig,
        host_command: Sequence[str],
        policy: str,
        zygote: bool = False,
        fused: bool = False,
        fps: float = 60,
    ) -> None:
        self.results: list[Result] = []
        self.dropped: list[tuple[int, str]] = []
        self.events: list[str] = []
        self.facts: list[dict[str, object]] = []
        self.on_crash: Callable[[str, Candidate, Reason], None] = lambda *_: None
        self.supervisor = Supervisor(listen=None, host_command=host_command, on_lost=lambda: None, zygote=zygote)
        options = {"path": str(clip), "policy": policy, "loop": True, "queue_frames": 4, "fps": fps}
        self.source = (FusedSource if fused else SourceRuntime)(
            SourceConfig("belt", "video", options), self.supervisor,
            on_dropped=lambda _, seqs, reason: self.dropped.extend((seq, reason) for seq in seqs),
            on_restarted=lambda _: self.line.source_restarted(), on_state=lambda _: None,
        )  # fmt: skip
        self.line = LineRuntime(
            LineConfig("parts", "belt", 1, "never", ()), self.source, self.supervisor, limits,
            on_result=lambda _, result: self.results.append(result), on_event=self._note,
            on_crash=lambda *crash: self.on_crash(*crash),
        )  # fmt: skip

    def _note(self, kind: str, facts: dict[str, object]) -> None:
        self.events.append(kind)
        self.facts.append(facts)

    async def serve(self, candidate: Candidate) -> int | None:
        return await self.line.serve(candidate, Verdict(candidate.component.name, "litert:xnnpack"))

    async def frames(self, count: int = 5, timeout_s: float = 60.0) -> None:
        """Wait for `count` more results."""
        wanted = len(self.results) + count
        await self.until(lambda: len(self.results) >= wanted, timeout_s)

    async def until(self, true: Callable[[], bool], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not true():
                await asyncio.sleep(0.02)

    def workers(self, role: str) -> list[int]:
        """Process ids of the living workers of a role, executed or forked, found through their parent."""
        assert self.supervisor.host is not None
        found = []
        for pid in children(self.supervisor.host.pid):
            if role_of(pid) == role:
                found.append(pid)
        return found

    async def one_model(self) -> None:
        """Wait until a single model worker is left, the one that serves."""
        await self.until(lambda: self.line.serving is not None and self.workers("model") == [self.pid])
        await asyncio.sleep(0.6)
        assert self.workers("model") == [self.pid]

    @property
    def pid(self) -> int:
        return self.line.serving.worker.pid if self.line.serving is not None else 0

    def account(self) -> None:
        """Every frame up to the last was answered or dropped, and none twice."""
        answered = Counter(result.seq for result in self.results)
        # a frame may be given back by the source although its answer is on the way: the answer counts
        parted = ("worker_lost", "stopped")
        dropped = Counter(seq for seq, why in self.dropped if not (why in parted and answered[seq]))
        twice = [seq for seq, count in (answered + dropped).items() if count > 1]
        assert not twice, f"counted twice: {twice}"
        all_of_them = set(answered) | set(dropped)
        assert all_of_them == set(range(max(all_of_them) + 1))


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


@asynccontextmanager
async def running(
    clip: Path,
    limits: UpdateConfig = LIMITS,
    host_command: Sequence[str] | None = None,
    policy: str = "live",
    *,
    zygote: bool = False,
    fused: bool = False,
    fps: float = 60,
) -> AsyncIterator[Rig]:
    rig = Rig(clip, limits, host_command or workerpython.host_command(), policy, zygote, fused, fps)
    await rig.supervisor.start()
    rig.source.start()
    try:
        yield rig
    finally:
        await rig.line.stop()
        await rig.source.stop()
        await rig.supervisor.stop()


def run(body: Callable[[Rig], Awaitable[None]], clip: Path, limits: UpdateConfig = LIMITS, **options: object) -> Rig:
    """Run `body` on a fresh rig, stop everything, and check that no descriptor stayed open."""
    made: list[Rig] = []

    async def main() -> None:
        before = descriptors()
        async with running(clip, limits, **options) as rig:  # type: ignore[arg-type]
            made.append(rig)
            await body(rig)
        deadline = time.monotonic() + 60
        while descriptors() > before and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert descriptors() <= before

    asyncio.run(main())
    return made[0]
