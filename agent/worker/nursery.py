"""The host's end of the zygote: what waits for it, what it forked, and what to do when it cannot.

It owns no child: the host starts and reaps the zygote like any worker. Invariants: who waits leaves the queue once, by
the host or by `cancel`; nothing waits longer than `START_LIMIT_S`, for however many zygotes.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field

from agent import protocol
from agent.errors import AgentError

START_LIMIT_S = 20.0
ANSWER_LIMIT_S = 5.0


@dataclass(frozen=True)
class Waiting:
    """A worker that waits for the zygote, until `deadline`; `fd` is its end of the socket to the daemon."""

    message: protocol.Spawn
    fd: int
    deadline: float = field(default_factory=lambda: time.monotonic() + START_LIMIT_S)


class ForkFailed(Exception):
    """The zygote did not fork; its text says why. `lost` when it does not answer and must go."""

    def __init__(self, why: str, *, lost: bool) -> None:
        super().__init__(why)
        self.lost = lost


class Nursery:
    """One zygote and its queue.

    Args:
        sock: the host's end of the zygote's socket; owned from now on.
        waiting: who waits for it already.
    """

    def __init__(self, sock: socket.socket, waiting: list[Waiting]) -> None:
        self.sock = sock
        self.ready = False
        self.waiting = waiting
        self._deadline = time.monotonic() + START_LIMIT_S
        sock.settimeout(ANSWER_LIMIT_S)

    def patience_s(self) -> float | None:
        """How long the host may wait for something to happen; None while nothing waits for the zygote."""
        if self.ready or not self.waiting:
            return None
        deadline = min(self._deadline, *(waiting.deadline for waiting in self.waiting))
        return max(0.0, deadline - time.monotonic())

    def heard(self) -> bool:
        """Take what the zygote says unasked; False when it is gone or speaks nonsense."""
        try:
            packet = protocol.receive(self.sock)
        except (AgentError, OSError):
            return False
        if packet is None:
            return False
        self.ready = isinstance(packet.message, protocol.HostReady)
        packet.close()
        return self.ready

    def fork(self, message: protocol.Spawn, fds: tuple[int, int, int]) -> int:
        """Let it fork a worker with socket, stderr and folder in `fds`, which stay the caller's; the process id.

        Raises:
            ForkFailed: it did not.
        """
        try:
            protocol.send(self.sock, message, fds)
            packet = protocol.receive(self.sock)
        except (AgentError, OSError) as e:
            raise ForkFailed(f"the zygote does not answer: {e}", lost=True) from e
        answer = packet.message if packet is not None else None
        if packet is not None:
            packet.close()
        if isinstance(answer, protocol.Started) and answer.worker == message.worker:
            return answer.pid
        if isinstance(answer, protocol.Fault):
            raise ForkFailed(answer.message, lost=False)
        raise ForkFailed("the zygote is gone", lost=True)

    def cancel(self, worker: int) -> bool:
        """Forget a worker that waits; False when it does not."""
        for waiting in self.waiting:
            if waiting.message.worker == worker:
                self.waiting.remove(waiting)
                os.close(waiting.fd)
                return True
        return False

    def close(self) -> list[Waiting]:
        """End the connection; those that still wait are the caller's."""
        self.sock.close()
        return self.waiting
