"""A release's candidate against every rung its line may use: beside each other, or alone where hardware demands that.

It decides nothing about what serves. Invariants: no two contests measure at once; what one process alone may have open
is tried while nothing else has it; hardware found to be so, though the profile does not say it, is treated so from then
on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

from agent.daemon.lines import LineRuntime
from agent.daemon.rungs import Rungs
from agent.daemon.selection import Verdict, on_cpu
from agent.daemon.trial import Subject
from agent.daemon.trials import Late, TrialRunner
from agent.daemon.worker import Worker
from agent.errors import Reason

log = logging.getLogger(__name__)

_Pair = tuple[str, str]
# how a second opener fails while the first one keeps the device
_SHUT_OUT = frozenset({
    Reason.DELEGATE_BUSY.value, Reason.DELEGATE_BROKEN.value, Reason.WORKER_CRASHED.value, Reason.WORKER_HUNG.value,
    Reason.MODEL_UNLOADABLE.value,
})  # fmt: skip


class Contest:
    """Runs contests of the lines of one device.

    Attributes:
        lending: held while an exclusive delegate is in a trial's or a starting worker's hands.
        measuring: held while anything is measured.
    """

    def __init__(
        self,
        trials: TrialRunner,
        rungs: Rungs,
        lines: Mapping[str, LineRuntime],
        on_event: Callable[[str, dict[str, object]], None],
    ) -> None:
        self.lending = asyncio.Lock()
        self.measuring = asyncio.Lock()
        self._trials = trials
        self._rungs = rungs
        self._lines = lines
        self._on_event = on_event

    async def run(
        self, runtime: LineRuntime, subject: Subject, pairs: Sequence[_Pair], later: Callable[[Late], None] | None
    ) -> list[Verdict]:
        """One verdict for each (component, delegate) of `pairs`, in that order.

        Args:
            later: takes over what still compiles when another passed; None waits for it.

        Raises:
            AgentError: `worker_unavailable`.
            Rejected: `busy`: another line has what a pair needs.
            OtaError: the stored model cannot be opened.
        """
        async with self.measuring:
            alone = [pair for pair in pairs if pair[1] in self._rungs.exclusive]
            beside = [pair for pair in pairs if pair not in alone]
            open_now = self._openers(beside)
            verdicts = await self._trials.run(subject, beside, late=later)
            found = dict(zip(beside, verdicts, strict=True))
            alone += self._shut_out(runtime, found, open_now)
            await self._alone(runtime, subject, alone, found)
        return [found[pair] for pair in pairs]

    async def _alone(
        self, runtime: LineRuntime, subject: Subject, pairs: Sequence[_Pair], found: dict[_Pair, Verdict]
    ) -> None:
        measured = [v for v in found.values() if on_cpu(v.requested)]
        async with AsyncExitStack() as stack:
            if pairs:
                await stack.enter_async_context(self.lending)
                # another line may have come first while this one waited
                self._rungs.refuse_taken(runtime, pairs)
            serves = any(runtime.holds(delegate) for _, delegate in pairs)
            if serves:
                await stack.enter_async_context(runtime.lend())
            for pair in pairs:
                before = found.get(pair)
                # what served waits for this: no time to compile for long
                (found[pair],) = await self._trials.run(subject, [pair], beside=measured, patient=not serves)
                if before is not None and found[pair].passed:
                    self._learn(pair[1], runtime, "it could not be opened beside the worker that serves")

    def _openers(self, pairs: Sequence[_Pair]) -> dict[str, tuple[LineRuntime, Worker]]:
        """Whose worker has the hardware of `pairs` open now."""
        return {
            delegate: (line, line.serving.worker)
            for _, delegate in pairs
            if not on_cpu(delegate)
            for line in self._lines.values()
            if line.holds(delegate) and line.serving is not None
        }

    def _shut_out(
        self,
        runtime: LineRuntime,
        found: Mapping[_Pair, Verdict],
        open_now: Mapping[str, tuple[LineRuntime, Worker]],
    ) -> list[_Pair]:
        """The pairs to try once more alone: their first opener died of the second, or the second was shut out."""
        again = []
        for pair, verdict in found.items():
            delegate = pair[1]
            if delegate not in open_now:
                continue
            owner, worker = open_now[delegate]
            end = worker.exited.result() if worker.exited.done() else None
            if end is not None and not end.killed and not end.lost:
                self._learn(delegate, owner, f"a trial of line {runtime.config.name} ended its worker, which {end}")
                again.append(pair)
            elif verdict.reason in _SHUT_OUT and verdict.stage == "load" and owner is runtime:
                again.append(pair)
        return again

    def _learn(self, delegate: str, owner: LineRuntime, why: str) -> None:
        if delegate in self._rungs.exclusive:
            return
        self._rungs.learned.add(delegate)
        reason = Reason.DELEGATE_EXCLUSIVE.value
        log.error("%s stands one opener only, line %s: %s", delegate, owner.config.name, why, extra={"reason": reason})
        facts: dict[str, object] = {"line": owner.config.name, "delegate": delegate}
        self._on_event("delegate_exclusive", {**facts, "reason": reason, "message": why})
