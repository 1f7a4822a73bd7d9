"""A worker's own end of its socket to the daemon, and what the process gives up before it reads anything.

It is not the protocol (`agent.protocol`) and knows no role. Importable without numpy.
Invariants: whatever a request raises on purpose is answered with one `Fault`; descriptors nobody took are closed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from agent import protocol
from agent.errors import AgentError, Reason
from ota.errors import OtaError

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_TIMERSLACK = 29
_PR_SET_CHILD_SUBREAPER = 36


def confine(parent: int) -> None:
    """Die with the host, and let no other process of this user read this one's memory.

    Args:
        parent: process id of the host, or 0 when there is none to follow.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if parent:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it went away before the kernel knew of our wish
            raise SystemExit(0)


def be_called(name: str) -> None:
    """Show `name`, at most 15 characters, where `ps` and `top` show the program's."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def wake_on_time() -> None:
    """Let the kernel wake this thread when it asked for it, and not up to 50 us later with others."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def adopt_orphans() -> None:
    """From now on processes that lose their parent below this one become its own children."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Channel:
    """The blocking socket to the daemon.

    Args:
        fd: a connected SEQPACKET socket; becomes the channel's.
    """

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(True)

    def fileno(self) -> int:
        """Descriptor, for a selector."""
        return self._sock.fileno()

    def receive(self) -> protocol.Packet | None:
        """The next message; None at the end, also when the daemon died.

        Raises:
            AgentError: `bad_message`.
        """
        try:
            return protocol.receive(self._sock)
        except ConnectionResetError:
            return None

    def send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        """Send one message; the descriptors stay the caller's.

        Raises:
            SystemExit: the daemon is gone, so nobody wants the answer.
        """
        try:
            protocol.send(self._sock, message, fds)
        except (BrokenPipeError, ConnectionResetError) as e:
            raise SystemExit(0) from e

    def fault(self, error: AgentError | OtaError) -> None:
        """Answer a request that was refused."""
        self.send(fault_of(error))

    def serve_one(self, act: Callable[[protocol.Packet], bool]) -> bool:
        """Receive one message and give it to `act`; False when the worker shall end.

        `act` returns False to end. An `AgentError` or `OtaError` it raises is answered as a `Fault`.
        """
        try:
            packet = self.receive()
        except AgentError as e:
            self.fault(e)
            return True
        if packet is None:
            return False
        try:
            return act(packet)
        except (AgentError, OtaError) as e:
            self.fault(e)
            return True
        except MemoryError:
            # After this nothing in the process can be trusted to be whole.
            self.send(protocol.Fault(Reason.WORKER_OUT_OF_MEMORY.value, "out of memory", "raise the memory limit"))
            raise SystemExit(1) from None
        finally:
            packet.close()


def fault_of(error: AgentError | OtaError) -> protocol.Fault:
    """The message that carries `error`: one line, bounded."""
    return protocol.Fault(error.reason.value, one_line(error.message), one_line(error.hint))


def one_line(text: str, limit: int = 400) -> str:
    """`text` without line breaks and control characters, cut to `limit` characters."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())[:limit]


def unexpected(message: Any, role: str) -> AgentError:
    """The error of a message that `role` does not take."""
    return AgentError(Reason.BAD_MESSAGE, f"a {role} worker does not take {type(message).__name__}")
