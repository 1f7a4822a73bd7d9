"""One line at work: the model worker that serves it, its restart after a crash, and the swap to another release.

The swap starts the new worker beside the old one on the same ring, warms it, moves the frames over at a frame boundary
and lets the old one finish what it holds. Invariant: whenever this module gives up on a worker, frames it held are
counted by the source, and a worker that should serve is started again until `stop`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agent import protocol
from agent.config import LineConfig, UpdateConfig
from agent.daemon.selection import Verdict, quantile
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import BACKOFF_S, Exit, Supervisor, Worker
from agent.errors import AgentError, Reason
from ota.client.ports import Candidate
from ota.errors import OtaError

log = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 5.0
WATCH_INTERVAL_S = 2.0
STABLE_S = 60.0


@dataclass
class Tally:
    """What a serving worker has done since it was put to work; read by probation."""

    since: float = field(default_factory=time.monotonic)
    results: int = 0
    crashes: int = 0
    last_crash: Reason | None = None
    recent_ms: list[float] = field(default_factory=list)

    def add(self, result: protocol.Result) -> None:
        """Count one result; the last 512 run times (preprocess to postprocess) are kept."""
        self.results += 1
        if len(self.recent_ms) >= 512:
            del self.recent_ms[:256]
        self.recent_ms.append(sum(result.stages_us[1:]) / 1000)

    def p95_ms(self) -> float:
        """95th percentile of the kept run times."""
        return quantile(self.recent_ms, 0.95)


@dataclass(frozen=True)
class Serving:
    """The worker in charge. `reader` is its number at the source."""

    worker: Worker
    candidate: Candidate
    verdict: Verdict
    reader: int


class LineRuntime:
    """Serves one line.

    Args:
        on_result: called with (line, result) for each frame.
        on_event: called with (kind, facts) for crashes, restarts and swaps.
    """

    def __init__(
        self,
        config: LineConfig,
        source: SourceRuntime,
        supervisor: Supervisor,
        limits: UpdateConfig,
        *,
        on_result: Callable[[str, protocol.Result], None],
        on_event: Callable[[str, dict[str, object]], None],
    ) -> None:
        self.config = config
        self.source = source
        self.serving: Serving | None = None
        self.tally = Tally()
        self.restarts = 0
        self.results = 0
        self._supervisor = supervisor
        self._limits = limits
        self._on_result = on_result
        self._on_event = on_event
        self._lock = asyncio.Lock()
        self._finished: dict[int, asyncio.Future[protocol.Finished]] = {}
        self._backoff_s = BACKOFF_S[0]
        self._revive: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._last_result = 0.0
        self._last_seqs: collections.deque[int] = collections.deque(maxlen=1024)

    async def serve(self, candidate: Candidate, verdict: Verdict) -> int | None:
        """Make `candidate` serve, beside the present worker where there is one.

        Returns the first frame the new worker got, None on a first start.

        Raises:
            AgentError: the new worker did not come up; the old one still serves.
        """
        async with self._lock:
            self._cancel_revival()
            old = self.serving
            live = old is not None and not old.worker.exited.done()
            new = await self._bring_up(candidate, verdict, active=not live)
            first_seq = None
            if live:
                try:
                    first_seq = await self.source.switch(self.config.name, new.reader)
                except AgentError:
                    new.worker.kill()
                    raise
            self.serving = new
            self.tally = Tally()
            if old is not None and live:
                await self._retire(old)
            if self._watch is None:
                self._watch = asyncio.create_task(self._watch_serving(), name=f"watch {self.config.name}")
            return first_seq

    async def stop(self) -> None:
        """Stop serving."""
        async with self._lock:
            self._cancel_revival()
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None
            if self.serving is not None:
                old, self.serving = self.serving, None
                self.source.detach(old.reader, "stopped")
                await old.worker.stop()

    def answered(self, seq: int) -> bool:
        """Whether a result for frame `seq`, one of the last 1024, came."""
        return seq in self._last_seqs

    def source_restarted(self) -> None:
        """The ring is a new one: bring the model up on it."""
        if self.serving is not None:
            self.serving.worker.kill()

    async def heartbeat(self, golden: int, component: str, tolerance: dict[str, object]) -> None:
        """Let the serving worker reproduce the golden vectors in the memfd `golden` between frames.

        Raises:
            AgentError: it did not.
        """
        if self.serving is None:
            raise AgentError(Reason.WORKER_UNAVAILABLE, f"line {self.config.name} has no worker")
        await self.serving.worker.request(
            protocol.RunGolden(component, tolerance),
            protocol.GoldenPassed,
            fds=(golden,),
            timeout_s=self._limits.run_timeout_s,
        )

    async def _bring_up(self, candidate: Candidate, verdict: Verdict, *, active: bool) -> Serving:
        worker = await self._supervisor.spawn("model")
        worker.on_message = lambda packet: self._said(worker, packet)
        try:
            model = await candidate.open(verdict.component)
            try:
                await worker.request(
                    load_message(candidate, verdict.component, verdict.requested, self.config.threads),
                    protocol.ModelLoaded,
                    fds=(model,),
                    timeout_s=self._limits.load_timeout_s,
                )
            finally:
                os.close(model)
            reader, warm_ms = await self.source.attach(
                self.config.name, worker, active=active, timeout_s=self._limits.load_timeout_s
            )
        except BaseException:
            worker.kill()  # also when cancelled: nobody else knows of it yet
            raise
        log.info("line %s: %s %s on %s, warm in %.0f ms", self.config.name, candidate.line, candidate.version,
                 verdict.requested, warm_ms)  # fmt: skip
        worker.on_exit = lambda end: self._ended(worker, end)
        return Serving(worker, candidate, verdict, reader)

    async def _retire(self, old: Serving) -> None:
        finished = self._finished.setdefault(old.worker.number, asyncio.get_running_loop().create_future())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINISH_TIMEOUT_S):
                await finished
        self._finished.pop(old.worker.number, None)
        await old.worker.stop()

    def _said(self, worker: Worker, packet: protocol.Packet) -> None:
        message = packet.message
        packet.close()
        if isinstance(message, protocol.Result):
            self.results += 1
            self._last_result = time.monotonic()
            self._last_seqs.append(message.seq)
            if self.serving is not None and self.serving.worker is worker:
                self.tally.add(message)
            self._on_result(self.config.name, message)
        elif isinstance(message, protocol.Finished):
            future = self._finished.setdefault(worker.number, asyncio.get_running_loop().create_future())
            if not future.done():
                future.set_result(message)
        elif isinstance(message, protocol.Fault):
            log.error("line %s: %s", self.config.name, message.message, extra={"reason": message.reason})
            worker.kill()

    def _ended(self, worker: Worker, end: Exit) -> None:
        self._finished.pop(worker.number, None)
        if self.serving is None or self.serving.worker is not worker:
            return
        self.tally.crashes += 1
        self.tally.last_crash = end.reason
        self._on_event("worker_exit", {"line": self.config.name, "reason": end.reason.value, "detail": str(end)})
        self._revive = asyncio.create_task(self._bring_back(self.serving), name=f"revive {self.config.name}")

    async def _bring_back(self, lost: Serving) -> None:
        """Start the same release again, with back-off, until it serves or something else does."""
        while True:
            if time.monotonic() - self.tally.since > STABLE_S:
                self._backoff_s = BACKOFF_S[0]
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(2 * self._backoff_s, BACKOFF_S[1])
            try:
                self.serving = await self._bring_up(lost.candidate, lost.verdict, active=True)
            except (AgentError, OtaError) as e:
                self.tally.crashes += 1
                self.tally.last_crash = Reason.WORKER_CRASHED
                log.error("line %s: %s", self.config.name, e.message, extra={"reason": e.reason.value})
                continue
            self.restarts += 1
            self._on_event("worker_restarted", {"line": self.config.name, "restarts": self.restarts})
            return

    async def _watch_serving(self) -> None:
        """Ask a worker that says nothing whether it is alive; `request` kills one that does not answer."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            serving = self.serving
            quiet = time.monotonic() - self._last_result > WATCH_INTERVAL_S
            if serving is None or serving.worker.exited.done() or not quiet:
                continue
            try:
                await serving.worker.request(
                    protocol.Measure(0, 0), protocol.Measured, timeout_s=self._limits.run_timeout_s
                )
            except AgentError as e:
                log.error("line %s: %s", self.config.name, e.message, extra={"reason": e.reason.value})

    def _cancel_revival(self) -> None:
        if self._revive is not None:
            self._revive.cancel()
            self._revive = None


def load_message(candidate: Candidate, component_name: str, delegate: str, threads: int) -> protocol.LoadModel:
    """The message that loads one component of `candidate` on one delegate."""
    component = candidate.release.component(component_name)
    return protocol.LoadModel(
        line=candidate.line,
        version=candidate.version,
        component=component_name,
        format=component.format,
        delegate=delegate,
        threads=threads,
        graph=dict(candidate.release.graph),
        inputs=[dict(spec) for spec in component.inputs],
        outputs=[dict(spec) for spec in component.outputs],
    )
