"""A sample of `make swaps`: swaps give back what they took, lose no frame, and so do they with forked workers."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from ota.client.ports import Candidate
from tests.agent.daemon.rig import Rig, run
from tests.bench.memory import family_held_mb

SWAPS = 5
LIMIT_MB = 2.0


async def settled_mb(rig: Rig) -> float:
    """Memory of the host and all workers, when the old worker is gone; least of some looks."""
    await rig.one_model()
    assert rig.supervisor.host is not None
    looks = []
    for _ in range(5):
        looks.append(family_held_mb(rig.supervisor.host.pid))
        await asyncio.sleep(0.1)
    return min(looks)


@pytest.mark.parametrize("zygote", [False, True], ids=["executed", "forked"])
def test_swaps_give_all_memory_back_and_lose_no_frame(
    clip: Path, parts: Candidate, newer: Candidate, zygote: bool
) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        await rig.serve(newer)
        await rig.frames(30)
        # the ring takes pages when they are first needed, which depends on the machine's load: once all of them
        os.kill(rig.pid, signal.SIGSTOP)
        await asyncio.sleep(0.5)
        os.kill(rig.pid, signal.SIGCONT)
        await rig.frames(30)
        before = await settled_mb(rig)
        for number in range(SWAPS):
            assert await rig.serve(parts if number % 2 else newer) is not None
            await rig.frames(10)
        await rig.frames(30)
        after = await settled_mb(rig)
        assert rig.dropped == []
        assert after - before < LIMIT_MB, f"{before:.2f} MB before {SWAPS} swaps, {after:.2f} after"

    run(body, clip, policy="every", zygote=zygote).account()


def test_a_killed_worker_comes_back_from_the_zygote(clip: Path, parts: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        assert rig.supervisor.host is not None
        for _ in range(2):
            victim = rig.pid
            assert os.readlink(f"/proc/{victim}/exe")
            assert b"zygote" in Path(f"/proc/{victim}/cmdline").read_bytes().split(b"\0")
            os.kill(victim, signal.SIGKILL)
            await rig.until(lambda victim=victim: rig.pid not in (0, victim))  # type: ignore[misc]
            await rig.frames()
        assert rig.line.tally.crashes == 2

    run(body, clip, zygote=True).account()
