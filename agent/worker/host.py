"""The host: starts workers when the daemon asks, and tells it how each of them ended.

Runs under the workers' user (its own systemd unit, or a child of the daemon), so that the daemon never forks. It is
not a supervisor: it restarts nothing and decides nothing. Imports no numpy, no OpenCV and no runtime.
Invariants: every `Spawn` is followed by exactly one `Exited`, whatever happens; a worker's descriptor 3 is its socket
and it inherits no other; when the daemon's socket closes, every worker is killed.
"""

from __future__ import annotations

import os
import resource
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import agent
from agent import protocol
from agent.errors import AgentError, Reason

ROLES = ("source", "model", "trial", "transform")
STDERR_TAIL_BYTES = 2048
MAX_LAST_READS = 32
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 5.0
SPAWN_FAILED = 71  # EX_OSERR
_WORKER_FD = 3
# What a vendor's board sets up for its own libraries; everything else is dropped.
_PASSED_ON = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")


@dataclass
class _Child:
    worker: int
    pid: int
    pidfd: int
    stderr: int
    folder: str
    tail: bytes = b""


def run(fd: int, connect: str, entry: Sequence[str]) -> int:
    """Serve the daemon on socket `fd`, or on every connection to the socket at path `connect`.

    Returns 0 when the daemon's socket of `fd` closed; with `connect` it only returns on SIGTERM.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if not connect:
        os.set_inheritable(fd, False)
        with socket.socket(fileno=fd) as sock:
            Host(sock, entry).serve()
        return 0
    wait_s = RETRY_FIRST_S
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            try:
                sock.connect(connect)
            except OSError:
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_MAX_S)
                continue
            wait_s = RETRY_FIRST_S
            Host(sock, entry).serve()
        time.sleep(RETRY_FIRST_S)


class Host:
    """Workers of one connection to the daemon.

    Args:
        sock: connected SEQPACKET socket to the daemon; stays the caller's.
        entry: arguments after the interpreter's name that start a worker.
    """

    def __init__(self, sock: socket.socket, entry: Sequence[str]) -> None:
        self._sock = sock
        self._entry = tuple(entry)
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Answer the daemon until its socket closes; no worker is left behind."""
        self._sock.setblocking(True)
        self._selector.register(self._sock, selectors.EVENT_READ)
        try:
            protocol.send(
                self._sock, protocol.HostReady(os.getpid(), agent.__version__, sys.version.split(maxsplit=1)[0])
            )
            while self._turn():
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass  # the daemon is gone; so will be its workers
        finally:
            for child in list(self._children.values()):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
                self._reap(child)
            self._selector.close()

    def _turn(self) -> bool:
        child: _Child
        for key, _ in self._selector.select():
            if key.fileobj is self._sock:
                if not self._obey():
                    return False
            else:
                child, what = key.data
                if self._children.get(child.worker) is not child:
                    continue  # reaped in this very turn
                if what == "stderr":
                    self._drain(child)
                else:
                    protocol.send(self._sock, self._reap(child))
        return True

    def _obey(self) -> bool:
        try:
            packet = protocol.receive(self._sock)
        except AgentError as e:
            protocol.send(self._sock, protocol.Fault(e.reason.value, e.message, e.hint))
            return True
        if packet is None:
            return False
        try:
            if isinstance(packet.message, protocol.Spawn):
                self._spawn(packet.message, packet.take(1)[0])
            elif isinstance(packet.message, protocol.Kill):
                self._kill(packet.message)
            else:
                raise AgentError(Reason.BAD_MESSAGE, f"a host does not take {type(packet.message).__name__}")
        except AgentError as e:
            protocol.send(self._sock, protocol.Fault(e.reason.value, e.message, e.hint))
        finally:
            packet.close()
        return True

    def _kill(self, message: protocol.Kill) -> None:
        child = self._children.get(message.worker)
        if child is None:
            return  # its `Exited` is on the way
        if message.signal not in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT, signal.SIGABRT):
            raise AgentError(Reason.BAD_MESSAGE, f"signal {message.signal} is not sent to workers")
        signal.pidfd_send_signal(child.pidfd, message.signal)

    def _spawn(self, message: protocol.Spawn, fd: int) -> None:
        try:
            if message.role not in ROLES:
                raise AgentError(Reason.BAD_MESSAGE, f"no worker has the role {message.role[:40]!r}")
            if message.worker in self._children:
                raise AgentError(Reason.BAD_MESSAGE, f"worker {message.worker} is running")
            try:
                child = self._fork(message, fd)
            except OSError as e:
                # Counts as a worker that ended at once: the daemon needs no third case.
                protocol.send(
                    self._sock, protocol.Exited(message.worker, SPAWN_FAILED, f"cannot start a worker: {e}", 0, 0.0)
                )
                return
        finally:
            os.close(fd)
        self._children[message.worker] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, (child, "end"))
        self._selector.register(child.stderr, selectors.EVENT_READ, (child, "stderr"))
        protocol.send(self._sock, protocol.Started(message.worker, child.pid))

    def _fork(self, message: protocol.Spawn, fd: int) -> _Child:
        folder = tempfile.mkdtemp(prefix="edge-worker-")
        stderr, stderr_end = os.pipe()
        os.set_blocking(stderr, False)
        host = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            os.close(stderr)
            os.close(stderr_end)
            os.rmdir(folder)
            raise
        if pid == 0:
            try:
                arguments = [message.role, "--fd", str(_WORKER_FD), "--parent", str(host)]
                _become_worker(message, fd, stderr_end, folder, [*self._entry, *arguments])
            except BaseException as e:  # noqa: BLE001 - a forked child must not return into the host's loop
                os.write(2, f"cannot start the worker: {e}\n".encode())
            finally:
                os._exit(SPAWN_FAILED)
        os.close(stderr_end)
        return _Child(message.worker, pid, os.pidfd_open(pid), stderr, folder)

    def _drain(self, child: _Child) -> bool:
        """Read what the worker wrote to stderr and keep the end of it; False when there is no more."""
        try:
            data = os.read(child.stderr, 65536)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(child.stderr)
        child.tail = (child.tail + data)[-STDERR_TAIL_BYTES:]
        return bool(data)

    def _reap(self, child: _Child) -> protocol.Exited:
        """Collect an ended worker (or wait for a killed one) and forget it."""
        _, raw, usage = os.wait4(child.pid, 0)
        for _ in range(MAX_LAST_READS):  # a process that the worker left behind may write for ever
            if child.stderr not in self._selector.get_map() or not self._drain(child):
                break
        del self._children[child.worker]
        for fd in (child.pidfd, child.stderr):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
            os.close(fd)
        shutil.rmtree(child.folder, ignore_errors=True)
        return protocol.Exited(
            child.worker,
            os.waitstatus_to_exitcode(raw),
            child.tail.decode("utf-8", "replace"),
            usage.ru_maxrss * 1024,
            round(usage.ru_utime + usage.ru_stime, 6),
        )


def _become_worker(message: protocol.Spawn, fd: int, stderr: int, folder: str, arguments: list[str]) -> None:
    """In the forked child: set limits and execute the worker. Returns only by raising."""
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDWR)
    # Move the socket out of the way first: it may itself be one of the numbers written below.
    sock = os.dup(fd)
    while sock <= _WORKER_FD:
        sock = os.dup(sock)
    os.dup2(stderr, 2)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(sock, _WORKER_FD)
    os.set_inheritable(_WORKER_FD, True)
    # Everything of ours closes on exec anyway; what the host itself inherited may not.
    os.closerange(_WORKER_FD + 1, os.sysconf("SC_OPEN_MAX"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if message.memory_bytes > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (message.memory_bytes, message.memory_bytes))
    if message.nice > 0:
        os.nice(message.nice)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment.update(
        PATH=os.defpath,
        TMPDIR=folder,
        PYTHONPATH=str(Path(agent.__file__).resolve().parent.parent),
        PYTHONNOUSERSITE="1",
        OPENBLAS_NUM_THREADS="1",
        OMP_NUM_THREADS="1",
        ORT_DISABLE_TELEMETRY="1",
    )
    os.execve(sys.executable, [sys.executable, *arguments], environment)
