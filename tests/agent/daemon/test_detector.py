"""Every way a delegate fails or pretends has a reason and a stage of its own; healthy ones with odd habits pass.

All fakes of `tests/fakes` are tried on the shipped line `parts` beside the real delegates, a batch at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from agent.daemon.selection import Verdict
from agent.daemon.supervisor import Supervisor
from agent.daemon.trials import TrialRunner, candidates, subject_of
from ota.client.ports import Candidate
from ota.release import Budgets
from tests import workerpython
from tests.agent.daemon.rig import LIMITS
from tests.bench import alarms
from tests.fakes.external import compile_library
from tests.fakes.registry import FOLDER, expected, fakes

XNNPACK = "litert:xnnpack"
BATCH = 7
DETECTOR_LIMITS = replace(LIMITS, load_timeout_s=8, compile_timeout_s=25, run_timeout_s=6, trial_memory_mb=1024)
FAKES_HOST = workerpython.program(str(FOLDER / "entry.py"), "host")


def offering(candidate: Candidate, delegates: Sequence[str]) -> Candidate:
    """`candidate` of a publisher that allows `delegates` too, with the budgets that the fakes count on."""
    offered = alarms.offering(candidate, delegates)
    return replace(offered, release=replace(offered.release, budgets=Budgets(250.0, None)))


async def tried(candidate: Candidate, delegates: Sequence[str]) -> list[Verdict]:
    """Verdicts on `delegates`, of one trial."""
    supervisor = Supervisor(listen=None, host_command=FAKES_HOST, on_lost=lambda: None)
    await supervisor.start()
    try:
        trials = TrialRunner(supervisor, DETECTOR_LIMITS)
        offered = offering(candidate, delegates)
        pairs = candidates(offered.components, delegates)
        return await trials.run(subject_of(offered, min_coverage=0.9), pairs)
    finally:
        await supervisor.stop()


@pytest.fixture(scope="session")
def verdicts(parts: Candidate) -> dict[str, Verdict]:
    """The verdict on each fake, and on LiteRT beside the last of them."""
    compile_library()
    names = list(fakes())
    found: dict[str, Verdict] = {}
    for start in range(0, len(names), BATCH):
        batch = [*names[start : start + BATCH], XNNPACK]
        found |= {v.requested: v for v in asyncio.run(tried(parts, batch))}
    return found


@pytest.mark.parametrize("name", fakes())
def test_each_fake_gets_the_reason_that_tells_it_apart(verdicts: dict[str, Verdict], name: str) -> None:
    verdict, outcome = verdicts[name], expected()[name]
    reasons = (outcome.reason,) if isinstance(outcome.reason, str) else outcome.reason
    stages = (outcome.stage,) if isinstance(outcome.stage, str) else outcome.stage
    assert verdict.reason in reasons, verdict
    assert verdict.stage in stages, verdict
    if not verdict.passed:
        assert verdict.message


def test_a_real_delegate_beside_all_of_them_passes(verdicts: dict[str, Verdict]) -> None:
    assert verdicts[XNNPACK].passed
    assert verdicts[XNNPACK].cpu_ms > 0
    assert verdicts[XNNPACK].min_ms <= verdicts[XNNPACK].p50_ms <= verdicts[XNNPACK].p99_ms


def test_healthy_delegates_raise_no_alarm_while_both_cores_are_loaded(parts: Candidate) -> None:
    """`make selection` does so fifty times."""
    count, refused = alarms.false_alarms(parts, trials=1, burners=2)
    assert count
    assert not refused
