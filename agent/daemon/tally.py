"""What a serving worker has done since it was put to work; probation reads it. Counts alone, no judgement."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent import protocol
from agent.daemon.selection import quantile
from agent.errors import Reason


@dataclass
class Tally:
    """Results and crashes of one release in service, over restarts of its worker."""

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
