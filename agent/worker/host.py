"""The host: starts workers when the daemon asks, and tells it how each of them ended.

Runs under the workers' user (its own systemd unit, or a child of the daemon), so that the daemon never forks. It is
not a supervisor: it restarts nothing and decides nothing, but for the zygote that it may be told to keep. Imports no
numpy, no OpenCV and no runtime.
Invariants: every `Spawn` is followed by exactly one `Exited`, whatever happens; a worker's descriptor 3 is its socket
and it inherits no other; when the daemon's socket closes, every worker is killed.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import agent
from agent import protocol
from agent.errors import AgentError, Reason
from agent.worker import channel, entrance
from agent.worker.nursery import ForkFailed, Nursery, Waiting

ROLES = ("source", "model", "fused", "trial", "transform")
STDERR_TAIL_BYTES = 2048
MAX_LAST_READS = 32
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 5.0
ZYGOTE_RETRY_S = 30.0
SPAWN_FAILED = 71  # EX_OSERR
_ZYGOTE = 0  # its number; the daemon's workers begin with 1

_Way = Callable[[protocol.Spawn, int, int, str], int]
"""Starts a worker with (message, socket, stderr, folder); its process id. Raises `OSError` or `ForkFailed`."""


@dataclass
class _Child:
    worker: int
    pid: int
    pidfd: int
    stderr: int
    folder: str
    tail: bytes = b""


def run(fd: int, connect: str, entry: Sequence[str], delegates: frozenset[str]) -> int:
    """Serve the daemon on socket `fd`, or on every connection to the socket at path `connect`.

    Returns 0 when the daemon's socket of `fd` closed; with `connect` it only returns on SIGTERM.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    channel.adopt_orphans()  # what the zygote forks, and what a killed worker leaves behind
    if not connect:
        os.set_inheritable(fd, False)
        with socket.socket(fileno=fd) as sock:
            Host(sock, entry, delegates).serve()
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
            Host(sock, entry, delegates).serve()
        time.sleep(RETRY_FIRST_S)


class Host:
    """Workers of one connection to the daemon.

    Args:
        sock: connected SEQPACKET socket to the daemon; stays the caller's.
        entry: arguments after the interpreter's name that start a worker.
        delegates: those a zygote may be asked to load.
    """

    def __init__(self, sock: socket.socket, entry: Sequence[str], delegates: frozenset[str]) -> None:
        self._sock = sock
        self._entry = tuple(entry)
        self._delegates = delegates
        self._wanted: tuple[str, ...] = ()
        self._nursery: Nursery | None = None
        self._zygote_lost_at = -ZYGOTE_RETRY_S
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
            if self._nursery is not None:
                for waiting in self._nursery.close():
                    os.close(waiting.fd)
            self._selector.close()

    def _turn(self) -> bool:
        child: _Child
        patience_s = self._nursery.patience_s() if self._nursery is not None else None
        for key, _ in self._selector.select(patience_s):
            if key.fileobj is self._sock:
                if not self._obey():
                    return False
            elif self._nursery is not None and key.fileobj is self._nursery.sock:
                self._hear_zygote(self._nursery)
            elif key.data is not None:
                child, what = key.data
                if self._children.get(child.worker) is not child:
                    continue  # reaped in this very turn
                if what == "stderr":
                    self._drain(child)
                elif child.worker == _ZYGOTE:
                    self._lose_zygote("it ended")
                else:
                    protocol.send(self._sock, self._reap(child))
        if self._nursery is not None and self._nursery.patience_s() == 0.0:
            self._lose_zygote("it takes too long to import")
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
            elif isinstance(packet.message, protocol.Zygote):
                self._keep_zygote(packet.message)
            else:
                raise AgentError(Reason.BAD_MESSAGE, f"a host does not take {type(packet.message).__name__}")
        except AgentError as e:
            protocol.send(self._sock, protocol.Fault(e.reason.value, e.message, e.hint))
        finally:
            packet.close()
        return True

    def _kill(self, message: protocol.Kill) -> None:
        if self._nursery is not None and self._nursery.cancel(message.worker):
            protocol.send(self._sock, protocol.Exited(message.worker, -message.signal, "", 0, 0.0))
            return
        child = self._children.get(message.worker)
        if child is None or message.worker == _ZYGOTE:
            return  # its `Exited` is on the way
        if message.signal not in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT, signal.SIGABRT):
            raise AgentError(Reason.BAD_MESSAGE, f"signal {message.signal} is not sent to workers")
        signal.pidfd_send_signal(child.pidfd, message.signal)

    # --- starting ----------------------------------------------------------------------------------------------------

    def _spawn(self, message: protocol.Spawn, fd: int) -> None:
        waits = self._nursery.waiting if self._nursery is not None else []
        try:
            if message.role not in ROLES:
                raise AgentError(Reason.BAD_MESSAGE, f"no worker has the role {message.role[:40]!r}")
            taken = {*self._children, *(waiting.message.worker for waiting in waits)}
            if message.worker in taken or message.worker <= _ZYGOTE:
                raise AgentError(Reason.BAD_MESSAGE, f"worker {message.worker} is running")
        except AgentError:
            os.close(fd)
            raise
        if not (message.forked and message.role == "model" and self._wanted):
            self._begin(message, fd, self._execute)
            return
        if self._nursery is None and time.monotonic() - self._zygote_lost_at >= ZYGOTE_RETRY_S:
            self._start_zygote([])
        if self._nursery is not None and not self._nursery.ready:
            self._nursery.waiting.append(Waiting(message, fd))
        else:
            self._begin(message, fd, self._fork_from_zygote)

    def _begin(self, message: protocol.Spawn, fd: int, way: _Way) -> None:
        """Start a worker and tell of it; its socket `fd` is closed here."""
        try:
            child = self._make(message, fd, way)
        except (OSError, ForkFailed) as e:
            # Counts as a worker that ended at once: the daemon needs no third case.
            protocol.send(
                self._sock, protocol.Exited(message.worker, SPAWN_FAILED, f"cannot start a worker: {e}", 0, 0.0)
            )
            return
        finally:
            os.close(fd)
        protocol.send(self._sock, protocol.Started(message.worker, child.pid))

    def _make(self, message: protocol.Spawn, fd: int, way: _Way) -> _Child:
        folder = tempfile.mkdtemp(prefix="edge-worker-")
        stderr, stderr_end = os.pipe()
        os.set_blocking(stderr, False)
        try:
            pid = way(message, fd, stderr_end, folder)
            child = _Child(message.worker, pid, os.pidfd_open(pid), stderr, folder)
        except (OSError, ForkFailed):
            os.close(stderr)
            os.rmdir(folder)
            raise
        finally:
            os.close(stderr_end)
        self._children[message.worker] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, (child, "end"))
        self._selector.register(child.stderr, selectors.EVENT_READ, (child, "stderr"))
        return child

    def _execute(self, message: protocol.Spawn, fd: int, stderr: int, folder: str) -> int:
        arguments = [message.role, "--fd", str(entrance.WORKER_FD), "--parent", str(os.getpid())]
        if message.worker == _ZYGOTE:
            arguments += ["--delegates", ",".join(self._wanted)]
        pid = os.fork()
        if pid == 0:
            try:
                os.chdir(folder)
                entrance.settle(message, fd, stderr)
                os.execve(sys.executable, [sys.executable, *self._entry, *arguments], entrance.environment(folder))
            except BaseException as e:  # noqa: BLE001 - a forked child must not return into the host's loop
                os.write(2, f"cannot start the worker: {e}\n".encode())
            finally:
                os._exit(SPAWN_FAILED)
        return pid

    # --- the zygote --------------------------------------------------------------------------------------------------

    def _keep_zygote(self, message: protocol.Zygote) -> None:
        """Have a zygote with exactly the runtimes that are wanted; who waits for the one before waits for this one."""
        wanted = tuple(sorted({str(name) for name in message.delegates}))
        if unknown := [name for name in wanted if name not in self._delegates]:
            raise AgentError(Reason.BAD_MESSAGE, f"no delegate is called {unknown[0][:40]!r}")
        if wanted == self._wanted:
            return
        self._wanted = wanted
        waiting = self._end_zygote()
        if wanted:
            self._start_zygote(waiting)
        else:
            for each in waiting:
                self._begin(each.message, each.fd, self._execute)

    def _start_zygote(self, waiting: list[Waiting]) -> None:
        ours, theirs = protocol.socket_pair()
        nursery = Nursery(ours, waiting)
        self._selector.register(ours, selectors.EVENT_READ, None)
        self._nursery = nursery
        try:
            with theirs:
                self._make(protocol.Spawn(_ZYGOTE, "zygote", 0, 0), theirs.fileno(), self._execute)
        except OSError as e:
            self._lose_zygote(str(e))

    def _fork_from_zygote(self, message: protocol.Spawn, fd: int, stderr: int, folder: str) -> int:
        why = "it was lost a moment ago"
        if self._nursery is not None:
            place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                return self._nursery.fork(message, (fd, stderr, place))
            except ForkFailed as e:
                why = str(e)
                if e.lost:  # it may have forked all the same; a second process on one socket would be worse than none
                    self._lose_zygote(why)
                    raise
            finally:
                os.close(place)
        self._tell_no_fork(why)
        return self._execute(message, fd, stderr, folder)

    def _hear_zygote(self, nursery: Nursery) -> None:
        if not nursery.heard():
            self._lose_zygote("it closed its socket")
            return
        waiting, nursery.waiting = nursery.waiting, []
        for each in waiting:
            self._begin(each.message, each.fd, self._fork_from_zygote)

    def _lose_zygote(self, why: str) -> None:
        """It ended, or must: whoever waits is executed instead, and it is started anew for one who comes later."""
        self._zygote_lost_at = time.monotonic()
        child = self._children.get(_ZYGOTE)
        waiting = self._end_zygote()
        words = child.tail.decode("utf-8", "replace").strip().splitlines() if child is not None else []
        self._tell_no_fork(f"{why}; its last words: {words[-1]}" if words else why)
        for each in waiting:
            self._begin(each.message, each.fd, self._execute)

    def _end_zygote(self) -> list[Waiting]:
        """End it; those that waited for it."""
        nursery, self._nursery = self._nursery, None
        child = self._children.get(_ZYGOTE)
        if child is not None:
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            self._reap(child)
        if nursery is None:
            return []
        self._selector.unregister(nursery.sock)
        return nursery.close()

    def _tell_no_fork(self, why: str) -> None:
        text = f"workers are executed, not forked from the zygote: {why}"
        protocol.send(self._sock, protocol.Fault(Reason.WORKER_UNAVAILABLE.value, text[:400], ""))

    # --- ending ------------------------------------------------------------------------------------------------------

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
        self._end_orphans()
        return protocol.Exited(
            child.worker,
            os.waitstatus_to_exitcode(raw),
            child.tail.decode("utf-8", "replace"),
            usage.ru_maxrss * 1024,
            round(usage.ru_utime + usage.ru_stime, 6),
        )

    def _end_orphans(self) -> None:
        """Kill what workers left behind and the kernel gave to us, and collect it, as far as it stands before a
        worker's own end."""
        ours = {child.pid for child in self._children.values()}
        for pid in _children_of_ours():
            if pid not in ours:
                with contextlib.suppress(ProcessLookupError):
                    # a command that leads a group has not passed its own end on to it
                    (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in ours:
                return
            os.waitpid(ended.si_pid, 0)


def _children_of_ours() -> list[int]:
    """Process ids of this process's children; none where the kernel does not tell (CONFIG_PROC_CHILDREN)."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except FileNotFoundError:
        return []
