"""Timed runs of a loaded model on one input: what each took, what it computed, and whether the answer stays the same.

It decides nothing about speed; `agent.daemon.selection` does. Invariant: reading clocks, the kernel's word on waiting
and the comparison of answers lie outside what is timed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agent.errors import ModelError, Reason
from agent.worker.footprint import helpers_cpu_ns, holdings, rss_bytes
from agent.worker.golden import default_atol
from agent.worker.tensor import Array, TensorSpec

# of one thread: nanoseconds computed, nanoseconds runnable without a core, turns
_SCHEDSTAT = "/proc/self/task/{}/schedstat"

LEAK_ROUNDS = 3


@dataclass
class Timed:
    """Nanoseconds of each counted run: wall time, CPU time of the process and a share of what its helpers computed,
    time its threads waited for a core; and the least resident memory after any of them."""

    runs_ns: list[int]
    cpu_ns: list[int]
    waited_ns: list[int]
    least_rss_bytes: int


class Measurement:
    """Runs of one model on one input, over as many rounds as are asked for.

    Args:
        once: one whole run.
        outputs: the model's outputs of the last run.
        specs: of these outputs.
        atol: how far each may be off, in real values; empty takes `golden.default_atol` of the first answer.
    """

    def __init__(
        self,
        once: Callable[[], object],
        outputs: Callable[[], Sequence[Array]],
        specs: Sequence[TensorSpec],
        atol: Sequence[float],
    ) -> None:
        self._once = once
        self._outputs = outputs
        self._specs = specs
        self._atol = tuple(atol)
        self._first: list[Array] = []
        self._held: list[tuple[dict[str, int], int]] = []

    def runs(self, warmups: int, runs: int) -> Timed:
        """Run `warmups` + `runs` times.

        Raises:
            ModelError: `output_not_finite`, `delegate_unsteady`, `delegate_leaks`.
        """
        timed = Timed([], [], [], 0)
        for _ in range(warmups):
            self._once()
            self._compare()
        helped, schedules = helpers_cpu_ns(), _open_schedules()
        try:
            for _ in range(runs):
                outer, before, computed = time.perf_counter_ns(), _read(schedules), time.process_time_ns()
                started = time.perf_counter_ns()
                self._once()
                took = time.perf_counter_ns() - started
                cpu, after = time.process_time_ns() - computed, _read(schedules)
                timed.runs_ns.append(took)
                timed.cpu_ns.append(cpu)
                timed.waited_ns.append(_waited(took, time.perf_counter_ns() - outer, before, after))
                timed.least_rss_bytes = min(timed.least_rss_bytes or 1 << 62, rss_bytes())
                self._compare()
        finally:
            for schedule in schedules:
                os.close(schedule)
        # what helpers did cannot be told run by run
        share = max(0, helpers_cpu_ns() - helped) // max(1, runs)
        timed.cpu_ns = [cpu + share for cpu in timed.cpu_ns]
        self._check_holdings(warmups + runs)
        return timed

    def _check_holdings(self, runs: int) -> None:
        """Pass one that does not take another descriptor, thread or mapping for every other run, round after round."""
        self._held.append((holdings(), runs))
        latest = self._held[-1 - LEAK_ROUNDS :]
        if len(latest) <= LEAK_ROUNDS:
            return
        for kind in latest[0][0]:
            pairs = itertools.pairwise(latest)
            if all(2 * (after[kind] - before[kind]) >= count for (before, _), (after, count) in pairs):
                grown, made = latest[-1][0][kind] - latest[0][0][kind], sum(count for _, count in latest[1:])
                raise ModelError(Reason.DELEGATE_LEAKS, f"{grown} {kind} more after {made} runs")

    def _compare(self) -> None:
        outputs = self._outputs()
        if not self._first:
            self._first = [output.copy() for output in outputs]
            for spec, output in zip(self._specs, self._first, strict=True):
                check_finite(spec, output)
            self._atol = self._atol or tuple(
                default_atol(spec, [output]) for spec, output in zip(self._specs, self._first, strict=True)
            )
            return
        for spec, limit, first, now in zip(self._specs, self._atol, self._first, outputs, strict=True):
            if np.array_equal(first, now):
                continue
            check_finite(spec, now)
            error = float(np.abs(spec.real(now) - spec.real(first)).max(initial=0.0)) if now.shape == first.shape else 0
            if now.shape != first.shape or error > limit:
                raise ModelError(
                    Reason.DELEGATE_UNSTEADY,
                    f"the same input gives another {spec.name[:60]}, off by {error:.4g}, tolerance {limit:.4g}",
                )


def check_finite(spec: TensorSpec, output: Array) -> None:
    """Pass an output without NaN and infinity.

    Raises:
        ModelError: `output_not_finite`.
    """
    if np.issubdtype(output.dtype, np.floating) and not np.isfinite(output).all():
        raise ModelError(Reason.OUTPUT_NOT_FINITE, f"{spec.name[:60]} holds numbers that are not finite")


def _open_schedules() -> list[int]:
    """A descriptor for each thread of this process: a runtime may compute in one of its own while this one sleeps.

    None on a kernel without scheduler statistics: every wait then counts as the run's own time.
    """
    found = []
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(os.open(_SCHEDSTAT.format(thread), os.O_RDONLY | os.O_CLOEXEC))
    return found


def _read(schedules: Sequence[int]) -> list[tuple[int, int]]:
    """Of each thread, nanoseconds that it has computed, and has been runnable without a core."""
    found = []
    for schedule in schedules:
        try:
            computed, waited, _ = os.pread(schedule, 80, 0).split()
        except OSError:  # it has ended meanwhile
            computed = waited = b"0"
        found.append((int(computed), int(waited)))
    return found


def _waited(took: int, outer: int, before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]) -> int:
    """How much of the `took` nanoseconds of a run was spent waiting for a core, by any thread.

    What lies between the two readings of the schedule is a little more than the run: what was waited in there is taken
    from their distance `outer`, and what is left is never less than what the busiest thread computed.
    """
    waited = sum(max(0, then[1] - now[1]) for now, then in zip(before, after, strict=True))
    if waited <= 0:
        return 0
    computed = max(then[0] - now[0] for now, then in zip(before, after, strict=True))
    return max(0, took - max(outer - waited, computed))
