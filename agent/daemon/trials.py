"""Trials of a model before it may serve, on every delegate allowed, each in a throw-away worker.

A trial loads strictly, reproduces the golden vectors, measures in rounds that interleave the candidates, so that a
busy moment of the board hits all alike, and reproduces the golden vectors once more. It never touches the worker that
serves. Hardware may compile for long: then the others are measured, and it goes on in the background. Where hardware is
a candidate, the processor's own rungs run beside it as witnesses, though they may not be candidates themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from agent import protocol
from agent.config import UpdateConfig
from agent.daemon.compiled import CompiledModels, load_options
from agent.daemon.selection import Verdict, on_cpu, rank
from agent.daemon.supervisor import Supervisor
from agent.daemon.trial import Subject, Trial, finish
from agent.daemon.worker import Worker
from agent.errors import Reason
from ota.client.ports import Candidate
from ota.release import Component, Release

log = logging.getLogger(__name__)

T = TypeVar("T")

WARMUPS = 2
ROUNDS = 5
# how long the runs of one candidate in a round should take, and those before that warm its caches again: a slow model
# needs fewer runs, for a fast one a single run says more of the caches than of the delegate
ROUND_MS = 8.0
WARM_MS = 2.0
MAX_RUNS = 100
LONG_MS = 50.0  # a run that takes longer is not made more often than it must be
LOADS_AT_ONCE = 2
# one of the processor's own rungs that after so many rounds takes so many times as long as the fastest runs no more
CLEAR_ROUNDS = 3
CLEAR = 3.0
# candidates so near the fastest, as a ratio, run on until two more rounds change nothing and enough runs found a free
# core, or so many rounds or seconds are over
CLOSE = 1.3
SETTLED = 0.01
SETTLED_ROUNDS = 2
EXTRA_ROUNDS = 24
EXTRA_S = 2.0
TRIAL_NICE = 5
GONE_TIMEOUT_S = 5.0
# what a quietly absent accelerator is compared with, by the model's format
WITNESSES: Mapping[str, tuple[str, ...]] = {"tflite": ("litert:xnnpack", "litert:cpu"), "onnx": ("onnx:cpu",)}


def subject_of(
    candidate: Candidate, threads: int = 1, min_coverage: float = 0.0, compiled: CompiledModels | None = None
) -> Subject:
    """The subject of a trial of a signed release."""
    return Subject(
        load=lambda component, delegate: load_message(candidate, component, delegate, threads),
        open=candidate.open,
        golden=lambda: candidate.open(candidate.release.golden.name),
        tolerance=candidate.release.graph.get("golden", {}),
        budgets=candidate.release.budgets,
        min_coverage=min_coverage,
        line=candidate.line,
        keep=None if compiled is None else compiled.keep,
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
        options=load_options(component),
        graph=dict(candidate.release.graph),
        inputs=[dict(spec) for spec in component.inputs],
        outputs=[dict(spec) for spec in component.outputs],
    )


def candidates(components: Sequence[Component], ladder: Sequence[str]) -> list[tuple[str, str]]:
    """(component, delegate) pairs to try: what the publisher allows, in the order of the device's ladder."""
    return [
        (component.name, delegate) for delegate in ladder for component in components if delegate in component.delegates
    ]


def component_order(
    release: Release, ladder: Sequence[str], last: Sequence[Verdict] = (), profile: str = "", objective: str = "latency"
) -> list[str]:
    """Names of the components that can run here, the most promising first.

    The publisher's order for `profile` counts where the release carries one; else the component comes first that was
    the best for `objective` by the `last` verdicts of this line, then the device's ladder decides. What did not even
    load by the last verdicts on all its delegates comes after everything else.
    """
    pairs = candidates(release.components, ladder)
    names = list(dict.fromkeys(name for name, _ in pairs))
    stated = [name for name in release.order.get(profile, ()) if name in names]
    best = rank((v for v in last if (v.component, v.requested) in pairs), objective)
    first = stated or [v.component for v in best[:1]]
    absent = {v.requested for v in last if v.reason == Reason.RUNTIME_MISSING.value}
    hopeless = {name for name in names if all(delegate in absent for other, delegate in pairs if other == name)}
    ordered = list(dict.fromkeys([*first, *names]))
    return [n for n in ordered if n not in hopeless] + [n for n in ordered if n in hopeless]


class TrialRunner:
    """Runs trials with workers of `supervisor` inside `limits`.

    Attributes:
        at_work: the trials that are running now, for status.
    """

    def __init__(self, supervisor: Supervisor, limits: UpdateConfig) -> None:
        self.at_work: list[Trial] = []
        self._supervisor = supervisor
        self._limits = limits

    async def run(
        self,
        subject: Subject,
        pairs: Sequence[tuple[str, str]],
        *,
        late: Callable[[Late], None] | None = None,
        beside: Sequence[Verdict] = (),
        patient: bool = True,
    ) -> list[Verdict]:
        """Try every (component, delegate) of `pairs`; one verdict each, in that order.

        Args:
            late: takes over a candidate that still compiles although another passed; its verdict here is
                `delegate_compiling`. None waits for all of them.
            beside: verdicts of the processor's own rungs that were measured before, as witnesses.
            patient: whether hardware may compile for longer than a load may take.

        Raises:
            AgentError: `worker_unavailable` when no worker can be had at all.
            OtaError: the stored model cannot be opened.
        """
        witnesses = _witnesses(subject, pairs, beside)
        trials = await self._spawn(subject, [*pairs, *witnesses])
        handed: list[Trial] = []
        loading: dict[Trial, asyncio.Task[None]] = {}
        try:
            own = trials[: len(pairs)]
            turns = asyncio.Semaphore(LOADS_AT_ONCE)
            await _together(
                self._qualify(trial, loading, turns, proven=trial in own, patient=patient) for trial in trials
            )
            ready = [t for t in own if t not in loading]
            await self._rounds([t for t in trials if t not in loading])
            await self._prove_again(ready)
            measured = [*beside, *_judged(trials, on_processor=True)]
            _judged(ready, on_processor=False, witnesses=measured)
            # what is over its budget serves no line while another compiles
            if loading and (late is None or not any(t.verdict.passed for t in ready)):
                await asyncio.gather(*loading.values())
                slow = list(loading)
                loading.clear()
                for trial in slow:
                    await self._prove(trial)
                await self._rounds(slow)
                await self._prove_again(slow)
                _judged(slow, on_processor=False, witnesses=measured)
            for trial in own:
                await trial.keep(self._limits.run_timeout_s)
            if late is not None:
                for trial in list(loading):
                    late(Late(self, trial, loading.pop(trial), measured))
                    handed.append(trial)
            return [_compiling(t.verdict) if t in handed else t.verdict for t in own]
        finally:
            for task in loading.values():
                task.cancel()
            await asyncio.gather(*loading.values(), return_exceptions=True)
            self.at_work = [t for t in self.at_work if t not in trials or t in handed]
            await finish([t for t in trials if t not in handed], GONE_TIMEOUT_S)

    async def _spawn(self, subject: Subject, pairs: Sequence[tuple[str, str]]) -> list[Trial]:
        """All workers at once: they start up side by side."""
        memory_bytes = self._limits.trial_memory_mb << 20
        spawned: list[Worker] = []

        async def spawn() -> Worker:
            spawned.append(await self._supervisor.spawn("trial", nice=TRIAL_NICE, memory_bytes=memory_bytes))
            return spawned[-1]

        try:
            workers = await _together(spawn() for _ in pairs)
        except BaseException:
            for worker in spawned:
                worker.kill()  # nobody else knows of it
            raise
        trials = [Trial(worker, subject, *pair) for worker, pair in zip(workers, pairs, strict=True)]
        self.at_work += trials
        return trials

    async def _qualify(
        self,
        trial: Trial,
        loading: dict[Trial, asyncio.Task[None]],
        turns: asyncio.Semaphore,
        *,
        proven: bool,
        patient: bool,
    ) -> None:
        """Load and run the golden vectors; the worker stays up when both pass, or goes on compiling as one of
        `loading`."""
        limits = self._limits
        patient = patient and not on_cpu(trial.verdict.requested)
        limit_s = max(limits.compile_timeout_s, limits.load_timeout_s) if patient else limits.load_timeout_s
        async with turns:
            loading[trial] = task = asyncio.create_task(trial.attempt("load", trial.load(limit_s)))
            await asyncio.wait((task,), timeout=limits.load_timeout_s if patient else None)
            if not task.done():
                trial.step = "compiling"
                return
            del loading[trial]
            await task
            if proven:
                await self._prove(trial)

    async def _prove(self, trial: Trial) -> None:
        if trial.verdict.passed:
            await trial.attempt("golden", trial.golden(self._limits.run_timeout_s))

    async def _prove_again(self, trials: Sequence[Trial]) -> None:
        """What was right before it was worked hard is right afterwards."""
        for trial in trials:
            if trial.verdict.passed and not on_cpu(trial.verdict.requested):
                await trial.attempt("measure", trial.soak(self._limits.run_timeout_s))
            if trial.verdict.passed:
                await trial.attempt("golden", trial.again(self._limits.run_timeout_s))

    async def _rounds(self, trials: Sequence[Trial]) -> None:
        """Interleaved rounds, and more of them where two are close or one seems to leak."""
        for number in range(ROUNDS):
            await self._round(trials if number < CLEAR_ROUNDS else _racing(trials))
        until = time.monotonic() + EXTRA_S
        for _ in range(EXTRA_ROUNDS):
            left = [t for t in trials if t.verdict.passed]
            best = min((t.floor_ms for t in left), default=0.0)
            close = [t for t in left if t.floor_ms <= CLOSE * best]
            open_still = len(close) > 1 and not all(t.settled(SETTLED_ROUNDS, SETTLED) for t in close)
            open_still = open_still and time.monotonic() < until
            again = [t for t in left if t.may_leak or (open_still and t in close)]
            if not again:
                return
            await self._round(again)

    async def _round(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            if trial.verdict.passed:
                await trial.attempt("measure", trial.measure(*_runs(trial), self._limits.run_timeout_s))


class Late:
    """A candidate that still compiles while another serves.

    Args:
        task: its loading, under way.
        witnesses: verdicts on the processor's own rungs, of the trial it was part of.
    """

    def __init__(
        self, runner: TrialRunner, trial: Trial, task: asyncio.Task[None], witnesses: Sequence[Verdict]
    ) -> None:
        self._runner = runner
        self._trial = trial
        self._task = task
        self._witnesses = witnesses

    @property
    def delegate(self) -> str:
        """What compiles."""
        return self._trial.verdict.requested

    async def compiled(self) -> None:
        """Wait until it has loaded, or failed to.

        Raises:
            AgentError: `worker_unavailable`.
            OtaError: the stored model cannot be opened.
        """
        await asyncio.shield(self._task)

    async def verdict(self) -> Verdict:
        """Prove and measure it.

        Raises:
            AgentError: `worker_unavailable`.
            OtaError: the stored model cannot be opened.
        """
        runner, trial = self._runner, self._trial
        await runner._prove(trial)
        await runner._rounds([trial])
        await runner._prove_again([trial])
        verdict = trial.judge(self._witnesses)
        await trial.keep(runner._limits.run_timeout_s)
        return verdict

    async def close(self) -> None:
        """End its worker."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._runner.at_work = [t for t in self._runner.at_work if t is not self._trial]
        await finish([self._trial], GONE_TIMEOUT_S)


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of `work`, done side by side; the first that fails, or a cancellation, ends all of it."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _runs(trial: Trial) -> tuple[int, int]:
    """(warm-ups, runs) of the next round."""
    if trial.rounds == 0:
        return WARMUPS, 1
    floor_ms = trial.floor_ms
    # never the same number twice: what takes and returns memory in turns would look as if it only took
    more = 5 * trial.rounds % 7 if floor_ms <= LONG_MS or trial.may_leak else 0
    runs = max(1, min(MAX_RUNS, int(ROUND_MS / floor_ms))) + more
    return min(MAX_RUNS, round(WARM_MS / floor_ms)), runs


def _racing(trials: Sequence[Trial]) -> list[Trial]:
    """Those of which more runs may tell something new. All hardware does: it may pretend."""
    slow_ms = CLEAR * min((t.floor_ms for t in trials if t.verdict.passed), default=0.0)
    return [t for t in trials if not on_cpu(t.verdict.requested) or t.floor_ms <= slow_ms or t.may_leak]


def _witnesses(subject: Subject, pairs: Sequence[tuple[str, str]], beside: Sequence[Verdict]) -> list[tuple[str, str]]:
    """The processor's own rungs that no pair names, for each component that is tried on hardware."""
    known = {*pairs, *((v.component, v.requested) for v in beside)}
    found = []
    for component in dict.fromkeys(name for name, delegate in pairs if not on_cpu(delegate)):
        for delegate in WITNESSES.get(subject.load(component, "").format, ()):
            if (component, delegate) not in known:
                found.append((component, delegate))
    return found


def _judged(trials: Sequence[Trial], *, on_processor: bool, witnesses: Sequence[Verdict] = ()) -> list[Verdict]:
    """Judge those on the processor, or those on hardware against `witnesses` of the same component."""
    return [
        trial.judge([w for w in witnesses if w.component == trial.verdict.component])
        for trial in trials
        if on_cpu(trial.verdict.requested) == on_processor
    ]


def _compiling(verdict: Verdict) -> Verdict:
    return replace(
        verdict, reason=Reason.DELEGATE_COMPILING.value, stage="load",
        message=f"{verdict.requested} still compiles; another delegate serves meanwhile",
    )  # fmt: skip


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
