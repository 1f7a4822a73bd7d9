"""Which delegate runs a model: decided from measured verdicts alone, in pure code.

It is not where measuring happens (`agent.daemon.trials`) nor where verdicts are kept (`agent.daemon.verdicts`).
Rules: every candidate that reproduced its golden vectors within its budgets is ranked by one figure, the line's
objective, taken as the minimum of interleaved runs, because other load on the board only ever adds time; what did not
pass is never ranked, whatever the objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agent.errors import Reason

# what a rung on the processor itself is called: everything else is hardware that the processor stands in for at best
_CPU_KINDS = frozenset({"cpu", "xnnpack", "reference"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the trial of one component on one delegate showed. Times are milliseconds per frame, 0 when not measured.

    `requested` is the delegate asked for, `actual` the one that ran, `coverage` its share of the nodes; `reason` is
    empty for a pass, else `stage` says where it failed: `load`, `golden`, `measure` or `judge`. Times of runs are
    wall time less what the run waited for a core, which is the board's doing and not the delegate's; `cpu_ms` is the
    least that all threads of the process computed in a run, `mean_cpu_ms` what they did on average. It holds for the
    bytes whose SHA-256 is `model`, under `runtime`, `driver`, `profile` and `threads`, and for nothing else; what a
    line wants is no part of it.
    """

    component: str
    requested: str
    actual: str = ""
    coverage: float = 0.0
    runtime: str = ""
    reason: str = ""
    message: str = ""
    min_ms: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    load_ms: float = 0.0
    rss_bytes: int = 0
    golden_worst: float = 0.0
    model: str = ""
    p99_ms: float = 0.0
    cpu_ms: float = 0.0
    driver: str = ""
    profile: str = ""
    threads: int = 1
    stage: str = ""
    mean_cpu_ms: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether this candidate may serve."""
        return not self.reason

    @property
    def frame_ms(self) -> float:
        """What a frame occupies of the scarcer of the delegate and one core: the bound of a line's throughput."""
        return max(self.min_ms, self.cpu_ms)

    def to_json(self) -> dict[str, Any]:
        """All fields, for status and the verdict cache."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Fall:
    """A rung that should have served and did not: what was wanted, why not, and what runs instead."""

    wanted: str
    reason: str
    message: str
    using: str


def on_cpu(delegate: str) -> bool:
    """Whether `delegate` computes on the processor itself."""
    return delegate.rpartition(":")[2] in _CPU_KINDS


def quantile(values_ms: Iterable[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed (nearest rank); 0 for none."""
    ordered = sorted(values_ms)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def figure(verdict: Verdict, objective: str) -> float:
    """What `objective` wants to be small: ms of latency, ms of the scarcer resource a frame, bytes, or CPU ms a frame.

    Power has no sensor that every board has; CPU time a frame stands for it, and status says so.
    """
    figures = {
        "latency": verdict.min_ms,
        "throughput": verdict.frame_ms,
        "memory": float(verdict.rss_bytes),
        "power": verdict.cpu_ms,
    }
    return figures[objective]


def rank(verdicts: Iterable[Verdict], objective: str = "latency") -> list[Verdict]:
    """Those that passed, best for `objective` first; of equals the faster, then the one asked for first."""
    return sorted((v for v in verdicts if v.passed), key=lambda v: (figure(v, objective), v.min_ms))


def failure(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict that explains why none passed: the first that is about the model, not about the board."""
    absent = {Reason.RUNTIME_MISSING.value, Reason.UNKNOWN_DELEGATE.value, Reason.DELEGATE_BROKEN.value}
    return next((v for v in verdicts if v.reason not in absent), verdicts[0])


def wanted_rungs(ladder: Sequence[str], explicit: bool) -> list[str]:
    """The rungs of `ladder` whose failure is a fall: all hardware, and the first of a list that a person wrote."""
    first = ladder[:1] if explicit else ()
    return [rung for rung in ladder if rung in first or not on_cpu(rung)]


def falls(chosen: str, ladder: Sequence[str], explicit: bool, unfit: Mapping[str, tuple[str, str]]) -> list[Fall]:
    """Which wanted rungs above `chosen` do not serve, and why. A rung that passed and was slower has not failed.

    Args:
        ladder: what the line may use, in order; `explicit` where a person wrote it.
        unfit: (reason, message) of each rung that cannot serve now.
    """
    above = ladder[: ladder.index(chosen)] if chosen in ladder else ladder
    return [
        Fall(rung, *unfit[rung], chosen) for rung in wanted_rungs(ladder, explicit) if rung in above and rung in unfit
    ]


def explain(verdicts: Sequence[Verdict], objective: str = "latency") -> str:
    """One line: what runs and how the others compared."""
    ranked = rank(verdicts, objective)
    if not ranked:
        return "no delegate passed"
    best = ranked[0]
    least = figure(best, objective)
    others = [f"{v.requested} {figure(v, objective) / least:.1f}x" for v in ranked[1:] if least > 0]
    failed = [f"{v.requested} {v.reason}" for v in verdicts if not v.passed]
    return f"{best.requested} {best.min_ms:.2f} ms" + "".join(f", {text}" for text in others + failed)
