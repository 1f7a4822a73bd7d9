"""A serving worker whose memory grows without end: ended at its limit, started again, given up when it repeats."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agent.daemon.crashes import CrashLoops
from agent.daemon.selection import Verdict
from agent.errors import Reason
from ota.client.ports import Candidate
from ota.errors import OtaError
from ota.errors import Reason as OtaReason
from tests.agent.daemon.rig import LIMITS, Rig, run

CRASHES = 3
LIMIT_MB = 512


class Previous:
    """Puts the release before back, as the updater does, on a delegate that does not leak."""

    def __init__(self, rig: Rig, candidate: Candidate) -> None:
        self.given_up: list[tuple[str, OtaReason]] = []
        self._rig = rig
        self._candidate = candidate

    async def unfit(self, line: str, release_sha256: str, error: OtaError) -> None:
        self.given_up.append((release_sha256, error.reason))
        await self._rig.line.serve(self._candidate, Verdict(self._candidate.component.name, "litert:cpu"))


@pytest.mark.fault("F69")
def test_a_serving_model_that_eats_memory_is_ended_at_its_limit_and_rolled_back_when_it_repeats(
    clip: Path, parts: Candidate, newer: Candidate
) -> None:
    host = [sys.executable, str(Path(__file__).with_name("leaking.py")), "host"]
    seen: list[Reason] = []

    async def body(rig: Rig) -> None:
        previous = Previous(rig, parts)
        tasks: set[asyncio.Task[None]] = set()
        loops = CrashLoops(
            previous,
            None,  # type: ignore[arg-type] - told only of what cannot be rolled back
            limit=CRASHES,
            window_s=600,
            clock=asyncio.get_running_loop().time,
            spawn=lambda work, name: tasks.add(asyncio.create_task(work, name=name)),
            look=lambda: None,
        )

        def crashed(line: str, candidate: Candidate, reason: Reason) -> None:
            seen.append(reason)
            loops.crashed(line, candidate, reason)

        rig.on_crash = crashed
        await rig.serve(newer)
        await rig.until(lambda: bool(previous.given_up))
        assert previous.given_up == [(newer.release.sha256, OtaReason.WORKER_OUT_OF_MEMORY)]
        await asyncio.gather(*tasks)
        assert rig.line.serving is not None
        assert rig.line.serving.candidate is parts
        before = len(seen)
        await rig.frames(60)
        assert len(seen) == before  # the one that does not leak stays

    rig = run(body, clip, replace(LIMITS, trial_memory_mb=LIMIT_MB), host_command=host)
    assert set(seen) == {Reason.WORKER_OUT_OF_MEMORY}
    assert len(seen) >= CRASHES
    ends = [facts for kind, facts in zip(rig.events, rig.facts, strict=True) if kind == "worker_exit"]
    assert {fact["reason"] for fact in ends} == {"worker_out_of_memory"}
    assert rig.line.restarts >= CRASHES - 1
    rig.account()
