"""One candidate under trial: a throw-away worker that loads it, proves it and measures it, and what that showed.

It is not the order in which candidates take turns (`agent.daemon.trials`). Invariant: whatever a step runs into becomes
the verdict's reason and the stage it failed in; only that no worker can be had at all says nothing of the model.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agent import protocol
from agent.daemon import evidence
from agent.daemon.selection import Verdict, quantile
from agent.daemon.worker import Worker, one_line
from agent.errors import AgentError, Reason
from ota.release import Budgets

log = logging.getLogger(__name__)

MAX_NAME_CHARS = 120
ENOUGH_RUNS = 3
# a driver that never gives something back, or whose answers go stale, shows it after a while
SOAK_RUNS = 100
SOAK_MS = 1000.0


class Keep(Protocol):
    """`agent.daemon.compiled.CompiledModels.keep`."""

    async def __call__(
        self, worker: Worker, message: protocol.LoadModel, loaded: protocol.ModelLoaded, *, timeout_s: float
    ) -> bool:
        """Keep it where that is worth it."""
        ...


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tried: a release's candidate, or a bare model file on a workbench.

    Attributes:
        load: the message that loads (component, delegate).
        open: a new memfd of a component's plaintext; the trial closes it.
        golden: a new memfd of the golden vectors; None measures without reproducing anything.
        tolerance: `graph.golden` of the release.
        budgets: what the publisher promises.
        min_coverage: share of the nodes that hardware must run itself.
        line: for status.
        keep: is offered what a worker that passed has compiled.
    """

    load: Callable[[str, str], protocol.LoadModel]
    open: Callable[[str], Awaitable[int]]
    golden: Callable[[], Awaitable[int]] | None
    tolerance: Mapping[str, Any]
    budgets: Budgets
    min_coverage: float = 0.0
    line: str = ""
    keep: Keep | None = None


class Trial:
    """One candidate and the worker that holds it.

    Attributes:
        verdict: what is known so far.
        step: what it is doing, for status; `since` is the monotonic time at which it began.
    """

    def __init__(self, worker: Worker, subject: Subject, component: str, delegate: str) -> None:
        self.worker = worker
        self.verdict = Verdict(component, delegate)
        self.step = "loading"
        self.since = time.monotonic()
        self._subject = subject
        self._loaded: tuple[protocol.LoadModel, protocol.ModelLoaded] | None = None
        self._net_ms: list[float] = []
        self._unwaited_ms: list[float] = []
        self._floors_ms: list[float] = []
        self._cpu_ms: list[float] = []
        self._rss: list[int] = []
        self._runs: list[int] = []

    @property
    def line(self) -> str:
        """The line it is for."""
        return self._subject.line

    @property
    def rounds(self) -> int:
        """Rounds measured so far."""
        return len(self._runs)

    @property
    def floor_ms(self) -> float:
        """The fastest run so far that never waited for a core; without what it waited while there are few others."""
        return min(self._unwaited_ms if len(self._unwaited_ms) >= ENOUGH_RUNS else self._net_ms, default=0.0)

    def settled(self, rounds: int, share: float) -> bool:
        """Whether enough runs found a core at once, and the latest `rounds` rounds did not make the fastest run faster
        by more than `share`."""
        floors = self._floors_ms
        enough = len(self._unwaited_ms) >= ENOUGH_RUNS and len(floors) > rounds
        return enough and floors[-1] >= (1 - share) * floors[-1 - rounds]

    @property
    def least_cpu_ms(self) -> float:
        """The least CPU time of a run so far."""
        return min(self._cpu_ms, default=0.0)

    @property
    def mean_cpu_ms(self) -> float:
        """The mean CPU time of a run so far, without the dearest tenth: what starts late, or is disturbed."""
        dearest = len(self._cpu_ms) // 10
        counted = sorted(self._cpu_ms)[: len(self._cpu_ms) - dearest]
        return sum(counted) / len(counted) if counted else 0.0

    @property
    def may_leak(self) -> bool:
        """Whether its memory has grown in each of the latest rounds."""
        return evidence.may_leak(self._rss)

    async def load(self, timeout_s: float) -> None:
        """Load the model; the golden vectors come next."""
        component, delegate = self.verdict.component, self.verdict.requested
        model, message = await self._subject.open(component), self._subject.load(component, delegate)
        began = time.monotonic()
        try:
            packet = await self.worker.request(message, protocol.ModelLoaded, fds=(model,), timeout_s=timeout_s)
        finally:
            os.close(model)
        loaded = packet.message
        self._loaded = (message, loaded)
        self.verdict = replace(
            self.verdict,
            actual=one_line(loaded.actual)[:MAX_NAME_CHARS],
            coverage=loaded.coverage,
            runtime=one_line(loaded.runtime)[:MAX_NAME_CHARS],
            driver=one_line(loaded.driver)[:MAX_NAME_CHARS],
            # how long the one that serves may load follows from it: not longer than it took by our own clock
            load_ms=min(max(0.0, loaded.load_ms), (time.monotonic() - began) * 1000),
            rss_bytes=loaded.rss_bytes,
        )
        if loaded.actual != delegate:
            raise AgentError(Reason.DELEGATE_FELL_BACK, f"asked for {delegate}, got {self.verdict.actual}")
        if charge := evidence.partly(self.verdict, self._subject.min_coverage):
            raise AgentError(Reason.DELEGATE_PARTIAL, charge)

    async def golden(self, timeout_s: float) -> None:
        """Reproduce the golden vectors, where there are any."""
        if self._subject.golden is None:
            return
        golden = await self._subject.golden()
        try:
            packet = await self.worker.request(
                protocol.RunGolden(self.verdict.component, dict(self._subject.tolerance)),
                protocol.GoldenPassed,
                fds=(golden,),
                timeout_s=timeout_s,
            )
        finally:
            os.close(golden)
        worst = max(self.verdict.golden_worst, packet.message.worst)
        self.verdict = replace(self.verdict, golden_worst=worst)

    async def keep(self, timeout_s: float) -> None:
        """Offer what was compiled, once all else is done: the export takes memory that is not the model's."""
        if self._subject.keep is not None and self._loaded is not None and self.verdict.passed:
            await self._subject.keep(self.worker, *self._loaded, timeout_s=timeout_s)

    async def again(self, timeout_s: float) -> None:
        """The golden vectors once more, after the runs.

        Raises:
            AgentError: `delegate_unsteady` where they came out before and do not now.
        """
        try:
            await self.golden(timeout_s)
        except AgentError as e:
            if e.reason in (Reason.GOLDEN_MISMATCH, Reason.OUTPUT_NOT_FINITE):
                raise AgentError(Reason.DELEGATE_UNSTEADY, f"passed at first, and then: {e.message}") from e
            raise

    async def measure(self, warmups: int, runs: int, timeout_s: float) -> None:
        """One round of runs."""
        packet = await self.worker.request(
            protocol.Measure(warmups, runs), protocol.Measured, timeout_s=timeout_s
        )  # fmt: skip
        told = packet.message
        figures = (told.runs_ns, told.cpu_ns, told.waited_ns)
        if any(len(values) != runs for values in figures) or min(told.runs_ns) <= 0:
            raise AgentError(Reason.BAD_MESSAGE, "the trial worker does not say how long its runs took")
        # clocks of two sources may disagree by a little: a run cannot have waited for all of its time
        pairs = list(zip(told.runs_ns, told.waited_ns, strict=True))
        self._net_ms += [max(ns - max(0, waited), ns // 100, 1) / 1e6 for ns, waited in pairs]
        self._unwaited_ms += [ns / 1e6 for ns, waited in pairs if waited <= 0]
        self._floors_ms.append(self.floor_ms)
        self._cpu_ms += [max(0, ns) / 1e6 for ns in told.cpu_ns]
        self._rss.append(told.least_rss_bytes)
        self._runs.append(warmups + runs)
        self.verdict = replace(self.verdict, rss_bytes=max(self.verdict.rss_bytes, told.rss_bytes))

    async def soak(self, timeout_s: float) -> None:
        """Further runs, until there were `SOAK_RUNS` in all or `SOAK_MS` are over."""
        more = min(SOAK_RUNS - sum(self._runs), int(SOAK_MS / self.floor_ms))
        if more > 0:
            await self.measure(more, 1, timeout_s)

    async def attempt(self, stage: str, step: Awaitable[None]) -> None:
        """Await `step`; what it runs into is the verdict, and the end of the worker.

        Raises:
            AgentError: `worker_unavailable`: that says nothing about the model.
        """
        self.step, self.since = {"load": "loading", "measure": "measuring"}.get(stage, stage), time.monotonic()
        try:
            await step
        except AgentError as e:
            self.worker.kill()
            if e.reason is Reason.WORKER_UNAVAILABLE:
                raise
            self.fail(e.reason, e.message, stage)
        except BaseException:
            self.worker.kill()
            raise

    def fail(self, reason: Reason, message: str, stage: str) -> None:
        """The verdict is `reason`."""
        self.verdict = replace(self.verdict, reason=reason.value, message=message, stage=stage)
        log.info(
            "trial of %s on %s: %s", self.verdict.component, self.verdict.requested, message,
            extra={"reason": reason.value},
        )  # fmt: skip

    def judge(self, witnesses: Sequence[Verdict]) -> Verdict:
        """Figures of the runs, held against the publisher's budgets and against those of the processor's own rungs."""
        runs, budgets = self._net_ms, self._subject.budgets
        # a run that others pushed off its core comes back to cold caches: no wait, and not the delegate's doing either
        undisturbed = self._unwaited_ms if len(self._unwaited_ms) >= ENOUGH_RUNS else runs
        least_p95_ms = min(quantile(runs, 0.95), quantile(undisturbed, 0.95))
        verdict = self.verdict = replace(
            self.verdict,
            min_ms=self.floor_ms,
            p50_ms=quantile(runs, 0.5),
            p95_ms=quantile(runs, 0.95),
            p99_ms=quantile(runs, 0.99),
            cpu_ms=self.least_cpu_ms,
            mean_cpu_ms=self.mean_cpu_ms,
        )
        if not verdict.passed:
            return verdict
        if budgets.p95_ms is not None and least_p95_ms > budgets.p95_ms:
            why = f"p95 {least_p95_ms:.2f} ms is over the budget of {budgets.p95_ms:.2f} ms"
            self.fail(Reason.OVER_BUDGET, why, "judge")
        elif budgets.rss_bytes is not None and verdict.rss_bytes > budgets.rss_bytes:
            why = f"{verdict.rss_bytes >> 20} MiB resident is over the budget of {budgets.rss_bytes >> 20} MiB"
            self.fail(Reason.OVER_BUDGET, why, "judge")
        elif charge := evidence.leaks(self._rss, self._runs):
            self.fail(Reason.DELEGATE_LEAKS, charge, "judge")
        elif charge := evidence.fell_back(verdict, witnesses):
            self.fail(Reason.DELEGATE_FELL_BACK, charge, "judge")
        return self.verdict


async def finish(trials: Sequence[Trial], timeout_s: float) -> None:
    """End the workers of `trials`; returns when they are gone."""
    for trial in trials:
        trial.worker.kill()
    if trials:
        await asyncio.wait([trial.worker.exited for trial in trials], timeout=timeout_s)
