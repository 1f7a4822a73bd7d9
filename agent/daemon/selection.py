"""Which delegate runs a model: decided from measured verdicts alone, in pure code.

It is not where measuring happens (`agent.daemon.trials`). Rule: every candidate that reproduced its golden vectors is
ranked by the minimum of its interleaved runs, because other load on the board only ever adds time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agent.errors import Reason


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the trial of one component on one delegate showed. Times are milliseconds per frame, 0 when not measured.

    `requested` is the delegate asked for, `actual` the one that ran, `coverage` its share of the nodes; `reason` is
    empty for a pass. `model` is the SHA-256 of the component's plaintext: a verdict holds for those bytes alone.
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

    @property
    def passed(self) -> bool:
        """Whether this candidate may serve."""
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        """All fields, for status and the verdict cache."""
        return asdict(self)


def quantile(values_ms: Iterable[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed (nearest rank); 0 for none."""
    ordered = sorted(values_ms)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def rank(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Those that passed, fastest minimum first; of equals the one asked for first."""
    return sorted((v for v in verdicts if v.passed), key=lambda v: v.min_ms)


def failure(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict that explains why none passed: the first that is about the model, not about a missing runtime."""
    absent = {Reason.RUNTIME_MISSING.value, Reason.UNKNOWN_DELEGATE.value}
    return next((v for v in verdicts if v.reason not in absent), verdicts[0])


def explain(verdicts: Sequence[Verdict]) -> str:
    """One line: what runs and how the others compared."""
    ranked = rank(verdicts)
    if not ranked:
        return "no delegate passed"
    best = ranked[0]
    others = [f"{v.requested} {v.min_ms / best.min_ms:.1f}x" for v in ranked[1:] if best.min_ms > 0]
    failed = [f"{v.requested} {v.reason}" for v in verdicts if not v.passed]
    return f"{best.requested} {best.min_ms:.2f} ms" + "".join(f", {text}" for text in others + failed)
