"""The zygote: a process that has imported what model workers need, and forks one whenever the host asks.

It is executed, never forked from daemon or host, loads no model and makes no session: libraries alone. What it forks is
a model worker like any other: same limits, same folder and descriptors, a child of the host (which adopts it as the
reaper of orphans), so that the zygote's own end changes nothing for it.
Invariants: it forks only while it has one thread (a lock held by another would stay locked in the child); a request is
answered with `Started` or `Fault` after the forked process has become the host's child.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn

import cv2

import agent
from agent import protocol
from agent.errors import AgentError, Reason
from agent.worker import channel, entrance, serve
from agent.worker.delegates import DelegateLoader

_PID_BYTES = 8
_ADOPTION_POLL_S = 0.0002


def run(link: channel.Channel, host: int, names: Sequence[str], delegates: Mapping[str, DelegateLoader]) -> int:
    """Import the runtimes of the delegates `names`, say `HostReady`, and fork for the host until it goes.

    A runtime that is not there, or fails to load, is left out: its workers will say so themselves.
    """
    # None makes the import fail: the package calls home.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    cv2.setNumThreads(1)
    for name in names:
        try:
            delegates[name]()
        except AgentError as e:
            print(f"zygote: {name}: {e.message}", file=sys.stderr)
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page that holds an object
    link.send(protocol.HostReady(os.getpid(), agent.__version__, sys.version.split(maxsplit=1)[0]))
    while link.serve_one(lambda packet: _obey(packet, link, host, delegates)):
        pass
    return 0


def threads() -> int:
    """Threads of this process, those of C libraries included."""
    return len(os.listdir("/proc/self/task"))


def _obey(packet: protocol.Packet, link: channel.Channel, host: int, delegates: Mapping[str, DelegateLoader]) -> bool:
    message = packet.message
    if not isinstance(message, protocol.Spawn):
        raise channel.unexpected(message, "zygote")
    sock, stderr, folder = packet.take(3)
    try:
        if (running := threads()) > 1:
            raise AgentError(Reason.WORKER_UNAVAILABLE, f"the zygote has {running} threads and must not fork")
        pid = _fork(message, (sock, stderr, folder), host, delegates)
    except OSError as e:
        raise AgentError(Reason.WORKER_UNAVAILABLE, f"the zygote cannot fork: {e.strerror}") from e
    finally:
        for fd in (sock, stderr, folder):
            os.close(fd)
    link.send(protocol.Started(message.worker, pid))
    return True


def _fork(
    message: protocol.Spawn, fds: tuple[int, int, int], host: int, delegates: Mapping[str, DelegateLoader]
) -> int:
    """Fork twice: the process between ends at once, and leaves the worker to the host."""
    told, tell = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            worker = os.fork()
            if worker == 0:
                _live(message, fds, host, delegates)
            os.write(tell, worker.to_bytes(_PID_BYTES, "little"))
        finally:
            os._exit(0)
    os.close(tell)
    try:
        said = os.read(told, _PID_BYTES)
    finally:
        os.close(told)
        os.waitpid(between, 0)
    if len(said) != _PID_BYTES:
        raise OSError(0, "no second process")
    return int.from_bytes(said, "little")


def _live(
    message: protocol.Spawn, fds: tuple[int, int, int], host: int, delegates: Mapping[str, DelegateLoader]
) -> NoReturn:
    """Be a model worker from here to the end of this process."""
    status = 1
    try:
        sock, stderr, folder = fds
        os.fchdir(folder)
        entrance.settle(message, sock, stderr)
        os.environ["TMPDIR"] = tempfile.tempdir = os.getcwd()
        between = os.getppid()
        while os.getppid() == between != host:
            time.sleep(_ADOPTION_POLL_S)
        channel.confine(host)
        channel.be_called(f"edge-{message.role}")
        status = serve.run(channel.Channel(entrance.WORKER_FD), delegates)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:  # noqa: BLE001 - a forked child must not return into the zygote's loop
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
