"""A SEQPACKET socket inside the event loop (asyncio's own streams know byte streams only).

Sending never blocks: a peer that does not read its socket empty is hung, and is told apart from a dead one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from agent import protocol
from agent.errors import AgentError, Reason, WorkerError


class Channel:
    """One end of a worker's or the host's socket.

    Args:
        sock: connected; owned by the channel from now on.
        on_packet: called in the loop for each message; it owns the packet's descriptors.
        on_closed: called once when the other end is gone or spoke nonsense; the argument says which.
    """

    def __init__(
        self, sock: socket.socket, on_packet: Callable[[protocol.Packet], None], on_closed: Callable[[str], None]
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_packet = on_packet
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._open = True
        self.nonsense = False
        """Whether this end closed it because the other spoke nonsense."""
        self._loop.add_reader(sock, self._readable)

    @property
    def open(self) -> bool:
        """Whether messages can still be exchanged."""
        return self._open

    def send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        """Send one message; descriptors stay the caller's.

        Raises:
            WorkerError: `worker_hung` when the peer's buffer is full, `worker_crashed` when it is gone.
        """
        if not self._open:
            raise WorkerError(Reason.WORKER_CRASHED, "the worker is gone")
        try:
            protocol.send(self._sock, message, fds)
        except BlockingIOError as e:
            raise WorkerError(Reason.WORKER_HUNG, "the worker does not read its messages") from e
        except OSError as e:
            raise WorkerError(Reason.WORKER_CRASHED, f"the worker is gone: {e.strerror}") from e

    def close(self) -> None:
        """Close this end; `on_closed` is not called."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def drain(self) -> None:
        """Take what a peer that ended left behind, as far as an honest one's socket buffer can hold."""
        self._take(1024)

    def _readable(self) -> None:
        # a burst is read in one turn, a flood leaves the loop to others after 32 messages
        self._take(32)

    def _take(self, most: int) -> None:
        for _ in range(most):
            if not self._open:
                return
            try:
                packet = protocol.receive(self._sock)
            except BlockingIOError:
                return
            except AgentError as e:
                self.nonsense = True
                self._end(e.message)
                return
            except OSError as e:
                self._end(str(e.strerror))
                return
            if packet is None:
                self._end("closed")
                return
            self._on_packet(packet)

    def _end(self, why: str) -> None:
        self.close()
        self._on_closed(why)
