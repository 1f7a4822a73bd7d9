"""The supervisor over the real worker host: asked, answered, hung, crashed, lost."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent import protocol
from agent.daemon.supervisor import Supervisor
from agent.daemon.worker import Exit
from agent.errors import AgentError, Reason, WorkerError
from tests.workerpython import host_command

Body = Callable[[Supervisor], Awaitable[None]]


@asynccontextmanager
async def running(listen: Path | None = None) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(listen=listen, host_command=host_command(), on_lost=lambda: None)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()


def run(body: Body) -> None:
    async def main() -> None:
        async with running() as supervisor:
            await body(supervisor)

    asyncio.run(main())


def test_children_are_called_process_isolation() -> None:
    async def body(supervisor: Supervisor) -> None:
        await supervisor.spawn("transform")
        assert supervisor.isolation == "process"

    run(body)


def test_a_refused_request_raises_the_workers_own_reason_and_leaves_it_alive() -> None:
    async def body(supervisor: Supervisor) -> None:
        worker = await supervisor.spawn("source")
        message = protocol.OpenSource("s", "video", {"path": "/nonexistent.avi", "policy": "live", "loop": False})
        with pytest.raises(AgentError) as caught:
            await worker.request(message, protocol.SourceOpened, timeout_s=20)
        assert caught.value.reason is Reason.SOURCE_MISSING
        assert caught.value.hint
        assert not worker.exited.done()

    run(body)


def test_a_worker_that_does_not_answer_is_killed_and_called_hung() -> None:
    async def body(supervisor: Supervisor) -> None:
        worker = await supervisor.spawn("transform")
        worker_stopped = asyncio.Event()
        worker.on_exit = lambda _: worker_stopped.set()
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(WorkerError) as caught:
            await worker.request(protocol.Transform("raw", 1), protocol.Transformed, timeout_s=0.3)
        assert caught.value.reason is Reason.WORKER_HUNG
        await asyncio.wait_for(worker_stopped.wait(), 60)

    run(body)


def test_a_worker_that_dies_while_it_is_asked_is_a_crash_that_names_the_signal() -> None:
    async def body(supervisor: Supervisor) -> None:
        worker = await supervisor.spawn("transform")
        os.kill(worker.pid, signal.SIGSTOP)
        request = asyncio.create_task(worker.request(protocol.Transform("raw", 1), protocol.Transformed, timeout_s=20))
        await asyncio.sleep(0)
        os.kill(worker.pid, signal.SIGSEGV)
        os.kill(worker.pid, signal.SIGCONT)
        with pytest.raises(AgentError) as caught:
            await request
        assert caught.value.reason is Reason.WORKER_CRASHED
        assert "SIGSEGV" in caught.value.message
        assert (await worker.exited).status == -signal.SIGSEGV

    run(body)


def test_when_the_host_dies_every_worker_is_reported_gone_and_a_new_host_serves() -> None:
    async def body(supervisor: Supervisor) -> None:
        worker = await supervisor.spawn("transform")
        assert supervisor.host is not None
        os.kill(supervisor.host.pid, signal.SIGKILL)
        await asyncio.wait_for(worker.exited, 60)
        again = await asyncio.wait_for(supervisor.spawn("transform"), 60)
        assert again.pid > 0
        assert again.pid != worker.pid

    run(body)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (Exit(-signal.SIGSEGV, "", False), Reason.WORKER_CRASHED),
        (Exit(-signal.SIGKILL, "", False), Reason.WORKER_OUT_OF_MEMORY),
        (Exit(-signal.SIGKILL, "", True), Reason.WORKER_CRASHED),
        (Exit(-signal.SIGABRT, "what(): std::bad_alloc", False), Reason.WORKER_OUT_OF_MEMORY),
        (Exit(1, "MemoryError", False), Reason.WORKER_OUT_OF_MEMORY),
    ],
)
def test_an_exit_is_called_memory_or_crash(end: Exit, reason: Reason) -> None:
    assert end.reason is reason


def test_a_host_in_a_unit_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.daemon.supervisor.HOST_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with running(tmp_path / "worker.sock") as supervisor:
            with pytest.raises(WorkerError) as caught:
                await supervisor.spawn("transform")
            assert caught.value.reason is Reason.WORKER_UNAVAILABLE
            assert "edge-worker.service" in caught.value.message

    asyncio.run(main())


class OutOfDescriptors:
    """A listening socket that can answer from the second time on."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.asked = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    def accept(self) -> tuple[socket.socket, object]:
        self.asked += 1
        if self.asked == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.sock.accept()

    def close(self) -> None:
        self.sock.close()


def test_a_host_that_cannot_be_answered_for_want_of_descriptors_is_answered_a_little_later(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "worker.sock") as supervisor:
            assert supervisor._listener is not None
            asyncio.get_running_loop().remove_reader(supervisor._listener)
            supervisor._listener = short = OutOfDescriptors(supervisor._listener)  # type: ignore[assignment]
            supervisor._listen_on()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as host:
                host.connect(str(tmp_path / "worker.sock"))
                async with asyncio.timeout(60):
                    while supervisor._channel is None:
                        await asyncio.sleep(0.01)
            # asked again after a pause, not as fast as it can
            assert short.asked == 2

    asyncio.run(main())
