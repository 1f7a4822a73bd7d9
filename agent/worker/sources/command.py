"""One running command whose standard output is read: started, drained, and ended with everything that it started.

No shell is involved. Invariants: the command and its children are one process group, which ends with its source, and
the command itself however this process ends; what it says on stderr is kept to its end and can never block it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from agent.errors import Reason, SourceError
from agent.worker.channel import adopt_orphans

TAIL_BYTES = 400
END_S = 0.5
PIPE_BYTES = 1 << 20
_SETPIPE_SZ = 1031  # F_SETPIPE_SZ, which fcntl names only where its C library does
MAX_LAST_READS = 32
# The kernel kills the command when the thread that started it ends: PR_SET_PDEATHSIG, which outlives execve(2).
_TRAMPOLINE = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):  # else it ended before the kernel knew of our wish
    os.execvp(sys.argv[2], sys.argv[2:])
"""
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")


class Command:
    """A running command.

    Args:
        words: program and arguments.

    Raises:
        SourceError: `source_missing`: there is no such program, or it cannot be started.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.name = os.path.basename(words[0])
        if shutil.which(words[0]) is None:
            raise SourceError(
                Reason.SOURCE_MISSING, f"there is no program {words[0]}", hint="install it, or give its whole path"
            )
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment["HOME"] = os.environ.get("TMPDIR", "/")
        adopt_orphans()  # so that `close` can wait for them, too
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=environment,
                start_new_session=True,
            )
        except OSError as e:
            raise SourceError(Reason.SOURCE_MISSING, f"{self.name} cannot be started: {e.strerror}") from e
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out, self._err = self._process.stdout.fileno(), self._process.stderr.fileno()
        for fd in (self._out, self._err):
            os.set_blocking(fd, False)
        with contextlib.suppress(OSError):  # the user's share of pipe memory may be used up
            fcntl.fcntl(self._out, _SETPIPE_SZ, PIPE_BYTES)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        self._poll.register(self._err, select.POLLIN)
        self._tail = b""

    def read_into(self, view: memoryview, deadline: float) -> int:
        """Wait until `deadline` (monotonic seconds) for bytes into `view`; returns how many, 0 at the end.

        Raises:
            SourceError: `source_lost`: none came.
        """
        while True:
            try:
                return os.readv(self._out, (view,))
            except BlockingIOError:
                pass
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0:
                raise SourceError(Reason.SOURCE_LOST, self._said(f"{self.name} writes nothing"))
            for fd, _ in self._poll.poll(left_ms + 1):
                if fd == self._err and not self._drain():
                    self._poll.unregister(self._err)

    def ended(self) -> tuple[int, str]:
        """Its exit status and how to tell of it, after `read_into` returned 0."""
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return 0, self._said(f"{self.name} closed its output")
        for _ in range(MAX_LAST_READS):  # a process that it left behind may write for ever
            if not self._drain():
                break
        how = f"died with signal {-status}" if status < 0 else f"ended with exit code {status}"
        return status, self._said(f"{self.name} {how}")

    def kill(self) -> None:
        """End it now; may be called from another thread."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it and everything in its group, politely first, and release its pipes."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        # its children may live on, and the group's number is not given away while one of them does
        self.kill()
        self._process.wait()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self._process.pid, 0)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _drain(self) -> bool:
        try:
            data = os.read(self._err, 65536)
        except BlockingIOError:
            return False
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        return bool(data)

    def _said(self, what: str) -> str:
        lines = self._tail.decode("utf-8", "replace").strip().splitlines()
        return f"{what}: {lines[-1][:200]}" if lines else what
