"""A source that has no process of its own: the line's one worker reads it and runs the model (`fused`).

To status and rules it is a source like any other. Invariants: what is wrong with the source is never blamed on the
model; frames are counted anew with every worker, as they are when a source process is started again.
"""

from __future__ import annotations

import asyncio
import os
import time

from agent import protocol
from agent.daemon.sources import HUNG, LIVE_BACKOFF_S, SourceRuntime
from agent.daemon.supervisor import BACKOFF_S
from agent.daemon.worker import Exit, Worker
from agent.errors import AgentError, Reason, WorkerError


class FusedSource(SourceRuntime):
    """See `SourceRuntime`; opened by `attach`, in the worker that will run the model."""

    role = "fused"

    def start(self) -> None:
        """Nothing yet: the source opens with its line's worker."""

    async def attach(
        self, line: str, model: Worker, *, active: bool, timeout_s: float, after: str = ""
    ) -> tuple[int, float]:
        """Let `model` open the source and read it; the reader's number and its warm-up time in ms.

        Raises:
            WorkerError: `worker_unavailable` when the source is not there within `timeout_s`.
            AgentError: what is wrong with the model.
        """
        self._worker = model
        self._exited.clear()
        try:
            async with asyncio.timeout(timeout_s):
                o, ring = await self._open_in(model)
        except TimeoutError as e:
            raise WorkerError(
                Reason.WORKER_UNAVAILABLE, f"source {self.config.name} is {self.state}: {self.detail}"
            ) from e
        reader, self._next_reader = self._next_reader, self._next_reader + 1
        self._read_by.add(line)
        try:
            theirs, models = protocol.socket_pair()
            with theirs, models:
                model.tell(protocol.AttachReader(reader, line, True), fds=(theirs.fileno(),))
                packet = await model.request(
                    protocol.AttachRing(o.dtype, list(o.shape), o.slots, o.slot_bytes),
                    protocol.RingAttached,
                    fds=(ring, models.fileno()),
                    timeout_s=timeout_s,
                )
        except OSError as e:
            raise WorkerError(Reason.WORKER_UNAVAILABLE, f"no socket for a reader: {e.strerror}") from e
        finally:
            os.close(ring)
        self._ready.set()
        if self._divisor != 1:
            self.set_pace(self._divisor)
        return reader, packet.message.warm_ms

    async def switch(self, line: str, reader: int) -> int:
        """Never asked for: the worker before has ended when this one comes.

        Raises:
            WorkerError: always.
        """
        raise WorkerError(Reason.WORKER_UNAVAILABLE, f"source {self.config.name} has one reader alone")

    def heard(self, worker: Worker, packet: protocol.Packet) -> bool:
        """Take what the worker says as a source; False for what it says as a model."""
        message = packet.message
        of_source = isinstance(message, protocol.Fault) and message.reason.startswith("source_")
        if not of_source and not isinstance(message, (protocol.Dropped, protocol.SourceState)):
            return False
        self._said(worker, packet)
        return True

    def ended(self, worker: Worker, end: Exit) -> bool:
        """Note that the worker ended; whether it did so for the source's sake, and the model is not to blame."""
        if worker is not self._worker:
            return False
        if end.status == 0:
            self._set_state("opening", "its line's next worker opens it")
        else:
            self._set_state("reconnecting", f"the worker that reads it {end}", end.reason.value)
        self._forget()
        return not end.killed and end.status in (0, HUNG)

    async def _open_in(self, worker: Worker) -> tuple[protocol.SourceOpened, int]:
        """Open it, again and again while there is only the source to blame; its ring, which is the caller's."""
        backoff_s, longest_s = LIVE_BACKOFF_S if self.config.live else BACKOFF_S
        while True:
            try:
                packet = await worker.request(
                    protocol.OpenSource(self.config.name, self.config.kind, dict(self._options(self.config))),
                    protocol.SourceOpened,
                    timeout_s=self.open_limit_s,
                )
            except WorkerError:
                raise
            except AgentError as e:
                self._failed(e)
                await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, longest_s)
                continue
            (ring,) = packet.take(1)
            self.opened = packet.message
            self._heard = time.monotonic()
            return packet.message, int(ring)
