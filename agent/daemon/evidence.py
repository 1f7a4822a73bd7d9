"""Delegates that pretend: what their trial shows against them, in pure code.

Each function takes figures and answers with the charge in one line, or nothing. It measures nothing and ranks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.daemon.selection import Verdict, on_cpu

# A delegate that hands its work on computes as much as the processor's own rung does; one that waits for its hardware
# computes less, also where its driver waits by spinning, unless the hardware is no faster than the processor.
SAME_CPU_SHARE = 0.9
# What a call of a driver costs by itself. Of a model that the processor computes in less, nothing can be told from it.
DRIVER_MS = 0.2
# Allocators settle within the first rounds; a leak grows in every one after that.
SETTLING_ROUNDS = 2
GROWING_ROUNDS = 5
LEAK_BYTES_A_RUN = 16 * 1024


def fell_back(verdict: Verdict, witnesses: Sequence[Verdict]) -> str:
    """Against hardware that quietly computes on the processor, every run or so many of them that it is no cheaper.

    Args:
        witnesses: verdicts on the processor's own rungs for the same model bytes; those not measured do not count.
    """
    if on_cpu(verdict.requested):
        return ""
    measured = [w for w in witnesses if on_cpu(w.requested) and w.cpu_ms > 0]
    if not measured or verdict.cpu_ms <= 0:
        return ""
    least = min(measured, key=lambda w: w.cpu_ms)
    mean = min((w for w in measured if w.mean_cpu_ms > 0), key=lambda w: w.mean_cpu_ms, default=least)
    compared = [
        (verdict.cpu_ms, least.cpu_ms, least, "of CPU a frame"),
        (verdict.mean_cpu_ms, mean.mean_cpu_ms, mean, "of CPU a frame on average"),
    ]
    for own, other, witness, what in compared:
        if other >= DRIVER_MS and own >= SAME_CPU_SHARE * other:
            return (
                f"{verdict.requested} says that it runs {verdict.coverage:.0%} of the model and uses "
                f"{own:.3f} ms {what}, as {witness.requested} alone does ({other:.3f} ms)"
            )
    return ""


def partly(verdict: Verdict, min_coverage: float) -> str:
    """Against hardware that leaves too much of the graph to the processor."""
    if on_cpu(verdict.requested) or verdict.coverage >= min_coverage:
        return ""
    return f"{verdict.requested} runs {verdict.coverage:.1%} of the model's nodes, {min_coverage:.1%} are wanted"


def leaks(rss_bytes: Sequence[int], runs: Sequence[int]) -> str:
    """Against one that keeps memory of every run.

    Args:
        rss_bytes: the least resident memory after any run of each round.
        runs: how many runs each round made.
    """
    if len(rss_bytes) < SETTLING_ROUNDS + GROWING_ROUNDS:
        return ""
    steps = [
        (after - before) / count for before, after, count in zip(rss_bytes[:-1], rss_bytes[1:], runs[1:], strict=True)
    ]
    late = steps[SETTLING_ROUNDS - 1 :]
    if min(late) <= 0 or sum(late) / len(late) < LEAK_BYTES_A_RUN:
        return ""
    return f"{sum(late) / len(late) / 1024:.0f} KiB more after every run, over {sum(runs[SETTLING_ROUNDS:])} runs"


def may_leak(rss_bytes: Sequence[int]) -> bool:
    """Whether one more round is worth its time: memory has grown in each of the latest, and not long enough to say."""
    latest = rss_bytes[-3:]
    open_still = 3 <= len(rss_bytes) < SETTLING_ROUNDS + GROWING_ROUNDS
    return open_still and latest[0] < latest[1] < latest[2]
