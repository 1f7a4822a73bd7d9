"""How a line's model worker comes to serve: started, loaded, attached to the source; and which of them still live.

It decides nothing: which candidate, beside or instead of whom, is the line's (`agent.daemon.lines`). Invariant: a
worker that did not get so far is killed before the error leaves here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agent import protocol
from agent.config import UpdateConfig
from agent.daemon.compiled import CompiledModels
from agent.daemon.selection import Verdict
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import Supervisor
from agent.daemon.trials import load_message
from agent.daemon.worker import Worker
from agent.errors import AgentError
from agent.lineconfig import LineConfig
from ota.client.ports import Candidate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """The worker in charge. `reader` is its number at the source, `since` the monotonic time at which it came up."""

    worker: Worker
    candidate: Candidate
    verdict: Verdict
    reader: int
    since: float = field(default_factory=time.monotonic)


class Starts:
    """Starts the model workers of one line.

    Args:
        said: called with (worker, packet) for what a worker says unasked.
        loaded: called with what a worker says of the model it loaded; may refuse it with an `AgentError`.
        compiled: what was compiled before, and what is worth keeping.
    """

    def __init__(
        self,
        config: LineConfig,
        source: SourceRuntime,
        supervisor: Supervisor,
        limits: UpdateConfig,
        said: Callable[[Worker, protocol.Packet], None],
        loaded: Callable[[Candidate, Verdict, protocol.ModelLoaded], None],
        compiled: CompiledModels,
    ) -> None:
        self._config = config
        self._source = source
        self._supervisor = supervisor
        self._limits = limits
        self._said = said
        self._loaded = loaded
        self._compiled = compiled
        self._delegates: dict[Worker, str] = {}

    def holds(self, delegate: str) -> bool:
        """Whether a worker of this line lives on `delegate`."""
        return any(name == delegate and not worker.exited.done() for worker, name in self._delegates.items())

    async def start(
        self, candidate: Candidate, verdict: Verdict, wish: protocol.SetRules | None, *, active: bool
    ) -> Serving:
        """Bring a worker up on the line's source; an `active` one gets the line's frames at once.

        Its heap has the limit that the trial had: what grows beyond it in service ends for want of memory, and is
        counted like any crash. `wish` is what it shall do around its answers.

        Raises:
            AgentError: it did not come up.
        """
        line, limits = self._config.name, self._limits
        self._supervisor.keep_warm(line, verdict.requested)
        memory_mb = self._config.memory_mb or limits.trial_memory_mb
        worker = await self._supervisor.spawn(self._source.role, memory_bytes=memory_mb << 20, forked=True)
        self._delegates = {w: name for w, name in self._delegates.items() if not w.exited.done()}
        self._delegates[worker] = verdict.requested
        worker.on_message = lambda packet: self._said(worker, packet)
        try:
            model = await candidate.open(verdict.component)
            try:
                message = load_message(candidate, verdict.component, verdict.requested, self._config.threads)
                # what compiles for long did so in its trial too
                limit_s = max(limits.load_timeout_s, 2e-3 * verdict.load_ms)
                packet = await self._compiled.load(worker, message, model, timeout_s=limit_s)
            finally:
                os.close(model)
            self._loaded(candidate, verdict, packet.message)
            # before it serves: afterwards it would miss frames meanwhile
            await self._compiled.keep(worker, message, packet.message, timeout_s=limits.run_timeout_s)
            if wish is not None:
                worker.tell(wish)
            if self._config.crops is not None:
                worker.tell(protocol.SetCrops(self._config.crops))
            try:
                reader, warm_ms = await self._source.attach(
                    line, worker, active=active, timeout_s=limits.load_timeout_s, after=self._config.on
                )
            except AgentError as e:
                if packet.message.compiled == "imported":
                    await self._compiled.blame(message, e)
                raise
        except BaseException:
            worker.kill()  # also when cancelled: nobody else knows of it yet
            raise
        log.info("line %s: %s %s on %s, warm in %.0f ms", line, candidate.line, candidate.version, verdict.requested,
                 warm_ms)  # fmt: skip
        return Serving(worker, candidate, verdict, reader)

    async def end_all(self) -> None:
        """Kill whatever lives and wait until it is gone: a start that was called off may have the hardware open."""
        for worker in self._delegates:
            worker.kill()
        if leaving := [worker.exited for worker in self._delegates if not worker.exited.done()]:
            await asyncio.wait(leaving)
