"""One worker process as the daemon speaks to it: asked, answered, refused, hung, dead.

It is not where workers come from (`agent.daemon.supervisor`). Invariants: a request ends within its time-out with an
answer or a typed error; a worker that hangs or speaks nonsense is killed; what it said before its end is heard first.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent import protocol
from agent.daemon.channel import Channel
from agent.errors import AgentError, Reason, WorkerError

EXIT_GRACE_S = 2.0
STOP_GRACE_S = 3.0
CLOSE_GRACE_S = 1.0
MAX_TEXT_CHARS = 500


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended. `status` is its exit code or minus the signal; `killed` when the daemon wanted it; `lost`
    when it went down with its host, which says nothing of the worker itself; `ran_out` when it said before that it got
    no memory."""

    status: int
    stderr_tail: str
    killed: bool
    lost: bool = False
    ran_out: bool = False

    @property
    def reason(self) -> Reason:
        """Memory or crash, as far as the exit tells."""
        if self.lost:
            return Reason.WORKER_UNAVAILABLE
        ran_out = self.ran_out or "bad_alloc" in self.stderr_tail or "MemoryError" in self.stderr_tail
        if ran_out or (self.status == -signal.SIGKILL and not self.killed):
            return Reason.WORKER_OUT_OF_MEMORY
        return Reason.WORKER_CRASHED

    def __str__(self) -> str:
        if self.lost:
            return "went down with its host"
        if self.ran_out:
            return "ran out of memory"
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
        self._ran_out = False
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
                _close_answer(self._answer)
                self.kill()
                raise WorkerError(
                    Reason.WORKER_HUNG,
                    f"the {self.role} worker did not answer {type(message).__name__} in {timeout_s:g} s",
                ) from e
            except WorkerError as e:
                if e.reason is Reason.WORKER_HUNG:
                    self.kill()
                    raise
                await self._raise_exit()
                raise
            except asyncio.CancelledError:
                _close_answer(self._answer)
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
            return await asyncio.shield(self.exited)

    def has_exited(self, message: protocol.Exited) -> None:
        """The host's word on how it ended; called by the supervisor."""
        self._channel.drain()  # among its last words may be why
        self._end(Exit(message.status, message.stderr_tail, self._killed, ran_out=self._ran_out))

    def has_lost_host(self) -> None:
        """The host is gone, and this worker with it; called by the supervisor."""
        self._end(Exit(-signal.SIGKILL, "", self._killed, lost=True))

    def _end(self, end: Exit) -> None:
        if self.exited.done():
            return
        # its last words may still lie in the socket: a result among them is an answered frame
        self._channel.drain()
        self.exited.set_result(end)
        self._fail(WorkerError(end.reason, f"the {self.role} worker {end}"))
        self._channel.close()
        self.on_exit(end)

    async def _raise_exit(self) -> None:
        """Replace "the socket closed" by how the process ended, when the host says so soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_GRACE_S):
                end = await asyncio.shield(self.exited)
            raise WorkerError(end.reason, f"the {self.role} worker {end}", hint=_last_words(end.stderr_tail))

    def _received(self, packet: protocol.Packet) -> None:
        if isinstance(packet.message, protocol.Fault) and packet.message.reason == Reason.WORKER_OUT_OF_MEMORY.value:
            self._ran_out = True
        wanted = self._expected is not None and isinstance(packet.message, (self._expected, protocol.Fault))
        if wanted and self._answer is not None and not self._answer.done():
            self._answer.set_result(packet)
        else:
            self.on_message(packet)

    def _closed(self, why: str) -> None:
        self._fail(WorkerError(Reason.WORKER_CRASHED, f"the {self.role} worker's socket: {why}"))
        # a worker without a socket is of no use, however alive; one on its way out shall tell its own exit status
        if self._channel.nonsense:
            self.kill()
        else:
            asyncio.get_running_loop().call_later(CLOSE_GRACE_S, self.kill)

    def _fail(self, error: WorkerError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def fault_error(fault: protocol.Fault) -> AgentError:
    """The typed error a worker's `Fault` stands for; a reason it cannot know counts as a crash."""
    try:
        reason = Reason(fault.reason)
    except ValueError:
        reason = Reason.WORKER_CRASHED
    if reason is Reason.WORKER_UNAVAILABLE:
        reason = Reason.WORKER_CRASHED  # ours to say: it would excuse the model
    return AgentError(reason, one_line(fault.message), hint=one_line(fault.hint))


def one_line(text: str) -> str:
    """What a worker says, fit for a log, a terminal and the operator's screen."""
    return " ".join("".join(char if char.isprintable() else " " for char in text[: 2 * MAX_TEXT_CHARS]).split())[
        :MAX_TEXT_CHARS
    ]


def _last_words(text: str) -> str:
    lines = text.strip().splitlines()
    return f"its last words: {one_line(lines[-1])[:200]}" if lines else ""


def _close_answer(answer: asyncio.Future[protocol.Packet]) -> None:
    """Close what came with an answer that nobody will see."""
    if answer.done() and not answer.cancelled() and answer.exception() is None:
        answer.result().close()
