"""One source process for each configured source: opened, watched, restarted, and told who reads it.

Frames themselves never pass through the daemon; it hands each reader's socket to both ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from agent import protocol
from agent.daemon.supervisor import BACKOFF_S, Supervisor
from agent.daemon.worker import Exit, Worker, fault_error, one_line
from agent.errors import AgentError, Reason, WorkerError
from agent.sourceconfig import SourceConfig

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 30.0
SWITCH_TIMEOUT_S = 10.0
STABLE_S = 60.0
STATES = ("opening", "streaming", "stale", "reconnecting", "ended")
DROP_REASONS = ("backlog", "worker_lost", "no_reader", "stopped")


class SourceRuntime:
    """A configured source and the process that reads it.

    Args:
        on_dropped: called with (line, sequence numbers, reason).
        on_restarted: called after the source came back with a new ring; readers must attach again.
        on_state: called with (state, detail) when the source's state changes.
    """

    def __init__(
        self,
        config: SourceConfig,
        supervisor: Supervisor,
        *,
        on_dropped: Callable[[str, list[int], str], None],
        on_restarted: Callable[[SourceRuntime], None],
        on_state: Callable[[SourceRuntime], None],
    ) -> None:
        self.config = config
        self.state = "opening"
        self.detail = ""
        self.reason = ""
        self.frames = 0
        self.restarts = 0
        self.opened: protocol.SourceOpened | None = None
        self._supervisor = supervisor
        self._on_dropped = on_dropped
        self._on_restarted = on_restarted
        self._on_state = on_state
        self._worker: Worker | None = None
        self._ring = -1
        self._next_reader = 1
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._exited = asyncio.Event()
        self._read_by: set[str] = set()

    @property
    def pid(self) -> int:
        """Process id of the source; 0 while there is none."""
        return self._worker.pid if self._worker is not None else 0

    def start(self) -> None:
        """Open the source and keep it open until `stop`."""
        self._task = asyncio.create_task(self._keep_open(), name=f"source {self.config.name}")

    async def stop(self) -> None:
        """End the source process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._forget()

    async def attach(self, line: str, model: Worker, *, active: bool, timeout_s: float) -> tuple[int, float]:
        """Connect `model` as a reader of `line`; returns the reader's number and its warm-up time in ms.

        Raises:
            WorkerError: the source is not there, or the model does not answer.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError as e:
            raise WorkerError(
                Reason.WORKER_UNAVAILABLE, f"source {self.config.name} is {self.state}: {self.detail}"
            ) from e
        worker, o = self._worker, self.opened
        if worker is None or o is None or not self._ready.is_set():
            # it went away between its word and our turn
            raise WorkerError(Reason.WORKER_UNAVAILABLE, f"source {self.config.name} is {self.state}: {self.detail}")
        reader, self._next_reader = self._next_reader, self._next_reader + 1
        try:
            theirs, models = protocol.socket_pair()
        except OSError as e:
            raise WorkerError(Reason.WORKER_UNAVAILABLE, f"no socket for a reader: {e.strerror}") from e
        self._read_by.add(line)
        with theirs, models:
            worker.tell(protocol.AttachReader(reader, line, active), fds=(theirs.fileno(),))
            packet = await model.request(
                protocol.AttachRing(o.dtype, list(o.shape), o.slots, o.slot_bytes),
                protocol.RingAttached,
                fds=(self._ring, models.fileno()),
                timeout_s=timeout_s,
            )
        return reader, packet.message.warm_ms

    async def switch(self, line: str, reader: int) -> int:
        """Give the line's frames to `reader` from the next one on; returns that frame's sequence number.

        Raises:
            WorkerError: `worker_unavailable`: the source died or hung; it will be restarted.
            AgentError: `bad_message`: the source knows no such reader, and changed nothing.
        """
        if self._worker is None:
            raise WorkerError(Reason.WORKER_UNAVAILABLE, f"source {self.config.name} is {self.state}")
        try:
            packet = await self._worker.request(
                protocol.SwitchReader(line, reader), protocol.Switched, timeout_s=SWITCH_TIMEOUT_S
            )
        except WorkerError as e:
            # the source's death says nothing about the model that wanted its frames
            raise WorkerError(Reason.WORKER_UNAVAILABLE, f"source {self.config.name}: {e.message}") from e
        return int(packet.message.first_seq)

    def detach(self, reader: int, reason: str) -> None:
        """Forget a reader."""
        if self._worker is not None:
            self._worker.tell(protocol.DetachReader(reader, reason))

    async def _keep_open(self) -> None:
        backoff_s = BACKOFF_S[0]
        while True:
            try:
                await self._open()
                opened_at = time.monotonic()
                if self.restarts:
                    self._on_restarted(self)
                await self._exited.wait()
                if time.monotonic() - opened_at > STABLE_S:
                    backoff_s = BACKOFF_S[0]
                self._set_state("reconnecting", self.detail)
            except AgentError as e:
                self._set_state("reconnecting", e.message, e.reason.value)
                log.error(
                    "source %s: %s", self.config.name, e.message, extra={"reason": e.reason.value, "hint": e.hint}
                )
            self._forget()
            self.restarts += 1
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_S[1])

    async def _open(self) -> None:
        self._exited.clear()
        worker = await self._supervisor.spawn("source")
        worker.on_message = lambda packet: self._said(worker, packet)
        worker.on_exit = lambda end: self._ended(worker, end)
        self._worker = worker
        packet = await worker.request(
            protocol.OpenSource(self.config.name, self.config.kind, dict(self.config.options)),
            protocol.SourceOpened,
            timeout_s=OPEN_TIMEOUT_S,
        )
        (self._ring,) = packet.take(1)
        self.opened = packet.message
        self._ready.set()

    def _said(self, worker: Worker, packet: protocol.Packet) -> None:
        message = packet.message
        packet.close()
        if isinstance(message, protocol.Dropped) and self._knows(message):
            self._on_dropped(message.line, message.seqs, message.reason)
        elif isinstance(message, protocol.SourceState) and message.state in STATES:
            if worker is self._worker:
                self.frames = message.frames
                self._set_state(message.state, one_line(message.detail))
        elif isinstance(message, protocol.Fault):
            fault = fault_error(message)
            log.error("source %s: %s", self.config.name, fault.message, extra={"reason": fault.reason.value})
            self._set_state("stale", fault.message, fault.reason.value)
        elif isinstance(message, (protocol.Dropped, protocol.SourceState)):
            log.error("source %s speaks nonsense and is ended", self.config.name)
            worker.kill()

    def _knows(self, message: protocol.Dropped) -> bool:
        return message.line in self._read_by and message.reason in DROP_REASONS

    def _ended(self, worker: Worker, end: Exit) -> None:
        if worker is self._worker:  # the end of one that was given up may be told late
            self.detail = f"the source process {end}"
            self._ready.clear()
            self._exited.set()

    def _set_state(self, state: str, detail: str, reason: str = "") -> None:
        changed = (state, detail) != (self.state, self.detail)
        self.state, self.detail, self.reason = state, detail, reason
        if changed:
            self._on_state(self)

    def _forget(self) -> None:
        self._ready.clear()
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
        if self._ring >= 0:
            os.close(self._ring)
            self._ring = -1
