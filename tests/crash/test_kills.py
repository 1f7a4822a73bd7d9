"""A sample of the kill campaign; `python tests/crash/kills.py` is the whole."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.crash.kills import CALLS, Campaign, at_random, kill_once, killed_at, worlds

RANDOM_KILLS = 8


@pytest.mark.fault("F25")
def test_a_process_killed_at_any_moment_is_started_again_and_completes(tmp_path: Path) -> None:
    campaign = Campaign()
    for what, world in worlds(tmp_path).items():
        work = tmp_path / f"work-{what}"
        work.mkdir()
        at_random(world, work, campaign, what, campaign.count + RANDOM_KILLS // 2, random.Random(25))
    print(f"\n{campaign.report()}")
    assert campaign.count >= RANDOM_KILLS
    assert not campaign.violations


def test_a_process_killed_as_it_enters_an_fsync_rename_write_or_unlink_is_started_again_and_completes(
    tmp_path: Path,
) -> None:
    if not shutil.which("strace"):
        assert not os.environ.get("CI"), "strace is not installed"
        pytest.skip("strace is not installed")
    campaign = Campaign()
    world = worlds(tmp_path)["full"]
    work = tmp_path / "work"
    work.mkdir()
    for call, number in [(call, number) for call in CALLS for number in (2, 13)]:
        name = f"{call} number {number}"
        assert kill_once(world, world.state, work, [(call, killed_at(call, number))], campaign, name=name), name
    print(f"\n{campaign.report()}")
    assert campaign.count == 2 * len(CALLS)
    assert not campaign.violations
