"""What a line runs on: falls and policies, busy and taken hardware, stale verdicts, slow compilers, objectives.

Hardware is imitated by the fakes of `tests/fakes`, in real workers.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import profile
from agent.config import Config, LineConfig, TelemetryConfig
from agent.daemon.hosting import ModelHost
from agent.daemon.selection import Verdict
from agent.daemon.trials import TRIAL_NICE
from agent.daemon.verdicts import NAME
from ota.client.ports import Candidate
from ota.errors import OtaError, Reason, Rejected
from ota.release import Budgets
from tests.agent.daemon.rig import LIMITS, Rig
from tests.agent.daemon.rig import run as run_rig
from tests.agent.daemon.test_detector import FAKES_HOST, offering
from tests.fakes.delegates import owner_file

XNNPACK = "litert:xnnpack"
QUICK = replace(LIMITS, probation_s=0.5, probation_results=5, load_timeout_s=8, compile_timeout_s=25, run_timeout_s=6)


class Board:
    """A board with made-up hardware: a model host beside a rig, and what it told."""

    def __init__(
        self, rig: Rig, state_dir: Path, ladder: tuple[str, ...], line: LineConfig, exclusive: tuple[str, ...]
    ):
        self.rig = rig
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.written: dict[str, bytes] = {}
        rig.line.config = line
        config = Config(
            state_dir / "agent.toml", state_dir, state_dir, "auto", "process", (), (line,), TelemetryConfig("all", 1),
            QUICK,
        )  # fmt: skip
        self.profile = replace(
            profile.recognise("generic-x86_64", profile.load_all()), delegates=ladder, exclusive=exclusive
        )
        self.lines: dict[str, Any] = {"parts": rig.line}
        self.host = ModelHost(
            config, self.profile, rig.supervisor, self.lines, write=self._write, on_verdicts=lambda *_: None,
            on_event=lambda kind, facts: self.events.append((kind, facts)),
        )  # fmt: skip
        self._state_dir = state_dir

    def _write(self, name: str, data: bytes) -> None:
        self.written[name] = data
        (self._state_dir / name).write_bytes(data)

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [facts for name, facts in self.events if name == kind]

    @property
    def delegate(self) -> str:
        serving = self.rig.line.serving
        return serving.verdict.requested if serving is not None else ""

    async def update(self, candidate: Candidate) -> None:
        await self.host.activate(candidate, await self.host.self_test(candidate))


def run(
    body: Callable[[Board], Awaitable[None]],
    clip: Path,
    state_dir: Path,
    ladder: tuple[str, ...],
    *,
    exclusive: tuple[str, ...] = (),
    **line: Any,
) -> Rig:
    """Run `body` on a board whose profile has `ladder`; `line` are keys of its [[line]]."""

    async def on_board(rig: Rig) -> None:
        config = LineConfig("parts", "belt", 1, "never", line.pop("delegates", ()), **line)
        board = Board(rig, state_dir, ladder, config, exclusive)
        try:
            await body(board)
        finally:
            await board.host.close()

    return run_rig(on_board, clip, QUICK, host_command=FAKES_HOST)


def tflite_only(candidate: Candidate) -> Candidate:
    """`candidate` of a release without any other component."""
    return replace(candidate, release=replace(candidate.release, components=(candidate.component,)), alternatives=())


# -- falls ------------------------------------------------------------------------------------------------------------


def test_falling_to_the_processor_is_an_event_with_the_reason(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    ladder = ("firmware:npu", XNNPACK)

    async def body(board: Board) -> None:
        await board.update(offering(parts, ladder))
        assert board.delegate == XNNPACK
        (fell,) = board.told("delegate_fell")
        assert (fell["wanted"], fell["reason"], fell["using"]) == ("firmware:npu", "delegate_broken", XNNPACK)
        assert [f["reason"] for f in board.host.selection("parts")["fell"]] == ["delegate_broken"]

    run(body, clip, tmp_path, ladder)


def test_falling_to_the_processor_is_an_error_where_the_policy_forbids_it(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    """A driver's fault is the board's: the release is not quarantined for it, a wrong answer is the release's."""

    async def body(board: Board) -> None:
        with pytest.raises(OtaError) as caught:
            await board.update(offering(parts, ("firmware:npu", XNNPACK)))
        assert caught.value.reason is Reason.NO_DELEGATE
        assert caught.value.retry
        assert not isinstance(caught.value, Rejected)
        assert "firmware 3.1" in caught.value.message
        assert board.delegate == ""
        with pytest.raises(Rejected) as refused:
            await board.update(offering(parts, (XNNPACK,)))
        assert refused.value.reason is Reason.NO_DELEGATE

    run(body, clip, tmp_path, ("firmware:npu", XNNPACK), fallback="error")


def test_a_release_for_hardware_alone_whose_driver_is_broken_is_refused_until_it_is_mended(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    ladder = ("firmware:npu", "absent:npu")

    async def body(board: Board) -> None:
        with pytest.raises(Rejected) as caught:
            await board.host.self_test(offering(parts, ladder))
        assert caught.value.reason is Reason.NO_DELEGATE
        assert caught.value.retry
        assert "quarantined" not in caught.value.hint
        with pytest.raises(Rejected) as wrong:
            await board.host.self_test(offering(parts, ("firmware:npu", "wrong:npu")))
        assert wrong.value.reason is Reason.GOLDEN_MISMATCH
        assert not wrong.value.retry

    run(body, clip, tmp_path, (*ladder, "wrong:npu"))


def test_a_line_whose_own_list_begins_with_a_rung_that_fails_falls_too(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    async def body(board: Board) -> None:
        await board.update(tflite_only(parts))
        assert board.delegate == XNNPACK
        assert [f["reason"] for f in board.told("delegate_fell")] == ["no_delegate"]

    run(body, clip, tmp_path, (XNNPACK,), delegates=("onnx:cpu", XNNPACK))


def test_hardware_that_passes_and_is_slower_than_the_processor_is_no_fall(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    ladder = ("sleeps:npu", XNNPACK)

    async def body(board: Board) -> None:
        await board.update(offering(parts, ladder))
        assert board.delegate == XNNPACK
        assert not board.told("delegate_fell")

    run(body, clip, tmp_path, ladder, fallback="error")


# -- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "wanted"), [("power", "sleeps:npu"), ("latency", XNNPACK)])
def test_the_objective_of_the_line_decides_between_those_that_passed(
    clip: Path, tmp_path: Path, parts: Candidate, objective: str, wanted: str
) -> None:
    """This hardware takes two milliseconds and next to no CPU time; the processor is faster."""
    ladder = ("sleeps:npu", XNNPACK)

    async def body(board: Board) -> None:
        await board.update(offering(parts, ladder))
        assert board.delegate == wanted
        assert board.host.selection("parts")["proxy"] == ("cpu_ms" if objective == "power" else "")

    run(body, clip, tmp_path, ladder, objective=objective)


@pytest.mark.fault("F73")
def test_a_release_over_its_budget_is_never_chosen_whatever_the_objective(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    """By power alone the slow hardware would win; the publisher promised better."""
    ladder = ("slow:npu", XNNPACK)

    async def body(board: Board) -> None:
        await board.update(offering(parts, ladder))
        assert board.delegate == XNNPACK
        slow = next(v for v in board.host.verdicts("parts") if v.requested == "slow:npu")
        assert slow.reason == "over_budget"

    run(body, clip, tmp_path, ladder, objective="power")


@pytest.mark.fault("F73")
def test_a_release_slower_than_promised_on_every_rung_is_rejected_and_the_old_one_serves_on(
    clip: Path, tmp_path: Path, parts: Candidate, newer: Candidate
) -> None:
    ladder = ("slow:npu",)

    async def body(board: Board) -> None:
        fast = offering(parts, ladder)
        await board.rig.serve(replace(fast, release=replace(fast.release, budgets=Budgets(None, None))))
        await board.rig.frames()
        with pytest.raises(Rejected) as caught:
            await board.host.self_test(offering(newer, ladder))
        assert caught.value.reason is Reason.OVER_BUDGET
        assert board.rig.line.serving is not None
        assert board.rig.line.serving.candidate.version == "1.0.0"
        await board.rig.frames()

    run(body, clip, tmp_path, ladder)


@pytest.mark.fault("F69")
def test_a_model_that_takes_all_memory_is_rejected_by_name(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    async def body(board: Board) -> None:
        with pytest.raises(Rejected) as caught:
            await board.host.self_test(offering(parts, ("hoards:npu",)))
        assert caught.value.reason is Reason.WORKER_OUT_OF_MEMORY

    run(body, clip, tmp_path, ("hoards:npu",))


# -- busy and taken ---------------------------------------------------------------------------------------------------


def test_hardware_that_something_else_has_open_is_waited_for_and_the_processor_is_not_chosen(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    ladder = ("elsewhere:npu", XNNPACK)

    async def body(board: Board) -> None:
        with pytest.raises(OtaError) as caught:
            await board.host.self_test(offering(parts, ladder))
        assert caught.value.reason is Reason.BUSY
        assert caught.value.retry
        assert not isinstance(caught.value, Rejected)
        with pytest.raises(OtaError):
            await board.host.resume(offering(parts, ladder))
        assert board.delegate == ""

    run(body, clip, tmp_path, ladder)


def test_a_trial_waits_for_exclusive_hardware_although_the_processor_passed(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    """By CPU time the hardware is the better one; it is in another trial's hands for a while."""
    ladder = (XNNPACK, "sleeps:npu")

    async def body(board: Board) -> None:
        async with board.host._contest.lending:
            update = asyncio.create_task(board.update(offering(parts, ladder)))
            done, _ = await asyncio.wait((update,), timeout=3)
            assert not done
            assert board.delegate == ""
        await update
        assert board.delegate == "sleeps:npu"

    run(body, clip, tmp_path, ladder, exclusive=("sleeps:npu",), objective="power")


class Neighbour:
    """Another line that serves on a delegate."""

    serving = None

    def __init__(self, delegate: str) -> None:
        self.delegate = delegate

    def holds(self, delegate: str) -> bool:
        return delegate == self.delegate


@pytest.mark.parametrize("fallback", ["allow", "error"])
def test_hardware_that_another_line_serves_on_is_a_fall_by_policy(
    clip: Path, tmp_path: Path, parts: Candidate, fallback: str
) -> None:
    ladder = ("sleeps:npu", XNNPACK)

    async def body(board: Board) -> None:
        board.lines["other"] = Neighbour("sleeps:npu")
        if fallback == "allow":
            await board.update(offering(parts, ladder))
            assert [f["reason"] for f in board.told("delegate_fell")] == ["delegate_taken"]
            return
        with pytest.raises(OtaError) as caught:
            await board.update(offering(parts, ladder))
        assert caught.value.reason is Reason.BUSY
        assert board.delegate == ""

    run(body, clip, tmp_path, ladder, exclusive=("sleeps:npu",), fallback=fallback)


def test_hardware_that_ends_its_first_owner_is_found_out_once_and_is_exclusive_from_then_on(
    clip: Path, tmp_path: Path, parts: Candidate, newer: Candidate
) -> None:
    """The profile does not say so. The line loses its worker once; the trial then has the hardware for itself."""
    ladder = ("stick:npu",)

    async def body(board: Board) -> None:
        await board.update(offering(parts, ladder))
        await board.rig.frames()
        assert board.rig.supervisor.host is not None
        owner = Path(owner_file(board.rig.supervisor.host.pid))
        try:
            tested = await board.host.self_test(offering(newer, ladder))
            assert tested.delegate == "stick:npu"
            (learnt,) = board.told("delegate_exclusive")
            assert learnt["delegate"] == "stick:npu"
            await board.host.activate(offering(newer, ladder), tested)
            await board.rig.frames()
            exits = board.rig.events.count("worker_exit")
            await board.host.self_test(offering(parts, ladder))
            await board.rig.frames()
            assert board.rig.events.count("worker_exit") == exits
            assert board.host.owners() == {"stick:npu": "parts"}
        finally:
            with suppress(FileNotFoundError):
                os.unlink(owner)

    run(body, clip, tmp_path, ladder)


# -- compiling --------------------------------------------------------------------------------------------------------


def test_hardware_that_compiles_for_long_is_served_for_by_another_rung_and_takes_over_when_it_is_ready(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    ladder = ("compiles:npu", XNNPACK)

    async def body(board: Board) -> None:
        await board.update(offering(parts, ladder))
        assert board.delegate == XNNPACK
        assert [f["delegate"] for f in board.told("delegate_compiling")] == ["compiles:npu"]
        assert [f["reason"] for f in board.told("delegate_fell")] == ["delegate_compiling"]
        (trying,) = board.host.selection("parts")["trying"]
        assert (trying["delegate"], trying["step"]) == ("compiles:npu", "compiling")
        await board.rig.frames()
        await board.rig.until(lambda: board.delegate == "compiles:npu")
        assert [f["reason"] for f in board.told("delegate_compiled")] == [""]
        assert not board.host.selection("parts")["fell"]
        await board.rig.frames()

    rig = run(body, clip, tmp_path, ladder, objective="power")
    rig.account()


def test_a_compiler_is_waited_for_where_all_else_is_over_the_budget_of_the_release(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    ladder = ("compiles:npu", "slow:npu")

    async def body(board: Board) -> None:
        tested = await board.host.self_test(offering(parts, ladder))
        assert tested.delegate == "compiles:npu"
        assert not board.told("delegate_compiling")
        assert {v.requested: v.reason for v in board.host.verdicts("parts")}["slow:npu"] == "over_budget"

    run(body, clip, tmp_path, ladder)


def test_where_falling_is_forbidden_a_compiler_is_waited_for(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    async def body(board: Board) -> None:
        await board.update(offering(parts, ("compiles:npu", XNNPACK)))
        assert board.delegate == "compiles:npu"
        assert not board.told("delegate_fell")

    run(body, clip, tmp_path, ("compiles:npu", XNNPACK), fallback="error", objective="power")


# -- stale verdicts ---------------------------------------------------------------------------------------------------


def age(tmp_path: Path, **changes: Any) -> None:
    """Change what every kept verdict says it holds for."""
    file = tmp_path / NAME
    kept = {line: [{**v, **changes} for v in verdicts] for line, verdicts in json.loads(file.read_bytes()).items()}
    file.write_text(json.dumps(kept))


@pytest.mark.parametrize("changes", [{"runtime": "litert 1.0"}, {"driver": "npu 6.1"}])
def test_a_verdict_of_another_runtime_or_driver_serves_at_once_and_is_made_anew_beside_it(
    clip: Path, tmp_path: Path, parts: Candidate, changes: dict[str, str]
) -> None:
    async def first(board: Board) -> None:
        await board.host.self_test(parts)

    async def second(board: Board) -> None:
        await board.host.resume(parts)
        assert board.delegate == XNNPACK
        (stale,) = board.told("verdict_stale")
        assert next(iter(changes.values())) in stale["message"]
        assert board.host.selection("parts")["stale"]
        await board.rig.until(lambda: not board.host.selection("parts")["stale"])
        renewed = board.host.verdicts("parts")[0]
        assert (renewed.runtime, renewed.driver) != (changes.get("runtime"), changes.get("driver"))
        await board.rig.frames()

    run(first, clip, tmp_path, (XNNPACK,))
    age(tmp_path, **changes)
    run(second, clip, tmp_path, (XNNPACK,)).account()


@pytest.mark.parametrize("changes", [{"profile": "another-board"}, {"threads": 4}])
def test_a_verdict_of_another_board_or_thread_count_is_not_served_on(
    clip: Path, tmp_path: Path, parts: Candidate, changes: dict[str, Any]
) -> None:
    async def first(board: Board) -> None:
        await board.host.self_test(parts)

    async def second(board: Board) -> None:
        await board.host.resume(parts)
        newest = board.host.verdicts("parts")[0]
        assert (newest.profile, newest.threads) == (board.profile.name, 1)

    run(first, clip, tmp_path, (XNNPACK,))
    age(tmp_path, **changes)
    run(second, clip, tmp_path, (XNNPACK,))


def test_a_rung_that_failed_for_the_boards_own_trouble_is_tried_again_after_a_start(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    """Its library came meanwhile."""
    ladder = ("sleeps:npu", XNNPACK)
    offered = offering(parts, ladder)
    model = parts.component.plain_sha256

    async def body(board: Board) -> None:
        known = {"model": model, "profile": board.profile.name}
        board.host._kept.keep("parts", [
            Verdict(parts.component.name, "sleeps:npu", reason="runtime_missing", message="no library", **known),
            Verdict(parts.component.name, XNNPACK, actual=XNNPACK, min_ms=1, cpu_ms=1, **known),
        ])  # fmt: skip
        await board.host.resume(offered)
        assert [f["reason"] for f in board.told("delegate_fell")] == ["runtime_missing"]
        await board.rig.until(lambda: board.delegate == "sleeps:npu")

    run(body, clip, tmp_path, ladder, objective="power")


# -- beside what serves -----------------------------------------------------------------------------------------------


def test_trials_are_niced_and_cost_the_serving_worker_no_frame_and_no_life(
    clip: Path, tmp_path: Path, parts: Candidate, newer: Candidate
) -> None:
    seen: dict[int, int] = {}

    async def watch(rig: Rig) -> None:
        while True:
            for pid in rig.workers("trial"):
                with suppress(OSError):
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    seen[pid] = int(fields[16])  # nice, field 19 of proc(5)
            await asyncio.sleep(0.1)

    async def body(board: Board) -> None:
        await board.rig.serve(parts)
        await board.rig.frames()
        pid, before = board.rig.pid, len(board.rig.results)
        watching = asyncio.create_task(watch(board.rig))
        await board.host.self_test(newer)
        watching.cancel()
        assert seen
        assert min(seen.values()) >= os.nice(0) + TRIAL_NICE
        assert len(board.rig.results) > before
        assert board.rig.pid == pid
        assert "worker_exit" not in board.rig.events

    run(body, clip, tmp_path, (XNNPACK, "onnx:cpu")).account()
