"""A whole device without a broker: a stick, the end of the daemon in between, and tasks that must not die unnoticed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from agent import app, config, service
from agent.daemon import askers, enroll
from agent.daemon.keys import FileKeys
from agent.daemon.updates import UpdateLoop
from agent.errors import AgentError, Reason
from agent.recording import WorkerRecorder
from ota.client.machine import State
from ota.client.ports import Candidate, UpdateEvent
from ota.errors import OtaError
from ota.errors import Reason as OtaReason
from ota.publisher import director, publish, sideload, spec
from ota.publisher import enroll as operator
from ota.publisher.build import build_release
from ota.publisher.create import create
from tests.agent.daemon.conftest import PARTS
from tests.workerpython import configured

CONFIG = """\
state_dir = "state"
run_dir = "run"
workers = "process"
[[source]]
name = "belt"
kind = "video"
path = "{clip}"
policy = "live"
loop = true
[[line]]
name = "parts"
source = "belt"
explore = "never"
[update]
probation_scale = 0.002
"""


@pytest.fixture
def device(tmp_path: Path, clip: Path) -> config.Config:
    """An enrolled device; beside its state lies a stick with parts 1.0.0."""
    (tmp_path / "agent.toml").write_text(configured(CONFIG.format(clip=clip)))
    loaded = config.load(tmp_path / "agent.toml")
    repository = create(tmp_path / "repo")
    build_release(repository, spec.load(PARTS / "1.0.0" / "spec.toml"), recorder=WorkerRecorder())
    publish.publish(repository, [("parts", "1.0.0")])
    own = FileKeys(loaded.state_dir / "keys").create()
    answer = operator.enroll(repository, enroll.request("cam-1", own), host="localhost", port=1)
    enroll.install(answer.bundle, own, loaded.state_dir)
    director.grant(repository, "cam-1", "parts", "1.0.0")
    sideload.write_sideload(repository, "cam-1", tmp_path / "stick")
    return loaded


async def post_sideload(loaded: config.Config, stick: Path) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_unix_connection(str(loaded.control_socket))
    body = json.dumps({"path": str(stick)}).encode()
    writer.write(b"POST /sideload HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    return writer


def test_a_sideload_that_the_end_of_the_daemon_interrupts_is_not_held_against_the_release(
    device: config.Config, tmp_path: Path
) -> None:
    async def interrupted() -> Any:
        daemon = app.Device(device, {}, online=False)
        await daemon.start()
        writer = await post_sideload(device, tmp_path / "stick")
        async with asyncio.timeout(60):
            while daemon._updater.record.line("parts").state is not State.TESTING:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await daemon.stop()
        writer.close()
        return daemon._updater.record.line("parts")

    record = asyncio.run(interrupted())
    assert record.quarantine == {}
    assert record.candidate is not None

    async def again() -> dict[str, Any]:
        daemon = app.Device(device, {}, online=False)
        await daemon.start()
        try:
            await daemon.sideload(tmp_path / "stick", askers.of_user(os.getuid()))
            status: dict[str, Any] = daemon.status()
            return status
        finally:
            await daemon.stop()

    line = asyncio.run(again())["lines"]["parts"]
    assert (line["version"], line["committed"]) == ("1.0.0", "1.0.0")


def test_a_committed_release_that_finds_no_room_for_its_trial_at_the_start_is_served_later(
    device: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.daemon.updates.RETRY_S", (0.05, 0.1))
    refused: list[str] = []

    async def scenario() -> None:
        daemon = app.Device(device, {}, online=False)
        await daemon.start()
        await daemon.sideload(tmp_path / "stick", askers.of_user(os.getuid()))
        await daemon.stop()
        # without its verdict it has to be tried again before it serves
        (device.state_dir / "verdicts.json").unlink()
        daemon = app.Device(device, {}, online=False)
        contest = daemon._host._contest.run

        async def none_at_first(runtime: Any, subject: Any, *rest: Any) -> Any:
            if len(refused) < 2:
                refused.append(subject.line)
                raise AgentError(Reason.WORKER_UNAVAILABLE, "no worker can be had")
            return await contest(runtime, subject, *rest)

        monkeypatch.setattr(daemon._host._contest, "run", none_at_first)
        await daemon.start()
        try:
            assert refused[:1] == ["parts"]
            async with asyncio.timeout(60):
                while daemon.status()["lines"]["parts"]["version"] != "1.0.0":
                    await asyncio.sleep(0.05)
        finally:
            await daemon.stop()

    asyncio.run(scenario())


def test_a_wish_at_the_start_waits_until_the_committed_release_has_been_brought_up(
    device: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first() -> None:
        daemon = app.Device(device, {}, online=False)
        await daemon.start()
        await daemon.sideload(tmp_path / "stick", askers.of_user(os.getuid()))
        await daemon.stop()

    asyncio.run(first())
    # without its verdict it has to be tried before it serves, which takes its time
    (device.state_dir / "verdicts.json").unlink()
    begun: list[str] = []

    async def scenario() -> None:
        daemon = app.Device(device, {}, online=False)
        resume, slow, rolled_back = daemon._host.resume, asyncio.Event(), asyncio.Event()

        async def slowly(candidate: Candidate) -> None:
            begun.append(candidate.version)
            await slow.wait()
            await resume(candidate)

        async def roll_back() -> None:
            with contextlib.suppress(OtaError):
                await daemon._updater.rollback("parts")
            rolled_back.set()

        monkeypatch.setattr(daemon._host, "resume", slowly)
        starting = asyncio.create_task(daemon.start())
        while not begun:
            await asyncio.sleep(0.01)
        person = asyncio.create_task(roll_back())
        await asyncio.sleep(0.1)
        assert not rolled_back.is_set()
        slow.set()
        await asyncio.gather(starting, person)
        await daemon.stop()

    asyncio.run(scenario())
    assert begun == ["1.0.0"]


@pytest.mark.parametrize(("reason", "stays"), [(OtaReason.NO_SPACE, False), (OtaReason.TRANSFER_TIMEOUT, True)])
def test_a_release_that_finds_no_room_gets_that_of_compiled_models(
    device: config.Config, monkeypatch: pytest.MonkeyPatch, reason: OtaReason, stays: bool
) -> None:
    async def failed() -> list[UpdateEvent]:
        return [UpdateEvent("parts", "1.0.0", "idle", "failed", reason)]

    async def scenario() -> None:
        daemon = app.Device(device, {}, online=False)
        kept = device.state_dir / "compiled" / f"{'a' * 64}-0123456789abcdef.cmp"
        kept.parent.mkdir()
        kept.write_bytes(b"sealed")
        monkeypatch.setattr(daemon._updater, "check", failed)
        monkeypatch.setattr(daemon._updater.store, "has", lambda _: True)
        assert await daemon._look()
        assert kept.exists() == stays

    asyncio.run(scenario())


def test_a_daemon_whose_heartbeat_died_ends_with_a_failure(
    device: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: app.Device) -> None:
        raise RuntimeError("an accident")

    monkeypatch.setattr(app.Device, "_tick", broken)
    assert service.run_daemon(device, {}) == 70


def test_an_accident_in_one_look_does_not_end_all_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.daemon.updates.RETRY_S", (0.01, 0.02))
    looks = []

    async def main() -> None:
        async def look() -> bool:
            looks.append(1)
            if len(looks) < 3:
                raise OverflowError("int too large to convert to float")
            return False

        loop = UpdateLoop(look, lambda: True, poll_s=60, rng=random.Random(1))
        loop._retry_s = 0.01
        task = asyncio.create_task(loop.run())
        loop.poke()
        async with asyncio.timeout(60):
            while len(looks) < 3:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
