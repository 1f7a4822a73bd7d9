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
from agent.daemon.hosting import VERDICTS_NAME, ModelHost
from agent.daemon.selection import Verdict
from ota.client.ports import Candidate
from ota.errors import OtaError, Reason, Rejected, StoreError
from tests.agent.daemon.rig import LIMITS, Rig
from tests.agent.daemon.rig import run as run_rig

XNNPACK = "litert:xnnpack"
QUICK = replace(LIMITS, probation_s=0.5, probation_results=5, run_timeout_s=1.0)


class Bench:
    """A model host beside a rig; `written` is what it keeps."""

    def __init__(self, rig: Rig, state_dir: Path, delegates: tuple[str, ...]) -> None:
        self.rig = rig
        self.written: dict[str, bytes] = {}
        rig.line.config = LineConfig("parts", "belt", 1, "never", delegates)
        config = Config(
            state_dir / "agent.toml", state_dir, state_dir, "auto", "process", (), (rig.line.config,),
            TelemetryConfig("all", 1), QUICK,
        )  # fmt: skip
        chosen = profile.recognise("auto", profile.load_all())
        self.host = ModelHost(
            config, chosen, rig.supervisor, {"parts": rig.line}, write=self.written.__setitem__,
            on_verdicts=lambda *_: None,
        )  # fmt: skip

    def knows(self, candidate: Candidate, *delegates: str) -> None:
        """Keep passing verdicts, the first of them the fastest."""
        model = candidate.component
        found = [
            Verdict(model.name, name, actual=name, min_ms=rank + 1.0, model=model.plain_sha256)
            for rank, name in enumerate(delegates)
        ]
        self.host._keep("parts", found)

    @property
    def delegate(self) -> str:
        return self.rig.line.serving.verdict.requested if self.rig.line.serving is not None else ""


def run(
    body: Callable[[Bench], Awaitable[None]], clip: Path, state_dir: Path, delegates: tuple[str, ...] = (XNNPACK,)
) -> None:
    async def with_bench(rig: Rig) -> None:
        await body(Bench(rig, state_dir, delegates))

    run_rig(with_bench, clip, QUICK)


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
        bench.rig.line._limits = replace(QUICK, load_timeout_s=1.0)
        with pytest.raises(OtaError) as caught:
            await bench.host.activate(parts, await bench.host.self_test(parts))
        assert caught.value.reason is Reason.BUSY

    run(body, clip, tmp_path)


def test_a_source_that_restarts_in_probation_rejects_no_release(clip: Path, tmp_path: Path, parts: Candidate) -> None:
    async def body(bench: Bench) -> None:
        await bench.host.activate(parts, await bench.host.self_test(parts))
        probation = asyncio.create_task(bench.host.probation(parts))
        for _ in range(2):
            os.kill(bench.rig.source.pid, signal.SIGKILL)
            await bench.rig.until(lambda: bench.rig.source.state == "reconnecting")
            await bench.rig.until(lambda: bench.rig.source.pid > 0 and bench.rig.source._ready.is_set())
        assert (await probation).inferences >= 0

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

        bench.host._write = full
        assert (await bench.host.self_test(parts)).delegate == XNNPACK

    run(body, clip, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"parts": [{"x": 1}]}', '{"parts": 1}', "\xff"])
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
