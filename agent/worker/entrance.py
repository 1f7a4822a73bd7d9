"""What a process goes through to become a worker: folder, descriptors, limits, environment.

The same for a worker that is executed and for one that is forked from the zygote. Imports no numpy and no runtime.
Invariant: a worker's descriptor 3 is its socket to the daemon, 2 its pipe to the host, and it has no other.
"""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import agent
from agent import protocol

WORKER_FD = 3
# What a vendor's board sets up for its own libraries; everything else is dropped.
_PASSED_ON = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")


def settle(message: protocol.Spawn, sock: int, stderr: int) -> None:
    """In a new process, inside its own folder: give up everything of the old one, and set the worker's limits."""
    null = os.open(os.devnull, os.O_RDWR)
    # Move the socket out of the way first: it may itself be one of the numbers written below.
    sock = os.dup(sock)
    while sock <= WORKER_FD:
        sock = os.dup(sock)
    os.dup2(stderr, 2)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(sock, WORKER_FD)
    os.set_inheritable(WORKER_FD, True)
    # Everything of ours closes on exec anyway; what the host itself inherited may not.
    os.closerange(WORKER_FD + 1, os.sysconf("SC_OPEN_MAX"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if message.memory_bytes > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (message.memory_bytes, message.memory_bytes))
    if message.nice > 0:
        os.nice(message.nice)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def environment(folder: str) -> dict[str, str]:
    """Of a worker whose own folder is `folder`."""
    return {
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        "PATH": os.defpath,
        "TMPDIR": folder,
        "PYTHONPATH": str(Path(agent.__file__).resolve().parent.parent),
        "PYTHONNOUSERSITE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }
