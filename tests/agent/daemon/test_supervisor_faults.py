"""The supervisor when the host stands still or does not start, and workers that nobody waits for any more."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from agent import protocol
from agent.daemon import supervisor as supervisors
from agent.daemon.supervisor import Supervisor
from agent.daemon.worker import fault_error, one_line
from agent.errors import AgentError, Reason, WorkerError
from tests.agent.daemon.rig import children, descriptors
from tests.workerpython import host_command


def run(body: Callable[[Supervisor], Awaitable[None]], command: Sequence[str] = ()) -> None:
    async def main() -> None:
        before = descriptors()
        supervisor = Supervisor(listen=None, host_command=command or host_command(), on_lost=lambda: None)
        await supervisor.start()
        try:
            await body(supervisor)
        finally:
            await supervisor.stop()
        assert descriptors() <= before

    asyncio.run(main())


async def no_children(pid: int) -> None:
    async with asyncio.timeout(60):
        while children(pid):
            await asyncio.sleep(0.02)


def test_a_host_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisors, "HOST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(supervisors, "HOST_GRACE_S", 0.5)

    async def body(supervisor: Supervisor) -> None:
        worker = await supervisor.spawn("transform")
        assert supervisor.host is not None
        stuck = supervisor.host.pid
        os.kill(stuck, signal.SIGSTOP)
        with pytest.raises(WorkerError) as caught:
            await supervisor.spawn("transform")
        assert caught.value.reason is Reason.WORKER_UNAVAILABLE
        end = await asyncio.wait_for(asyncio.shield(worker.exited), 1)
        assert end.reason is Reason.WORKER_UNAVAILABLE, "it did not crash by itself"
        monkeypatch.setattr(supervisors, "HOST_TIMEOUT_S", 20.0)
        await supervisor.spawn("transform")
        assert supervisor.host.pid != stuck
        with pytest.raises(ProcessLookupError):
            os.kill(stuck, 0)

    run(body)


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.005])
def test_a_spawn_that_is_cancelled_leaves_no_worker(delay_s: float) -> None:
    async def body(supervisor: Supervisor) -> None:
        await supervisor.spawn("transform")
        assert supervisor.host is not None
        spawn = asyncio.create_task(supervisor.spawn("transform"))
        await asyncio.sleep(delay_s)
        if spawn.done():
            return
        spawn.cancel()
        await asyncio.gather(spawn, return_exceptions=True)
        await asyncio.sleep(0.1)
        async with asyncio.timeout(60):
            while len(children(supervisor.host.pid)) > 1:
                await asyncio.sleep(0.02)

    run(body)


def test_a_host_that_cannot_be_started_again_is_tried_until_it_can(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)

    async def body(supervisor: Supervisor) -> None:
        await supervisor.spawn("transform")
        assert supervisor.host is not None
        python.unlink()
        os.kill(supervisor.host.pid, signal.SIGKILL)
        await asyncio.sleep(0.5)
        python.symlink_to(sys.executable)
        await asyncio.wait_for(supervisor.spawn("transform"), 60)

    run(body, [str(python), "-m", "agent.worker.main", "host"])


def test_a_request_that_is_cancelled_does_not_answer_the_next_one_of_another_kind() -> None:
    async def body(supervisor: Supervisor) -> None:
        worker = await supervisor.spawn("source")
        os.kill(worker.pid, signal.SIGSTOP)
        message = protocol.OpenSource("s", "video", {"path": "/nonexistent.avi"})
        request = asyncio.create_task(worker.request(message, protocol.SourceOpened, timeout_s=20))
        await asyncio.sleep(0.05)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        os.kill(worker.pid, signal.SIGCONT)
        await asyncio.sleep(0.3)
        with pytest.raises(AgentError) as caught:
            await worker.request(message, protocol.SourceOpened, timeout_s=20)
        assert caught.value.reason is Reason.SOURCE_MISSING

    run(body)


def test_stopping_a_worker_may_be_cancelled_and_its_end_is_still_told() -> None:
    async def body(supervisor: Supervisor) -> None:
        worker = await supervisor.spawn("transform")
        os.kill(worker.pid, signal.SIGSTOP)
        stop = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.05)
        worker.kill()
        stop.cancel()
        await asyncio.gather(stop, return_exceptions=True)
        end = await asyncio.wait_for(asyncio.shield(worker.exited), 60)
        assert end.status == -signal.SIGKILL

    run(body)


@pytest.mark.parametrize("reason", ["worker_unavailable", "no such reason", ""])
def test_a_reason_that_a_worker_cannot_know_counts_as_its_crash(reason: str) -> None:
    assert fault_error(protocol.Fault(reason, "m", "h")).reason is Reason.WORKER_CRASHED


def test_a_workers_text_is_one_printable_bounded_line() -> None:
    text = one_line("a\x1b[2J\nb\r\n\u2028c" + " " * 3000 + "d" * 3000)
    assert text.startswith("a [2J b c")
    assert text.isprintable()
    assert len(text) <= 500
