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
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import agent
from agent import protocol
from agent.daemon.channel import Channel
from agent.daemon.worker import Worker, fault_error
from agent.errors import Reason, WorkerError

log = logging.getLogger(__name__)

HOST_TIMEOUT_S = 30.0
HOST_GRACE_S = 3.0
BACKOFF_S = (0.1, 30.0)
ACCEPT_PAUSE_S = 1.0


class Supervisor:
    """Keeps the host of the workers alive and hands out workers.

    Args:
        listen: where the host's unit finds the daemon; None runs the host as a child process.
        host_command: how the child is started; the number of its socket's descriptor is appended.
        on_lost: called when the host went away and took every worker with it.
        unit: the systemd unit in which the host of `listen` runs, as the user and group of that name.
        zygote: whether the host keeps a zygote for the lines' model workers.
    """

    def __init__(
        self,
        *,
        listen: Path | None,
        host_command: Sequence[str],
        on_lost: Callable[[], None],
        zygote: bool = False,
        unit: str = "edge-worker.service",
    ) -> None:
        self._listen = listen
        self._command = list(host_command)
        self._on_lost = on_lost
        self._zygote = zygote
        self._unit = unit
        self._warm: dict[str, str] = {}
        self._told: list[str] = []
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
            self._listener = _listener(self._listen, self._unit.removesuffix(".service"))
            self._listen_on()

    async def stop(self) -> None:
        """End every worker and the host."""
        self._stopping = True
        if self._restarts is not None:
            self._restarts.cancel()
        with contextlib.suppress(TimeoutError):
            # a host that obeys ends them all by then; the others end with it
            async with asyncio.timeout(2 * HOST_GRACE_S):
                await asyncio.gather(*(worker.stop() for worker in list(self._workers.values())))
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            await asyncio.to_thread(_reap, self._process)

    def keep_warm(self, line: str, delegate: str) -> None:
        """`line` serves on `delegate` from now on, on nothing when that is empty: the zygote, where there shall be one,
        has the runtimes of all lines loaded and no others."""
        self._warm[line] = delegate
        self._tell_zygote()

    async def spawn(self, role: str, *, nice: int = 0, memory_bytes: int = 0, forked: bool = False) -> Worker:
        """A new worker, its process running; `forked` from the zygote where there is one.

        Raises:
            WorkerError: `worker_unavailable` when the host does not come or cannot start it.
        """
        try:
            async with asyncio.timeout(HOST_TIMEOUT_S):
                await self._ready.wait()
            return await self._spawn(role, nice, memory_bytes, forked and self._zygote)
        except TimeoutError as e:
            where = self._unit if self._listen else "the worker host"
            raise WorkerError(
                Reason.WORKER_UNAVAILABLE, f"{where} does not answer", hint=f"systemctl status {self._unit}"
            ) from e

    async def _spawn(self, role: str, nice: int, memory_bytes: int, forked: bool) -> Worker:
        channel = self._channel
        if channel is None or not channel.open:
            raise WorkerError(Reason.WORKER_UNAVAILABLE, "the worker host is gone")
        number = next(self._numbers)
        try:
            ours, theirs = protocol.socket_pair()
        except OSError as e:
            raise WorkerError(Reason.WORKER_UNAVAILABLE, f"no socket for a {role} worker: {e.strerror}") from e
        started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        with theirs:
            worker = Worker(number, role, ours, lambda sig: self._tell_host(protocol.Kill(number, sig)))
            self._workers[number] = worker
            self._started[number] = started
            self._tell_host(protocol.Spawn(number, role, nice, memory_bytes, forked), (theirs.fileno(),))
        try:
            async with asyncio.timeout(HOST_TIMEOUT_S):
                done, _ = await asyncio.wait((started, worker.exited), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            # it holds its socket and does nothing: so would it with every other wish, the kill of a worker among them
            if channel is self._channel:
                channel.close()
                self._host_lost("it does not answer")
            raise
        except asyncio.CancelledError:
            worker.kill()  # nobody else knows of it
            raise
        finally:
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

    def _tell_zygote(self) -> None:
        wanted = sorted({delegate for delegate in self._warm.values() if delegate})
        if self._zygote and wanted != self._told:
            self._told = wanted
            self._tell_host(protocol.Zygote(list(wanted)))

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

    def _listen_on(self) -> None:
        if self._listener is not None and not self._stopping:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as e:
            # nobody is there any more, or no descriptor is left: who still waits is called for again a little later
            log.error("the worker host cannot be answered: %s", e.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(ACCEPT_PAUSE_S, self._listen_on)
            return
        if self._channel is not None and self._channel.open:
            log.warning("a second worker host was refused")
            sock.close()
            return
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        # only another user in the shipped unit may be called isolated: a child of ours could read our keys
        in_unit = uid != os.geteuid() and _unit_of(pid) == self._unit
        self.isolation = "unit" if in_unit else "process"
        self._channel = Channel(sock, self._host_said, self._host_lost)

    def _host_said(self, packet: protocol.Packet) -> None:
        message = packet.message
        packet.close()
        if isinstance(message, protocol.HostReady):
            self.host = message
            self._backoff_s = BACKOFF_S[0]
            self._told = []  # a new host has no zygote
            self._tell_zygote()
            self._ready.set()
        elif isinstance(message, protocol.Started):
            started = self._started.get(message.worker)
            if started is not None and not started.done():
                started.set_result(message.pid)
        elif isinstance(message, protocol.Exited):
            worker = self._workers.pop(message.worker, None)
            if worker is not None:
                worker.has_exited(message)
        elif isinstance(message, protocol.Fault):
            fault = fault_error(message)
            log.warning("the worker host: %s", fault.message, extra={"reason": fault.reason.value})

    def _host_lost(self, why: str) -> None:
        self._ready.clear()
        for worker in list(self._workers.values()):
            worker.has_lost_host()
        self._workers.clear()
        if self._stopping:
            return
        log.error("the worker host is gone: %s", why)
        self._on_lost()
        if self._listen is None:
            self._restarts = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        while True:
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(2 * self._backoff_s, BACKOFF_S[1])
            if self._process is not None:
                await asyncio.to_thread(_reap, self._process)
            try:
                self._launch()
            except OSError as e:
                log.error("the worker host does not start: %s: %s", self._command[0], e.strerror)
                continue
            return


def default_host_command(python: Path | None = None) -> list[str]:
    """The shipped host under this interpreter, or under another one (`worker_python`)."""
    if python is None:
        return [sys.executable, "-m", "agent.worker.main", "host"]
    return [str(python), "-I", str(Path(agent.__file__).resolve().parent / "worker" / "start.py"), "host"]


def _child_environment() -> dict[str, str]:
    keep = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "TMPDIR")
    return {key: os.environ[key] for key in keep if key in os.environ}


def _listener(path: Path, group: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    path.chmod(0o660)
    with contextlib.suppress(LookupError, PermissionError, KeyError):
        import grp

        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    listener.listen(2)
    return listener


def _unit_of(pid: int) -> str:
    """The systemd unit a process belongs to, by its control group."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
    return next((part for line in text.splitlines() for part in line.split("/") if part.endswith(".service")), "")


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for a host whose socket is closed; one that cannot end is killed."""
    try:
        process.wait(HOST_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
