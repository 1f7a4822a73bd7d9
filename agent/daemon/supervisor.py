"""Workers as the daemon sees them: asked for, spoken to, watched, killed; never forked from here.

A small host process, in a unit of its own or as a child, starts them; each then has its own socket to the daemon.
Invariants: every request to a worker ends within its time-out with an answer or a typed `WorkerError`; a worker that
hangs is killed; the daemon never waits for a worker that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import protocol
from agent.daemon.channel import Channel
from agent.errors import AgentError, Reason, WorkerError

log = logging.getLogger(__name__)

HOST_TIMEOUT_S = 30.0
EXIT_GRACE_S = 2.0
STOP_GRACE_S = 3.0
BACKOFF_S = (0.1, 30.0)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended. `status` is its exit code or minus the signal; `killed` when the daemon wanted it."""

    status: int
    stderr_tail: str
    killed: bool

    @property
    def reason(self) -> Reason:
        """Memory or crash, as far as the exit tells."""
        ran_out = "bad_alloc" in self.stderr_tail or "MemoryError" in self.stderr_tail
        if ran_out or (self.status == -signal.SIGKILL and not self.killed):
            return Reason.WORKER_OUT_OF_MEMORY
        return Reason.WORKER_CRASHED

    def __str__(self) -> str:
        if self.status < 0:
            with contextlib.suppress(ValueError):
                return f"died with {signal.Signals(-self.status).name}"
        return f"ended with exit code {self.status}"


class Worker:
    """One worker process: a source, a model, a trial or a transform.

    `on_message` gets what the worker says unasked; `on_exit` is called once, after the last message.
    """

    def __init__(self, number: int, role: str, sock: socket.socket, kill: Callable[[int], None]) -> None:
        self.number = number
        self.role = role
        self.pid = 0
        self.on_message: Callable[[protocol.Packet], None] = lambda packet: packet.close()
        self.on_exit: Callable[[Exit], None] = lambda _: None
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._kill = kill
        self._killed = False
        self._lock = asyncio.Lock()
        self._expected: type[Any] | None = None
        self._answer: asyncio.Future[protocol.Packet] | None = None
        self._channel = Channel(sock, self._received, self._closed)

    async def request(self, message: Any, expect: type[Any], *, fds: tuple[int, ...] = (), timeout_s: float) -> Any:
        """Send `message` and return the `Packet` that answers it with an `expect` message.

        Raises:
            WorkerError: `worker_crashed`, `worker_out_of_memory`, or `worker_hung` (killed after `timeout_s`).
            AgentError: whatever fault the worker itself reports.
        """
        async with self._lock:
            self._answer = asyncio.get_running_loop().create_future()
            self._expected = expect
            try:
                self._channel.send(message, fds)
                async with asyncio.timeout(timeout_s):
                    packet = await self._answer
            except TimeoutError as e:
                self.kill()
                raise WorkerError(
                    Reason.WORKER_HUNG,
                    f"the {self.role} worker did not answer {type(message).__name__} in {timeout_s:g} s",
                ) from e
            except WorkerError:
                await self._raise_exit()
                raise
            finally:
                self._answer = self._expected = None
        if isinstance(packet.message, protocol.Fault):
            packet.close()
            raise fault_error(packet.message)
        return packet

    def tell(self, message: Any, *, fds: tuple[int, ...] = ()) -> None:
        """Send a message that is not answered; a worker that cannot take it is killed."""
        try:
            self._channel.send(message, fds)
        except WorkerError as e:
            if e.reason is Reason.WORKER_HUNG:
                self.kill()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End it now."""
        if not self.exited.done():
            self._killed = True
            self._kill(number)

    async def stop(self) -> Exit:
        """Ask it to end, then end it."""
        self.tell(protocol.StopWorker())
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                return await asyncio.shield(self.exited)
        except TimeoutError:
            self.kill()
            return await self.exited

    def has_exited(self, message: protocol.Exited) -> None:
        """The host's word on how it ended; called by the supervisor."""
        if self.exited.done():
            return
        end = Exit(message.status, message.stderr_tail, self._killed)
        self.exited.set_result(end)
        self._fail(WorkerError(end.reason, f"the {self.role} worker {end}"))
        self._channel.close()
        self.on_exit(end)

    async def _raise_exit(self) -> None:
        """Replace "the socket closed" by how the process ended, when the host says so soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_GRACE_S):
                end = await asyncio.shield(self.exited)
            raise WorkerError(end.reason, f"the {self.role} worker {end}", hint=_last_line(end.stderr_tail))

    def _received(self, packet: protocol.Packet) -> None:
        wanted = self._expected is not None and isinstance(packet.message, (self._expected, protocol.Fault))
        if wanted and self._answer is not None and not self._answer.done():
            self._answer.set_result(packet)
        else:
            self.on_message(packet)

    def _closed(self, why: str) -> None:
        self._fail(WorkerError(Reason.WORKER_CRASHED, f"the {self.role} worker's socket: {why}"))
        # a worker without a socket is of no use, however alive
        self._kill(signal.SIGKILL)

    def _fail(self, error: WorkerError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


class Supervisor:
    """Keeps the host of the workers alive and hands out workers.

    Args:
        listen: where the host's unit finds the daemon; None runs the host as a child process.
        host_command: how the child is started; the number of its socket's descriptor is appended.
        on_lost: called when the host went away and took every worker with it.
    """

    def __init__(self, *, listen: Path | None, host_command: Sequence[str], on_lost: Callable[[], None]) -> None:
        self._listen = listen
        self._command = list(host_command)
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        self._workers: dict[int, Worker] = {}
        self._started: dict[int, asyncio.Future[int]] = {}
        self._channel: Channel | None = None
        self._ready = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: socket.socket | None = None
        self._restarts: asyncio.Task[None] | None = None
        self._backoff_s = BACKOFF_S[0]
        self._stopping = False
        self.host: protocol.HostReady | None = None
        self.isolation = "unknown"

    async def start(self) -> None:
        """Start the host, or wait for its unit to come; returns at once, `spawn` waits."""
        if self._listen is None:
            self._launch()
        else:
            self._listener = _listener(self._listen)
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def stop(self) -> None:
        """End every worker and the host."""
        self._stopping = True
        if self._restarts is not None:
            self._restarts.cancel()
        await asyncio.gather(*(worker.stop() for worker in list(self._workers.values())))
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    async def spawn(self, role: str, *, nice: int = 0, memory_bytes: int = 0) -> Worker:
        """A new worker, its process running.

        Raises:
            WorkerError: `worker_unavailable` when the host does not come or cannot start it.
        """
        try:
            async with asyncio.timeout(HOST_TIMEOUT_S):
                await self._ready.wait()
                return await self._spawn(role, nice, memory_bytes)
        except TimeoutError as e:
            where = "edge-worker.service" if self._listen else "the worker host"
            raise WorkerError(
                Reason.WORKER_UNAVAILABLE, f"{where} does not answer", hint="systemctl status edge-worker.service"
            ) from e

    async def _spawn(self, role: str, nice: int, memory_bytes: int) -> Worker:
        number = next(self._numbers)
        ours, theirs = protocol.socket_pair()
        with theirs:
            worker = Worker(number, role, ours, lambda sig: self._tell_host(protocol.Kill(number, sig)))
            self._workers[number] = worker
            started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._started[number] = started
            self._tell_host(protocol.Spawn(number, role, nice, memory_bytes), (theirs.fileno(),))
        done, _ = await asyncio.wait((started, worker.exited), return_when=asyncio.FIRST_COMPLETED)
        self._started.pop(number, None)
        if started not in done:
            raise WorkerError(
                Reason.WORKER_UNAVAILABLE, f"a {role} worker could not be started: {worker.exited.result()}"
            )
        worker.pid = started.result()
        return worker

    def _tell_host(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        if self._channel is not None and self._channel.open:
            with contextlib.suppress(WorkerError):
                self._channel.send(message, fds)

    def _launch(self) -> None:
        ours, theirs = protocol.socket_pair()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=_child_environment(),
            )
        self._channel = Channel(ours, self._host_said, self._host_lost)
        self.isolation = "process"

    def _accept(self) -> None:
        assert self._listener is not None
        sock, _ = self._listener.accept()
        if self._channel is not None and self._channel.open:
            log.warning("a second worker host was refused")
            sock.close()
            return
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        # only another user in the shipped unit may be called isolated: a child of ours could read our keys
        in_unit = uid != os.geteuid() and _unit_of(pid) == "edge-worker.service"
        self.isolation = "unit" if in_unit else "process"
        self._channel = Channel(sock, self._host_said, self._host_lost)

    def _host_said(self, packet: protocol.Packet) -> None:
        message = packet.message
        packet.close()
        if isinstance(message, protocol.HostReady):
            self.host = message
            self._backoff_s = BACKOFF_S[0]
            self._ready.set()
        elif isinstance(message, protocol.Started):
            started = self._started.get(message.worker)
            if started is not None and not started.done():
                started.set_result(message.pid)
        elif isinstance(message, protocol.Exited):
            worker = self._workers.pop(message.worker, None)
            if worker is not None:
                worker.has_exited(message)

    def _host_lost(self, why: str) -> None:
        self._ready.clear()
        for number, worker in list(self._workers.items()):
            worker.has_exited(protocol.Exited(number, -signal.SIGKILL, "", 0, 0.0))
        self._workers.clear()
        if self._stopping:
            return
        log.error("the worker host is gone: %s", why)
        self._on_lost()
        if self._listen is None:
            self._restarts = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        await asyncio.sleep(self._backoff_s)
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_S[1])
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)
        self._launch()


def fault_error(fault: protocol.Fault) -> AgentError:
    """The typed error a worker's `Fault` stands for; a reason nobody knows counts as a crash."""
    try:
        reason = Reason(fault.reason)
    except ValueError:
        reason = Reason.WORKER_CRASHED
    return AgentError(reason, fault.message[:500], hint=fault.hint[:500])


def default_host_command() -> list[str]:
    """The shipped host under this interpreter."""
    return [sys.executable, "-m", "agent.worker.main", "host"]


def _child_environment() -> dict[str, str]:
    keep = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "TMPDIR")
    return {key: os.environ[key] for key in keep if key in os.environ}


def _listener(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    path.chmod(0o660)
    with contextlib.suppress(LookupError, PermissionError, KeyError):
        import grp

        os.chown(path, -1, grp.getgrnam("edge-worker").gr_gid)
    listener.listen(2)
    return listener


def _unit_of(pid: int) -> str:
    """The systemd unit a process belongs to, by its control group."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
    return next((part for line in text.splitlines() for part in line.split("/") if part.endswith(".service")), "")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else ""
