"""When crashes of a committed release are a loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from agent.daemon.crashes import CrashLoops
from agent.daemon.telemetry import Clocks, Telemetry
from agent.errors import Reason
from ota.client.ports import Candidate, UpdateEvent
from ota.errors import OtaError
from ota.errors import Reason as OtaReason


class Updates:
    """Puts the previous release back, or has none."""

    def __init__(self, previous: bool) -> None:
        self.previous = previous
        self.asked: list[tuple[str, str]] = []

    async def unfit(self, line: str, release_sha256: str, error: OtaError) -> UpdateEvent | None:
        self.asked.append((line, error.reason.value))
        if not self.previous:
            raise OtaError(OtaReason.NOT_FOUND, f"{line} has no previous release")
        return UpdateEvent(line, "1.0.0", "idle", "rolled_back")


class Watched:
    """Crashes at chosen seconds."""

    def __init__(self, candidate: Candidate, *, previous: bool = True) -> None:
        self.candidate = candidate
        self.updates = Updates(previous)
        self.now = 0.0
        self.looks = 0
        self.telemetry = Telemetry(Clocks(lambda: 0, lambda: 0, "boot"))
        self.settings_on_trial = False
        self.loops = CrashLoops(
            self.updates, self.telemetry, limit=3, window_s=60, clock=lambda: self.now, spawn=self._run,
            look=self._look, excused=lambda: self.settings_on_trial,
        )  # fmt: skip

    def crash(self, *times: float, reason: Reason = Reason.WORKER_CRASHED) -> None:
        for self.now in times:
            self.loops.crashed("parts", self.candidate, reason)

    def _run(self, work: Coroutine[Any, Any, None], _: str) -> None:
        asyncio.run(work)

    def _look(self) -> None:
        self.looks += 1


def test_so_many_crashes_within_the_window_are_a_loop_and_a_look_follows(parts: Candidate) -> None:
    watched = Watched(parts)
    watched.crash(0, 30)
    assert not watched.updates.asked
    watched.crash(59)
    assert watched.updates.asked == [("parts", "worker_crashed")]
    assert watched.looks == 1
    watched.crash(60, 61, 62, 63)
    assert len(watched.updates.asked) == 1


def test_crashes_that_lie_further_apart_are_none(parts: Candidate) -> None:
    watched = Watched(parts)
    watched.crash(0, 40, 80, 120, 160)
    assert not watched.updates.asked


def test_what_dies_under_settings_on_trial_is_not_held_against_the_release(parts: Candidate) -> None:
    watched = Watched(parts)
    watched.settings_on_trial = True
    watched.crash(0, 1, 2, 3)
    watched.settings_on_trial = False
    watched.crash(4, 5)
    assert not watched.updates.asked
    watched.crash(6)
    assert watched.updates.asked == [("parts", "worker_crashed")]


def test_each_release_is_counted_for_itself(parts: Candidate, newer: Candidate) -> None:
    watched = Watched(parts)
    watched.crash(0, 1)
    watched.candidate = newer
    watched.crash(2, 3)
    assert not watched.updates.asked


@pytest.mark.parametrize(
    ("reason", "told"), [(Reason.WORKER_HUNG, "worker_hung"), (Reason.BAD_MESSAGE, "worker_crashed")]
)
def test_the_cause_of_the_last_crash_is_the_reason(parts: Candidate, reason: Reason, told: str) -> None:
    watched = Watched(parts)
    watched.crash(0, 1, 2, reason=reason)
    assert watched.updates.asked == [("parts", told)]


def test_without_a_release_before_it_one_alarm_is_told(parts: Candidate) -> None:
    watched = Watched(parts, previous=False)
    watched.crash(0, 1, 2, 3, 4, 5, 6, 7)
    assert len(watched.updates.asked) == 1
    batches: list[bytes] = []
    watched.telemetry.flush(lambda batch: batches.append(batch.payload) is None)
    assert b"".join(batches).count(b'"crash_loop"') == 1
    assert watched.looks == 0


@pytest.mark.parametrize(("reason", "asked"), [(OtaReason.BUSY, 2), (OtaReason.NO_SPACE, 2), (OtaReason.NOT_FOUND, 1)])
def test_what_hinders_the_way_back_for_now_is_tried_again_after_as_many_crashes(
    parts: Candidate, monkeypatch: pytest.MonkeyPatch, reason: OtaReason, asked: int
) -> None:
    watched = Watched(parts)
    tries: list[str] = []

    async def hindered(line: str, *_: object) -> UpdateEvent | None:
        tries.append(line)
        raise OtaError(reason, "not now")

    monkeypatch.setattr(watched.updates, "unfit", hindered)
    watched.crash(0, 1, 2, 3, 4, 5)
    assert len(tries) == asked
