"""A line over real workers: swaps, deaths in every awkward moment, and each frame counted once."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.daemon import lines, sources
from agent.daemon.selection import Verdict
from agent.errors import AgentError, Reason
from ota.client.ports import Candidate
from ota.errors import OtaError
from ota.errors import Reason as OtaReason
from tests.agent.daemon.rig import LIMITS, Rig, run


def after_attach(rig: Rig, act: Any) -> None:
    """Do `act(model worker)` once, between a model's warm-up and the moment the line learns of it."""
    attach = rig.source.attach

    async def attach_then_act(line: str, model: Any, **how: Any) -> Any:
        rig.source.attach = attach  # type: ignore[method-assign]
        answer = await attach(line, model, **how)
        await act(model)
        return answer

    rig.source.attach = attach_then_act  # type: ignore[method-assign]


def test_a_swap_answers_every_frame_once_and_leaves_one_worker(clip: Path, parts: Candidate, newer: Candidate) -> None:
    async def body(rig: Rig) -> None:
        assert await rig.serve(parts) is None
        await rig.frames()
        first = await rig.serve(newer)
        assert first is not None
        assert first > 0
        await rig.frames()
        assert rig.line.serving is not None
        assert rig.line.serving.candidate.version == "1.0.1"
        await rig.one_model()

    run(body, clip).account()


def test_a_killed_worker_is_replaced_and_its_frame_is_counted_once(clip: Path, parts: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        for _ in range(2):
            await rig.frames()
            os.kill(rig.pid, signal.SIGKILL)
            await rig.until(lambda: "worker_exit" in rig.events)
        await rig.frames()
        assert rig.line.tally.crashes == 2
        assert rig.line.restarts >= 1

    run(body, clip).account()


def test_the_old_worker_may_die_during_the_swap(clip: Path, parts: Candidate, newer: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()

        async def kill_old(_: Any) -> None:
            os.kill(rig.pid, signal.SIGKILL)
            await asyncio.sleep(0.5)

        after_attach(rig, kill_old)
        await rig.serve(newer)
        await rig.frames()
        await rig.one_model()
        assert rig.line.serving is not None
        assert rig.line.serving.candidate.version == "1.0.1"

    run(body, clip).account()


def test_a_new_worker_that_dies_before_its_first_frame_leaves_the_old_one_alone(
    clip: Path, parts: Candidate, newer: Candidate
) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        old = rig.pid

        async def kill_new(model: Any) -> None:
            os.kill(model.pid, signal.SIGSEGV)
            await asyncio.wait((model.exited,), timeout=5)

        after_attach(rig, kill_new)
        with pytest.raises(AgentError) as caught:
            await rig.serve(newer)
        assert caught.value.reason is Reason.WORKER_CRASHED
        await rig.frames()
        assert rig.pid == old
        await rig.one_model()

    run(body, clip).account()


def test_a_first_worker_that_dies_after_its_warm_up_is_started_again(clip: Path, parts: Candidate) -> None:
    async def body(rig: Rig) -> None:
        async def kill_new(model: Any) -> None:
            os.kill(model.pid, signal.SIGSEGV)
            await asyncio.wait((model.exited,), timeout=5)

        after_attach(rig, kill_new)
        await rig.serve(parts)
        await rig.frames()
        assert rig.line.tally.crashes == 1

    run(body, clip)


def test_a_release_that_does_not_come_up_does_not_end_the_revival_of_the_one_before(
    clip: Path, parts: Candidate, newer: Candidate
) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        rig.line._backoff_s = 5.0  # the revival is still to come when the new release is tried
        os.kill(rig.pid, signal.SIGKILL)
        await rig.until(lambda: "worker_exit" in rig.events)
        with pytest.raises(AgentError):
            await rig.line.serve(newer, Verdict(newer.component.name, "onnx:cpu"))
        rig.line._backoff_s = 0.1
        await rig.frames(timeout_s=20)
        assert rig.line.serving is not None
        assert rig.line.serving.candidate is parts

    run(body, clip)


@pytest.mark.parametrize("moment", ["before the source was asked", "while it answers", "while the old one finishes"])
def test_a_swap_cancelled_at_the_switch_leaves_one_worker_and_no_gap_in_the_count(
    clip: Path, parts: Candidate, newer: Candidate, moment: str
) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        switch, reached = rig.source.switch, asyncio.Event()

        async def slow_switch(line: str, reader: int) -> int:
            if moment == "before the source was asked":
                reached.set()
            first = await switch(line, reader)
            reached.set()
            if moment == "while it answers":
                await asyncio.sleep(0.3)
            return first

        rig.source.switch = slow_switch  # type: ignore[method-assign]
        swap = asyncio.create_task(rig.serve(newer))
        await reached.wait()
        if moment == "while the old one finishes":
            await asyncio.sleep(0)
        swap.cancel()
        await asyncio.gather(swap, return_exceptions=True)
        rig.source.switch = switch  # type: ignore[method-assign]
        await rig.serve(parts)
        await rig.frames()
        await rig.one_model()

    run(body, clip).account()


def test_a_swap_cancelled_at_any_moment_keeps_the_line_serving(clip: Path, parts: Candidate, newer: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        for delay_s in (0.0, 0.005, 0.05, 0.2, 0.35, 0.5):
            swap = asyncio.create_task(rig.serve(newer))
            await asyncio.sleep(delay_s)
            swap.cancel()
            await asyncio.gather(swap, return_exceptions=True)
            await rig.frames(3)
        await rig.one_model()

    run(body, clip).account()


def test_a_source_that_dies_is_opened_again_and_is_no_crash_of_the_model(clip: Path, parts: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        for _ in range(2):
            await rig.frames()
            os.kill(rig.source.pid, signal.SIGKILL)
            await rig.until(lambda: rig.source.state == "reconnecting")
        await rig.frames()
        assert rig.line.tally.crashes == 0
        assert rig.source.restarts == 2
        await rig.one_model()

    run(body, clip)


def test_a_source_that_dies_during_a_swap_blames_no_release(clip: Path, parts: Candidate, newer: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()

        async def kill_source(_: Any) -> None:
            os.kill(rig.source.pid, signal.SIGKILL)
            await rig.until(lambda: rig.source.state == "reconnecting")

        after_attach(rig, kill_source)
        with pytest.raises(AgentError) as caught:
            await rig.serve(newer)
        assert caught.value.reason is Reason.WORKER_UNAVAILABLE
        await rig.frames()
        assert rig.line.serving is not None
        assert rig.line.serving.candidate is parts
        await rig.one_model()

    run(body, clip)


def test_a_reader_that_the_source_gave_up_is_started_again(clip: Path, parts: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        assert rig.line.serving is not None
        rig.source.detach(rig.line.serving.reader, "stopped")
        await rig.until(lambda: "worker_restarted" in rig.events)
        await rig.frames()
        assert rig.line.tally.crashes == 0

    run(body, clip)


def test_a_worker_that_stands_still_is_killed_and_replaced(
    clip: Path, parts: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "WATCH_INTERVAL_S", 0.3)

    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        stuck = rig.pid
        os.kill(stuck, signal.SIGSTOP)
        await rig.until(lambda: "worker_restarted" in rig.events)
        await rig.frames()
        assert rig.pid != stuck
        assert rig.line.tally.crashes == 1

    run(body, clip, replace(LIMITS, run_timeout_s=0.5)).account()


def test_a_line_whose_source_comes_late_serves_when_it_is_there(clip: Path, parts: Candidate, tmp_path: Path) -> None:
    late = tmp_path / "late.avi"

    async def body(rig: Rig) -> None:
        verdict = Verdict(parts.component.name, "litert:xnnpack")
        with pytest.raises(AgentError) as caught:
            await rig.line.serve(parts, verdict)
        assert caught.value.reason is Reason.WORKER_UNAVAILABLE
        rig.line.keep_trying(parts, verdict)
        shutil.copy(clip, late)
        await rig.frames()

    run(body, late, replace(LIMITS, load_timeout_s=5))


def test_a_swap_cancelled_before_its_turn_leaves_the_revival_of_the_one_before(
    clip: Path, parts: Candidate, newer: Candidate
) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        async with rig.line._lock:
            os.kill(rig.pid, signal.SIGKILL)
            await rig.until(lambda: "worker_exit" in rig.events)
            swap = asyncio.create_task(rig.serve(newer))
            await asyncio.sleep(0)
            swap.cancel()
            await asyncio.gather(swap, return_exceptions=True)
        await rig.until(lambda: "worker_restarted" in rig.events)
        await rig.frames()

    run(body, clip).account()


def test_the_end_of_a_worker_that_is_to_be_replaced_does_not_bring_it_back(
    clip: Path, parts: Candidate, newer: Candidate
) -> None:
    """A release that was found unfit serves on until the one before it comes up; it may die meanwhile."""

    async def body(rig: Rig) -> None:
        await rig.serve(newer)
        await rig.frames()
        rig.line.keep_trying(parts, Verdict(parts.component.name, "litert:xnnpack"))
        os.kill(rig.pid, signal.SIGKILL)
        await rig.until(lambda: "worker_restarted" in rig.events)
        assert rig.line.serving is not None
        assert rig.line.serving.candidate.version == parts.version
        await rig.frames()

    run(body, clip).account()


def test_a_model_that_cannot_come_back_is_tried_ever_more_seldom(
    clip: Path, parts: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "STABLE_S", 0.3)
    tries = []

    async def body(rig: Rig) -> None:
        async def rotten(_: Any) -> int:
            tries.append(1)
            raise OtaError(OtaReason.PAYLOAD_CORRUPT, "the stored model does not open")

        works = parts.opener
        candidate = replace(parts, opener=lambda component: works(component))
        await rig.serve(candidate)
        await rig.frames()
        await asyncio.sleep(0.4)
        object.__setattr__(candidate, "opener", rotten)
        os.kill(rig.pid, signal.SIGKILL)
        await asyncio.sleep(3.0)

    run(body, clip)
    assert 2 <= len(tries) <= 6


def test_a_source_that_keeps_dying_is_opened_ever_more_seldom(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(rig: Rig) -> None:
        async with asyncio.timeout(60):
            while rig.source.restarts < 4:
                await rig.until(lambda: rig.source.pid > 0 and rig.source.opened is not None)
                os.kill(rig.source.pid, signal.SIGKILL)
                before = rig.source.restarts
                await rig.until(lambda seen=before: rig.source.restarts > seen)  # type: ignore[misc]
        started = asyncio.get_running_loop().time()
        await rig.until(lambda: rig.source._ready.is_set())
        assert asyncio.get_running_loop().time() - started > 0.6, "0.1 s doubled three times, less a quarter at most"

    monkeypatch.setattr(sources, "STABLE_S", 60.0, raising=False)
    run(body, clip)
