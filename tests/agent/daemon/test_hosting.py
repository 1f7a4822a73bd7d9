"""The updater's host over real workers: whose fault a failure is, and which delegate an older release comes back on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import profile
from agent.config import Config, LineConfig, TelemetryConfig
from agent.daemon import report
from agent.daemon.hosting import ModelHost
from agent.daemon.lines import LineRuntime
from agent.daemon.selection import Verdict
from agent.daemon.updates import LastWords
from agent.daemon.verdicts import NAME as VERDICTS_NAME
from ota.client.journal import Record
from ota.client.ports import Candidate
from ota.errors import OtaError, Reason, Rejected, StoreError
from tests.agent.daemon.rig import LIMITS, Rig
from tests.agent.daemon.rig import run as run_rig

XNNPACK = "litert:xnnpack"
QUICK = replace(LIMITS, probation_s=0.5, probation_results=5, run_timeout_s=1.0)


class Bench:
    """A model host beside a rig; `written` is what it keeps."""

    def __init__(self, rig: Rig, state_dir: Path, delegates: tuple[str, ...], exclusive: tuple[str, ...] = ()) -> None:
        self.rig = rig
        self.written: dict[str, bytes] = {}
        rig.line.config = LineConfig("parts", "belt", 1, "never", delegates)
        config = Config(
            state_dir / "agent.toml", state_dir, state_dir, "auto", "process", (), (rig.line.config,),
            TelemetryConfig("all", 1), QUICK,
        )  # fmt: skip
        self.profile = chosen = replace(profile.recognise("auto", profile.load_all()), exclusive=exclusive)
        self.lines: dict[str, Any] = {"parts": rig.line}
        self.host = ModelHost(
            config, chosen, rig.supervisor, self.lines, write=self.written.__setitem__,
            on_verdicts=lambda *_: None,
        )  # fmt: skip

    def second(self) -> LineRuntime:
        """Another line of the same source, called other."""
        line = LineRuntime(
            replace(self.rig.line.config, name="other"), self.rig.source, self.rig.supervisor, QUICK,
            on_result=lambda *_: None, on_event=lambda *_: None,
        )  # fmt: skip
        self.lines["other"] = line
        return line

    def knows(self, candidate: Candidate, *delegates: str) -> None:
        """Keep passing verdicts, the first of them the fastest."""
        model = candidate.component
        found = [
            Verdict(
                model.name, name, actual=name, min_ms=rank + 1.0, model=model.plain_sha256, profile=self.profile.name
            )
            for rank, name in enumerate(delegates)
        ]
        self.host._kept.keep(candidate.line, found)

    @property
    def delegate(self) -> str:
        return self.rig.line.serving.verdict.requested if self.rig.line.serving is not None else ""


def run(
    body: Callable[[Bench], Awaitable[None]],
    clip: Path,
    state_dir: Path,
    delegates: tuple[str, ...] = (XNNPACK,),
    exclusive: tuple[str, ...] = (),
) -> Rig:
    async def with_bench(rig: Rig) -> None:
        await body(Bench(rig, state_dir, delegates, exclusive))

    return run_rig(with_bench, clip, QUICK)


def other_bytes(candidate: Candidate) -> Candidate:
    """A candidate that claims other model bytes under the same component name."""
    component = replace(candidate.component, plain_sha256="e" * 64)
    release = replace(candidate.release, components=(component,), version="2.0.0", sha256="d" * 64)
    opener = candidate.opener

    async def open_it(wanted: Any) -> int:
        return await opener(candidate.component if wanted.plain_sha256 == "e" * 64 else wanted)

    return Candidate(release, component, open_it)


def test_an_update_from_self_test_to_probation(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    async def body(bench: Bench) -> None:
        tested = await bench.host.self_test(parts)
        assert tested.delegate == XNNPACK
        await bench.host.activate(parts, tested)
        watched = await bench.host.probation(parts)
        assert watched.inferences >= 5
        assert not watched.synthetic
        kept = json.loads(bench.written[VERDICTS_NAME])
        assert kept["parts"][0]["model"] == parts.component.plain_sha256

    run(body, clip, tmp_path)


def test_a_host_that_dies_in_the_self_test_is_the_devices_trouble(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    async def body(bench: Bench) -> None:
        async def kill_host(component: Any) -> int:
            assert bench.rig.supervisor.host is not None
            os.kill(bench.rig.supervisor.host.pid, signal.SIGKILL)
            await asyncio.sleep(0.3)
            return await parts.opener(component)

        with pytest.raises(OtaError) as caught:
            await bench.host.self_test(replace(parts, opener=kill_host))
        assert caught.value.reason is Reason.BUSY
        assert caught.value.retry
        assert not isinstance(caught.value, Rejected)

    run(body, clip, tmp_path)


def test_a_source_that_is_away_rejects_no_release(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    async def body(bench: Bench) -> None:
        await bench.rig.source.stop()
        bench.rig.line._limits = replace(QUICK, load_timeout_s=6.0)  # the model must load meanwhile, whatever the load
        with pytest.raises(OtaError) as caught:
            await bench.host.activate(parts, await bench.host.self_test(parts))
        assert caught.value.reason is Reason.BUSY

    run(body, clip, tmp_path)


def test_a_source_that_restarts_in_probation_rejects_no_release(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    async def body(bench: Bench) -> None:
        config = bench.host._config
        # so long that golden vectors never stand in for frames, however slow the machine is
        bench.host._config = replace(config, update=replace(config.update, run_timeout_s=60))
        await bench.host.activate(parts, await bench.host.self_test(parts))
        probation = asyncio.create_task(bench.host.probation(parts))
        for _ in range(2):
            os.kill(bench.rig.source.pid, signal.SIGKILL)
            await bench.rig.until(lambda: bench.rig.source.state == "reconnecting")
            await bench.rig.until(lambda: bench.rig.source.pid > 0 and bench.rig.source._ready.is_set())
        watched = await probation
        assert watched.inferences > 0
        assert not watched.synthetic

    run(body, clip, tmp_path)


def test_a_model_that_keeps_dying_in_probation_is_rejected(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    async def body(bench: Bench) -> None:
        config = bench.host._config
        # so long that no crash comes too late for it
        bench.host._config = replace(config, update=replace(config.update, probation_s=60))
        await bench.host.activate(parts, await bench.host.self_test(parts))
        probation = asyncio.create_task(bench.host.probation(parts))
        for _ in range(2):
            await bench.rig.frames(1)
            os.kill(bench.rig.pid, signal.SIGSEGV)
            before = bench.rig.line.tally.crashes
            await bench.rig.until(lambda seen=before: bench.rig.line.tally.crashes > seen)  # type: ignore[misc]
        with pytest.raises(Rejected) as caught:
            await probation
        assert caught.value.reason is Reason.WORKER_CRASHED

    run(body, clip, tmp_path)


def test_without_frames_the_golden_vectors_stand_in(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    async def body(bench: Bench) -> None:
        await bench.host.activate(parts, await bench.host.self_test(parts))
        os.kill(bench.rig.source.pid, signal.SIGSTOP)  # a dark camera
        bench.rig.line.tally.results = 0
        watched = await bench.host.probation(parts)
        assert watched.synthetic

    run(body, clip, tmp_path)


def test_a_release_comes_back_on_the_delegate_that_its_own_bytes_passed_on(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    """The newer release may run best where the older one does not even load."""
    newer = other_bytes(parts)

    async def body(bench: Bench) -> None:
        bench.knows(parts, XNNPACK)
        bench.knows(newer, "litert:cpu", XNNPACK)
        await bench.host.resume(newer)
        assert bench.delegate == "litert:cpu"
        assert {v.model for v in bench.host.verdicts("parts")} == {newer.component.plain_sha256}
        await bench.host.revert("parts", parts)
        assert bench.delegate == XNNPACK
        assert bench.rig.line.serving is not None
        assert bench.rig.line.serving.candidate is parts

    run(body, clip, tmp_path, (XNNPACK, "litert:cpu"))


def test_a_delegate_taken_off_the_list_is_not_used_after_a_restart(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        bench.knows(parts, "litert:cpu", XNNPACK)
        await bench.host.resume(parts)
        assert bench.delegate == XNNPACK

    run(body, clip, tmp_path, (XNNPACK,))


def test_a_release_that_no_allowed_delegate_runs_is_refused_by_name(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        with pytest.raises(Rejected) as caught:
            await bench.host.resume(replace(parts, alternatives=()))
        assert caught.value.reason is Reason.NO_DELEGATE

    run(body, clip, tmp_path, ("onnx:cpu",))


def test_a_committed_release_that_cannot_be_served_yet_is_tried_until_it_is(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        bench.knows(parts, XNNPACK)
        away = asyncio.Event()
        opener = parts.opener

        async def busy_disk(component: Any) -> int:
            if not away.is_set():
                raise StoreError(Reason.IO_ERROR, "the disk does not answer")
            return await opener(component)

        with pytest.raises(OtaError):
            await bench.host.resume(replace(parts, opener=busy_disk))
        away.set()
        await bench.rig.frames()

    run(body, clip, tmp_path)


def test_verdicts_that_cannot_be_written_cost_a_trial_and_nothing_else(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        def full(_: str, __: bytes) -> None:
            raise StoreError(Reason.NO_SPACE, "the disk is full")

        bench.host._kept.write = full
        assert (await bench.host.self_test(parts)).delegate == XNNPACK

    run(body, clip, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"parts": [{"x": 1}]}', '{"parts": 1}', "\xff",
        '{"parts": [{"component": "a", "requested": "b", "min_ms": "1"}]}',
        '{"parts": [{"component": "a", "requested": "b", "reason": "a_word_of_a_later_version"}]}',
    ],
)  # fmt: skip
def test_a_damaged_verdict_file_only_costs_a_trial(clip: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / VERDICTS_NAME).write_text(text, encoding="latin-1")

    async def main() -> None:
        rig = Rig(clip, QUICK, ["true"], "live")
        assert Bench(rig, tmp_path, (XNNPACK,)).host.verdicts("parts") == []

    asyncio.run(main())


def test_a_transform_without_a_host_does_not_blame_the_payload(clip: Path, tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        payload = os.memfd_create("payload")
        try:
            with pytest.raises(OtaError) as caught:
                await bench.host.transform("zstd", 10, payload, None)
            assert caught.value.reason is Reason.PAYLOAD_CORRUPT
            await bench.rig.supervisor.stop()
            with pytest.raises(OtaError) as caught:
                await asyncio.wait_for(bench.host.transform("zstd", 10, payload, None), 40)
            assert caught.value.reason is Reason.BUSY
        finally:
            os.close(payload)

    run(body, clip, tmp_path)


# -- hardware that one process alone may have open ---------------------------------------------------------------------


class OneAtATime:
    """Looks, whenever a worker is asked for, which others there are that may have the accelerator open."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.others: list[list[int]] = []
        spawn = bench.rig.supervisor.spawn

        async def watched(role: str, **options: int) -> Any:
            if role in ("model", "trial") and bench.rig.supervisor.host is not None:
                self.others.append(bench.rig.workers("model") + bench.rig.workers("trial"))
            return await spawn(role, **options)

        monkeypatch.setattr(bench.rig.supervisor, "spawn", watched)


class OtherLine:
    """A line that owns a delegate."""

    def __init__(self, delegate: str) -> None:
        self.delegate = delegate

    def holds(self, delegate: str) -> bool:
        return delegate == self.delegate


def test_an_exclusive_delegate_is_never_open_twice_in_an_update_and_a_roll_back(
    clip: Path, tmp_path: Path, parts: Candidate, newer: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        watched = OneAtATime(bench, monkeypatch)
        await bench.host.activate(parts, await bench.host.self_test(parts))
        await bench.rig.frames()
        tested = await bench.host.self_test(newer)
        await bench.host.activate(newer, tested)
        await bench.rig.frames()
        assert bench.rig.line.serving is not None
        assert bench.rig.line.serving.candidate is newer
        await bench.host.revert("parts", parts)
        await bench.rig.frames()
        assert bench.rig.line.serving.candidate is parts
        assert len(watched.others) >= 4
        assert not any(watched.others)
        # the gaps of the update and of the way back
        assert bench.rig.events.count("served_again") == 2
        assert bench.host.owners() == {XNNPACK: "parts"}

    run(body, clip, tmp_path, exclusive=(XNNPACK,)).account()


def test_what_had_to_make_room_for_a_trial_that_failed_serves_again(
    clip: Path, tmp_path: Path, parts: Candidate, newer: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        await bench.host.activate(parts, await bench.host.self_test(parts))
        watched = OneAtATime(bench, monkeypatch)

        async def refused(component: Any) -> int:
            assert bench.rig.line.lent
            told = report.conditions(bench.lines, {}, Record(), {"state": "connected"}, LastWords([]))
            assert [condition["reason"] for condition in told] == ["lent"]
            raise StoreError(Reason.IO_ERROR, "the store cannot be read")

        with pytest.raises(StoreError):
            await bench.host.self_test(replace(newer, opener=refused))
        await bench.rig.until(lambda: bench.rig.line.serving is not None, 60)
        assert bench.rig.line.serving is not None
        assert bench.rig.line.serving.candidate is parts
        await bench.rig.frames(timeout_s=60)
        assert not bench.rig.line.lent
        assert not any(watched.others)

    run(body, clip, tmp_path, exclusive=(XNNPACK,))


def test_a_trial_cut_off_while_it_has_the_accelerator_gives_it_back(
    clip: Path, tmp_path: Path, parts: Candidate, newer: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        await bench.host.activate(parts, await bench.host.self_test(parts))
        trial = asyncio.create_task(bench.host.self_test(newer))
        await bench.rig.until(lambda: bench.rig.line.lent, 60)
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        await bench.rig.until(lambda: bench.rig.line.serving is not None, 60)
        await bench.rig.frames(timeout_s=60)

    run(body, clip, tmp_path, exclusive=(XNNPACK,))


def test_a_delegate_that_another_line_owns_is_no_choice_and_no_fault_of_the_release(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        bench.lines["other"] = OtherLine(XNNPACK)
        for asked in (bench.host.choose(parts.release), bench.host.self_test(parts)):
            with pytest.raises(Rejected) as caught:
                await asked
            assert caught.value.reason is Reason.BUSY
            assert "other" in caught.value.message
        assert not bench.host.exclusive(parts)
        bench.rig.line.config = replace(bench.rig.line.config, delegates=(XNNPACK, "litert:cpu"))
        assert (await bench.host.self_test(parts)).delegate == "litert:cpu"
        del bench.lines["other"]
        assert (await bench.host.choose(parts.release)).order

    run(body, clip, tmp_path, exclusive=(XNNPACK,))


def test_a_committed_release_whose_delegate_another_line_took_comes_back_on_one_that_is_left(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        bench.knows(parts, XNNPACK, "litert:cpu")
        bench.lines["other"] = OtherLine(XNNPACK)
        await bench.host.resume(parts)
        assert bench.delegate == "litert:cpu"

    run(body, clip, tmp_path, (XNNPACK, "litert:cpu"), exclusive=(XNNPACK,))


def of_line(candidate: Candidate, line: str) -> Candidate:
    return replace(candidate, release=replace(candidate.release, line=line))


def test_of_two_lines_that_want_the_same_accelerator_at_the_start_one_gets_it_and_no_trial_is_beside_it(
    clip: Path, tmp_path: Path, parts: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        watched, other = OneAtATime(bench, monkeypatch), bench.second()
        both = (bench.host.resume(parts), bench.host.resume(of_line(parts, "other")))
        done, refused = await asyncio.gather(*both, return_exceptions=True)
        try:
            assert done is None
            assert isinstance(refused, Rejected)
            assert refused.reason is Reason.BUSY
            await bench.rig.frames(timeout_s=60)
            assert not any(watched.others)
            assert (bench.rig.line.holds(XNNPACK), other.holds(XNNPACK)) == (True, False)
        finally:
            await other.stop()

    run(body, clip, tmp_path, exclusive=(XNNPACK,))


def test_a_line_that_waited_for_an_accelerator_in_vain_serves_on_what_is_left_and_does_not_open_it_too(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        other = bench.second()
        theirs = of_line(parts, "other")
        bench.knows(parts, XNNPACK, "litert:cpu")
        bench.knows(theirs, XNNPACK, "litert:cpu")
        try:
            async with bench.host._contest.lending:  # as a trial of a third line has it
                both = asyncio.gather(bench.host.resume(parts), bench.host.resume(theirs))
                await asyncio.sleep(0.2)
                assert not bench.rig.workers("model")
            await both
            assert other.serving is not None
            assert (bench.delegate, other.serving.verdict.requested) == (XNNPACK, "litert:cpu")
            assert bench.host.owners() == {XNNPACK: "parts"}
        finally:
            await other.stop()

    run(body, clip, tmp_path, (XNNPACK, "litert:cpu"), exclusive=(XNNPACK,))


def test_a_line_makes_room_only_when_the_start_that_was_called_off_for_it_is_gone(
    clip: Path, tmp_path: Path, parts: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        line = bench.rig.line

        async def never(component: Any) -> int:
            return await asyncio.get_running_loop().create_future()

        line.keep_trying(replace(parts, opener=never), Verdict(parts.component.name, XNNPACK))
        await bench.rig.until(lambda: bool(line._starts._delegates), 60)
        (starting,) = line._starts._delegates
        kill, held = starting.kill, asyncio.Event()

        async def slowly() -> None:
            await asyncio.sleep(0.5)
            held.set()
            kill()

        tasks: list[asyncio.Task[None]] = []
        # a driver takes its time to let go of a process
        monkeypatch.setattr(starting, "kill", lambda: tasks.append(asyncio.create_task(slowly())))
        async with line.lend():
            assert held.is_set()
            assert starting.exited.done()

    run(body, clip, tmp_path, exclusive=(XNNPACK,))


def test_a_worker_on_its_way_out_is_not_left_behind_by_a_change_that_is_cut_off(
    clip: Path, tmp_path: Path, parts: Candidate, newer: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        rig = bench.rig
        await rig.serve(parts)
        await rig.frames(timeout_s=60)
        assert rig.line.serving is not None
        old = rig.line.serving.worker
        os.kill(old.pid, signal.SIGSTOP)
        await rig.serve(newer)
        between = rig.line.serving.worker
        change = asyncio.create_task(
            rig.line.serve(parts, Verdict(parts.component.name, XNNPACK), alone=True)
        )  # fmt: skip
        await rig.until(between.exited.done, 60)
        change.cancel()
        await asyncio.gather(change, return_exceptions=True)
        await rig.until(old.exited.done, 60)

    run(body, clip, tmp_path)


def test_a_line_that_does_not_come_back_after_it_made_room_is_not_told_as_one_that_makes_room(
    clip: Path, tmp_path: Path, parts: Candidate
) -> None:
    async def body(bench: Bench) -> None:
        tries: list[Any] = []

        async def refused(component: Any) -> int:
            tries.append(component)
            if len(tries) > 1:
                raise StoreError(Reason.IO_ERROR, "the store cannot be read")
            return await parts.opener(component)

        await bench.rig.serve(replace(parts, opener=refused))
        async with bench.rig.line.lend():
            assert bench.rig.line.lent
        await bench.rig.until(lambda: len(tries) > 2, 60)
        assert not bench.rig.line.lent

    run(body, clip, tmp_path, exclusive=(XNNPACK,))
