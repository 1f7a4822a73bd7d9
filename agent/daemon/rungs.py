"""Which delegates a line may use now, who owns those that one process alone may have open, and what counts as a fall.

It measures nothing and starts nothing. `taken` and `busy` are two things: a delegate that another line serves on is
taken for as long as that line likes, and what is left of the ladder may serve by the line's policy; one that something
has open for the moment is busy, which is waited for, whatever else the ladder holds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from agent.daemon.lines import LineRuntime
from agent.daemon.selection import Fall, Verdict, falls
from agent.daemon.trial import Trial
from agent.errors import Reason as AgentReason
from agent.lineconfig import LineConfig
from agent.profile import Profile
from ota.errors import Reason, Rejected
from ota.release import Release


class Rungs:
    """The ladder of each line of one device.

    Attributes:
        learned: delegates found, since the daemon started, to stand one opener only though the profile does not say so.
    """

    def __init__(self, profile: Profile, lines: Mapping[str, LineRuntime]) -> None:
        self.learned: set[str] = set()
        self._profile = profile
        self._lines = lines

    @property
    def exclusive(self) -> tuple[str, ...]:
        """The delegates that one process alone may have open."""
        return (*self._profile.exclusive, *sorted(self.learned - {*self._profile.exclusive}))

    def owners(self) -> dict[str, str]:
        """The line that owns each exclusive delegate in service."""
        owned = {delegate: self.owner(delegate) for delegate in self.exclusive}
        return {delegate: line for delegate, line in owned.items() if line}

    def owner(self, delegate: str, but: LineRuntime | None = None) -> str:
        """The line, other than `but`, that owns an exclusive delegate; empty for none and for any other delegate."""
        if delegate not in self.exclusive:
            return ""
        return next((name for name, line in self._lines.items() if line is not but and line.holds(delegate)), "")

    def allowed(self, runtime: LineRuntime) -> tuple[str, ...]:
        """All that the line may ever use, in order."""
        return runtime.config.delegates or self._profile.delegates

    def ladder(self, runtime: LineRuntime) -> tuple[str, ...]:
        """What the line may use now: one that a single process may have open is the line's that serves on it."""
        return tuple(name for name in self.allowed(runtime) if not self.owner(name, runtime))

    def refuse_taken(self, runtime: LineRuntime, pairs: Sequence[tuple[str, str]]) -> None:
        """Say "not now" when one of the (component, delegate) `pairs` needs what another line owns.

        Raises:
            Rejected: `busy`.
        """
        for _, delegate in pairs:
            if owner := self.owner(delegate, runtime):
                raise Rejected(
                    Reason.BUSY,
                    f"{delegate} serves line {owner}, and one process alone may have it open",
                    hint=f"allow line {runtime.config.name} or {owner} another delegate in agent.toml",
                    retry=True,
                )

    def falls(self, runtime: LineRuntime, release: Release, chosen: str, known: Sequence[Verdict]) -> list[Fall]:
        """The rungs above `chosen` that should serve `release` on this line and do not.

        Args:
            known: the last verdicts on the files of `release`.
        """
        unfit: dict[str, tuple[str, str]] = {}
        offered = {delegate for component in release.components for delegate in component.delegates}
        for rung in self.allowed(runtime):
            mine = [v for v in known if v.requested == rung]
            if owner := self.owner(rung, runtime):
                unfit[rung] = (AgentReason.DELEGATE_TAKEN.value, f"line {owner} serves on it")
            elif rung not in offered:
                unfit[rung] = (AgentReason.NO_DELEGATE.value, "the release has no component for it")
            elif mine and not any(v.passed for v in mine):
                unfit[rung] = (mine[0].reason, mine[0].message)
        explicit = bool(runtime.config.delegates)
        return falls(chosen, self.allowed(runtime), explicit, unfit)


def selection_status(
    line: LineConfig, fallen: Sequence[Fall], stale_verdict: str, at_work: Sequence[Trial]
) -> dict[str, Any]:
    """How a line's delegate is chosen, for status: by what, what should serve and does not, what is tried now."""
    now = time.monotonic()
    return {
        "objective": line.objective,
        "proxy": "cpu_ms" if line.objective == "power" else "",
        "fallback": line.fallback,
        "fell": [{"delegate": f.wanted, "reason": f.reason, "message": f.message} for f in fallen],
        "stale": stale_verdict,
        "trying": [
            {"delegate": t.verdict.requested, "step": t.step, "since_s": round(now - t.since, 1)}
            for t in at_work
            if t.line == line.name
        ],
    }
