"""Trials of a model before it may serve, on every delegate allowed, each in a throw-away worker.

A trial loads strictly, reproduces the golden vectors, and measures in rounds that interleave the candidates, so that a
busy moment of the board hits all alike. It never touches the worker that serves.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent import protocol
from agent.config import UpdateConfig
from agent.daemon.selection import Verdict, quantile
from agent.daemon.supervisor import Supervisor
from agent.daemon.worker import Worker, one_line
from agent.errors import AgentError, Reason
from ota.client.ports import Candidate
from ota.release import Budgets, Component, Release

log = logging.getLogger(__name__)

WARMUPS = 2
ROUNDS = 5
RUNS_A_ROUND = 5
TRIAL_NICE = 5
GONE_TIMEOUT_S = 5.0
MAX_NAME_CHARS = 120


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tried: a release's candidate, or a bare model file on a workbench.

    Attributes:
        load: the message that loads (component, delegate).
        open: a new memfd of a component's plaintext; the trial closes it.
        golden: a new memfd of the golden vectors; None measures without reproducing anything.
        tolerance: `graph.golden` of the release.
        budgets: what the publisher promises.
    """

    load: Callable[[str, str], protocol.LoadModel]
    open: Callable[[str], Awaitable[int]]
    golden: Callable[[], Awaitable[int]] | None
    tolerance: Mapping[str, Any]
    budgets: Budgets


def subject_of(candidate: Candidate) -> Subject:
    """The subject of a trial of a signed release."""
    return Subject(
        load=lambda component, delegate: load_message(candidate, component, delegate, 1),
        open=candidate.open,
        golden=lambda: candidate.open(candidate.release.golden.name),
        tolerance=candidate.release.graph.get("golden", {}),
        budgets=candidate.release.budgets,
    )


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
        options={},
        graph=dict(candidate.release.graph),
        inputs=[dict(spec) for spec in component.inputs],
        outputs=[dict(spec) for spec in component.outputs],
    )


@dataclass
class _Trial:
    """One candidate under trial and the worker that holds it."""

    worker: Worker
    verdict: Verdict
    runs_ms: list[float]


def candidates(components: Sequence[Component], ladder: Sequence[str]) -> list[tuple[str, str]]:
    """(component, delegate) pairs to try: what the publisher allows, in the order of the device's ladder."""
    return [
        (component.name, delegate) for delegate in ladder for component in components if delegate in component.delegates
    ]


def component_order(release: Release, ladder: Sequence[str], last: Verdict | None) -> list[str]:
    """Names of the components that can run here, the one of the last verdict first."""
    names = [name for name, _ in candidates(release.components, ladder)]
    if last is not None and last.component in names:
        names.insert(0, last.component)
    return list(dict.fromkeys(names))


class TrialRunner:
    """Runs trials with workers of `supervisor` inside `limits`."""

    def __init__(self, supervisor: Supervisor, limits: UpdateConfig) -> None:
        self._supervisor = supervisor
        self._limits = limits

    async def run(self, subject: Subject, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Try every (component, delegate) of `pairs`; one verdict each, in that order.

        Raises:
            AgentError: `worker_unavailable` when no worker can be had at all.
            OtaError: the stored model cannot be opened.
        """
        trials: list[_Trial] = []
        try:
            for component, delegate in pairs:
                trials.append(await self._qualify(subject, component, delegate))
            for round_number in range(ROUNDS):
                for trial in trials:
                    if trial.verdict.passed:
                        await self._measure(trial, WARMUPS if round_number == 0 else 1)
            return [_judge(trial, subject.budgets) for trial in trials]
        finally:
            for trial in trials:
                trial.worker.kill()
            if trials:
                await asyncio.wait([trial.worker.exited for trial in trials], timeout=GONE_TIMEOUT_S)

    async def _qualify(self, subject: Subject, component: str, delegate: str) -> _Trial:
        """Load and run the golden vectors; the worker stays up when both pass."""
        memory_bytes = self._limits.trial_memory_mb << 20
        worker = await self._supervisor.spawn("trial", nice=TRIAL_NICE, memory_bytes=memory_bytes)
        trial = _Trial(worker, Verdict(component, delegate), [])
        try:
            await self._load(trial, subject)
            if subject.golden is not None:
                await self._golden(trial, subject.golden, subject.tolerance)
        except AgentError as e:
            worker.kill()
            if e.reason is Reason.WORKER_UNAVAILABLE:
                raise  # the host went away: that says nothing about the model
            trial.verdict = replace(trial.verdict, reason=e.reason.value, message=e.message)
            log.info("trial of %s on %s: %s", component, delegate, e.message, extra={"reason": e.reason.value})
        except BaseException:
            worker.kill()
            raise
        return trial

    async def _load(self, trial: _Trial, subject: Subject) -> None:
        component, delegate = trial.verdict.component, trial.verdict.requested
        model = await subject.open(component)
        try:
            packet = await trial.worker.request(
                subject.load(component, delegate),
                protocol.ModelLoaded,
                fds=(model,),
                timeout_s=self._limits.load_timeout_s,
            )
        finally:
            os.close(model)
        loaded = packet.message
        trial.verdict = replace(
            trial.verdict,
            actual=one_line(loaded.actual)[:MAX_NAME_CHARS],
            coverage=loaded.coverage,
            runtime=one_line(loaded.runtime)[:MAX_NAME_CHARS],
            load_ms=loaded.load_ms,
            rss_bytes=loaded.rss_bytes,
        )
        if loaded.actual != delegate:
            raise AgentError(Reason.DELEGATE_FELL_BACK, f"asked for {delegate}, got {trial.verdict.actual}")

    async def _golden(self, trial: _Trial, opener: Callable[[], Awaitable[int]], tolerance: Mapping[str, Any]) -> None:
        golden = await opener()
        try:
            packet = await trial.worker.request(
                protocol.RunGolden(trial.verdict.component, dict(tolerance)),
                protocol.GoldenPassed,
                fds=(golden,),
                timeout_s=self._limits.run_timeout_s,
            )
        finally:
            os.close(golden)
        trial.verdict = replace(trial.verdict, golden_worst=packet.message.worst)

    async def _measure(self, trial: _Trial, warmups: int) -> None:
        try:
            packet = await trial.worker.request(
                protocol.Measure(warmups, RUNS_A_ROUND), protocol.Measured, timeout_s=self._limits.run_timeout_s
            )
            if len(packet.message.runs_ns) != RUNS_A_ROUND or min(packet.message.runs_ns) <= 0:
                raise AgentError(Reason.BAD_MESSAGE, "the trial worker does not say how long its runs took")
        except AgentError as e:
            if e.reason is Reason.WORKER_UNAVAILABLE:
                raise
            trial.verdict = replace(trial.verdict, reason=e.reason.value, message=e.message)
            return
        trial.runs_ms.extend(ns / 1e6 for ns in packet.message.runs_ns)
        trial.verdict = replace(trial.verdict, rss_bytes=max(trial.verdict.rss_bytes, packet.message.rss_bytes))


def _judge(trial: _Trial, budgets: Budgets) -> Verdict:
    """Figures of the runs, held against the publisher's budgets."""
    runs = trial.runs_ms
    verdict = replace(
        trial.verdict, min_ms=min(runs, default=0.0), p50_ms=quantile(runs, 0.5), p95_ms=quantile(runs, 0.95)
    )
    if not verdict.passed:
        return verdict
    if budgets.p95_ms is not None and verdict.p95_ms > budgets.p95_ms:
        why = f"p95 {verdict.p95_ms:.2f} ms is over the budget of {budgets.p95_ms:.2f} ms"
    elif budgets.rss_bytes is not None and verdict.rss_bytes > budgets.rss_bytes:
        why = f"{verdict.rss_bytes >> 20} MiB resident is over the budget of {budgets.rss_bytes >> 20} MiB"
    else:
        return verdict
    return replace(verdict, reason=Reason.OVER_BUDGET.value, message=why)


async def transform(
    supervisor: Supervisor, codec: str, out_bytes: int, payload: int, base: int | None, *, timeout_s: float
) -> int:
    """Decode a payload in a throw-away worker; returns a memfd that the caller checks and closes.

    Raises:
        AgentError: the worker refused, crashed or hung.
    """
    # the worker maps the output and holds a decoder's window; the payload and the base are shared mappings
    worker = await supervisor.spawn("transform", nice=TRIAL_NICE, memory_bytes=2 * out_bytes + (256 << 20))
    try:
        packet = await worker.request(
            protocol.Transform(codec, out_bytes),
            protocol.Transformed,
            fds=(payload,) if base is None else (payload, base),
            timeout_s=timeout_s,
        )
        (fd,) = packet.take(1)
        return int(fd)
    finally:
        worker.kill()
