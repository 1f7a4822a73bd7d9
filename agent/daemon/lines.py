"""One line at work: the model worker that serves it, its restart after a crash, and the swap to another release.

The swap starts the new worker beside the old one on the same ring, warms it, moves the frames over at a frame boundary
and lets the old one finish what it holds. Invariant: whenever this module gives up on a worker, frames it held are
counted by the source, and a worker that should serve is started again until `stop`. Where the hardware does not allow
two processes the old worker is stopped first, and the gap is measured and told.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from agent import protocol
from agent.config import UpdateConfig
from agent.daemon.compiled import CompiledModels, keeping_nothing
from agent.daemon.fusedsource import FusedSource
from agent.daemon.ruling import Ruling
from agent.daemon.selection import Verdict
from agent.daemon.serving import Serving, Starts
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import BACKOFF_S, Supervisor
from agent.daemon.tally import Tally
from agent.daemon.worker import Exit, Worker, fault_error
from agent.errors import AgentError, Reason, WorkerError
from agent.lineconfig import LineConfig
from ota.client.ports import Candidate
from ota.errors import OtaError

log = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 5.0
WATCH_INTERVAL_S = 2.0
STABLE_S = 60.0
DEATH_NEWS_S = 0.5


class LineRuntime:
    """Serves one line.

    Args:
        on_result: called with (line, result) for each frame.
        on_event: called with (kind, facts) for crashes, restarts and swaps.
        on_crash: called with (line, candidate, reason) when the worker of `candidate` died by its own fault.
    """

    def __init__(
        self,
        config: LineConfig,
        source: SourceRuntime,
        supervisor: Supervisor,
        limits: UpdateConfig,
        *,
        on_result: Callable[[str, protocol.Result], None],
        on_event: Callable[[str, dict[str, object]], None],
        on_crash: Callable[[str, Candidate, Reason], None] = lambda *_: None,
        compiled: CompiledModels | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.serving: Serving | None = None
        self.tally = Tally()
        self.restarts = 0
        self.results = 0
        self.unchanged = 0
        self._supervisor = supervisor
        self._limits = limits
        self._on_result = on_result
        self._on_event = on_event
        self._on_crash = on_crash
        self._lock = asyncio.Lock()
        self._finished: weakref.WeakKeyDictionary[Worker, asyncio.Future[protocol.Finished]] = (
            weakref.WeakKeyDictionary()
        )
        self._backoff_s = 0.0  # after a long good time, one is replaced at once
        self._revive: asyncio.Task[None] | None = None
        self._replaced: Serving | None = None
        self._watch: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._leaving: Worker | None = None
        self._ended_by_us: Worker | None = None
        self._up_since = time.monotonic()
        self._last_result = 0.0
        self._last_seqs: collections.deque[int] = collections.deque(maxlen=1024)
        self._wanted: tuple[Candidate, Verdict] | None = None
        self.on_loaded: Callable[[Candidate, Verdict, protocol.ModelLoaded], None] = lambda *_: None
        self.ruling: Ruling | None = None
        told = (self._said, lambda *facts: self.on_loaded(*facts))
        self._starts = Starts(config, source, supervisor, limits, *told, compiled or keeping_nothing())
        self._gap_since: float | None = None

    @property
    def lent(self) -> bool:
        """Whether nothing serves because what it serves on is needed for a trial, or for its successor."""
        # one that is on its way back makes room for nobody: where it does not come back, the log says why
        return self._gap_since is not None and self._revive is None

    def holds(self, delegate: str) -> bool:
        """Whether this line owns `delegate`: a worker of it lives there, or is to serve there."""
        wanted = self._wanted is not None and self._wanted[1].requested == delegate
        return wanted or self._starts.holds(delegate)

    async def serve(self, candidate: Candidate, verdict: Verdict, *, alone: bool = False) -> int | None:
        """Make `candidate` serve, beside the present worker where there is one, or `alone`, after its end.

        Returns the first frame the new worker got, None on a first start.

        Raises:
            AgentError: the new worker did not come up; the old one still serves, or is started again.
        """
        before, self._wanted = self._wanted, (candidate, verdict)
        self._cancel_revival()
        try:
            async with self._lock:
                self._cancel_revival()
                if alone or isinstance(self.source, FusedSource):
                    await self._vacate()
                return await self._put_to_work(candidate, verdict, fresh=True)
        except BaseException:
            self._wanted = before
            self._revive_if_dead()
            raise

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[None]:
        """Nothing serves meanwhile, because a trial needs what it serves on; afterwards the same serves again, unless
        something else is put to work."""
        self._cancel_revival()
        try:
            async with self._lock:
                self._cancel_revival()
                await self._vacate()
                yield
        finally:
            self._backoff_s = BACKOFF_S[0]
            self._revive_if_dead()

    async def _vacate(self) -> None:
        """End every worker of the line, and wait until all are gone; the lock is held."""
        old, self.serving = self.serving, None
        if old is not None:
            self._gap_since = self._gap_since or time.monotonic()
            self.source.detach(old.reader, "stopped")
            try:
                await old.worker.stop()
            finally:
                old.worker.kill()  # nobody else knows of it, should this have been cancelled
                self._no_more_of(old.worker.number + 1)
        await asyncio.gather(*self._retiring)
        await self._starts.end_all()

    def keep_trying(self, candidate: Candidate, verdict: Verdict) -> None:
        """Go on trying to make `candidate` serve, with back-off, until it does or something else is put to work."""
        self._cancel_revival()
        self._wanted = (candidate, verdict)
        self._replaced = self.serving
        work = self._bring_back(candidate, verdict, self.serving)
        self._revive = asyncio.create_task(work, name=f"revive {self.config.name}")

    async def stop(self) -> None:
        """Stop serving."""
        self._cancel_revival()
        async with self._lock:
            self._cancel_revival()
            self._wanted = self._gap_since = None
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None
            if self.serving is not None:
                old, self.serving = self.serving, None
                self.source.detach(old.reader, "stopped")
                await old.worker.stop()
                self._no_more_of(old.worker.number + 1)
            await asyncio.gather(*self._retiring)
            self._supervisor.keep_warm(self.config.name, "")

    def answered(self, seq: int) -> bool:
        """Whether a result for frame `seq`, one of the last 1024, came."""
        return seq in self._last_seqs

    def source_restarted(self) -> None:
        """The ring is a new one, its frames are counted anew: bring the model up on it."""
        self._last_seqs.clear()
        if self.serving is not None:
            self._ended_by_us = self.serving.worker
            self.serving.worker.kill()

    async def heartbeat(self, golden: int, component: str, tolerance: dict[str, object]) -> None:
        """Let the serving worker reproduce the golden vectors in the memfd `golden` between frames.

        Raises:
            AgentError: it did not.
        """
        if self.serving is None or self.serving.worker.exited.done():
            raise AgentError(Reason.WORKER_UNAVAILABLE, f"line {self.config.name} has no worker")
        await self.serving.worker.request(
            protocol.RunGolden(component, tolerance),
            protocol.GoldenPassed,
            fds=(golden,),
            timeout_s=self._limits.run_timeout_s,
        )

    async def _put_to_work(self, candidate: Candidate, verdict: Verdict, *, fresh: bool) -> int | None:
        """Bring `candidate` up and move the frames over to it; the lock is held. `fresh` starts another tally."""
        old = self.serving
        live = old is not None and not old.worker.exited.done()
        wish = None if self.ruling is None else self.ruling.wish
        new = await self._starts.start(candidate, verdict, wish, active=not live)
        if isinstance(self.source, FusedSource):
            self._last_seqs.clear()  # its frames are counted anew
        new.worker.on_exit = lambda end: self._ended(new.worker, end)
        if old is None or not live:
            self._adopt(new, fresh)
            return None
        # once asked, the source moves the frames whether we wait or not: a cancelled swap is finished all the same
        moving = asyncio.create_task(self._move(old, new, fresh), name=f"move {self.config.name}")
        try:
            return await asyncio.shield(moving)
        except asyncio.CancelledError:
            await asyncio.wait([moving])
            raise

    async def _move(self, old: Serving, new: Serving, fresh: bool) -> int:
        """Switch the frames from `old` to `new` and let the old worker finish."""
        self._leaving = old.worker
        try:
            first_seq = await self.source.switch(self.config.name, new.reader)
        except AgentError as e:
            self._leaving = None
            await asyncio.wait((new.worker.exited,), timeout=DEATH_NEWS_S)
            died = new.worker.exited.result() if new.worker.exited.done() else None
            new.worker.kill()
            if e.reason is not Reason.BAD_MESSAGE:
                # whether the source had switched is not known: the old one has to ask it again
                self._ended_by_us = old.worker
                old.worker.kill()
            if died is not None:
                raise WorkerError(died.reason, f"the model worker {died} before its first frame") from e
            # what the source refuses is not the model's fault
            raise WorkerError(Reason.WORKER_UNAVAILABLE, e.message, hint=e.hint) from e
        self._adopt(new, fresh)
        retiring = asyncio.create_task(self._retire(old), name=f"retire {self.config.name}")
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)
        return first_seq

    def _adopt(self, new: Serving, fresh: bool) -> None:
        """From now on `new` serves; what befell it before it was in charge is made up for."""
        self._no_more_of(new.worker.number)
        self.serving = new
        self._up_since = time.monotonic()
        if self._gap_since is not None:
            gap_ms, self._gap_since = round((self._up_since - self._gap_since) * 1000), None
            self._on_event("served_again", {"line": self.config.name, "gap_ms": gap_ms})
        if fresh:
            self.tally = Tally()
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_serving(), name=f"watch {self.config.name}")
        finished = self._finished.get(new.worker)
        if new.worker.exited.done():
            self._ended(new.worker, new.worker.exited.result())
        elif finished is not None and finished.done():
            self._ended_by_us = new.worker
            new.worker.kill()

    async def _retire(self, old: Serving) -> None:
        worker = old.worker
        finished = self._finished.setdefault(worker, asyncio.get_running_loop().create_future())
        try:
            await asyncio.wait((finished, worker.exited), timeout=FINISH_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            await worker.stop()
        finally:
            worker.kill()  # nobody else knows of it, should whoever waits for this have been cancelled
            self._finished.pop(worker, None)

    def _said(self, worker: Worker, packet: protocol.Packet) -> None:
        if isinstance(self.source, FusedSource) and self.source.heard(worker, packet):
            return
        message = packet.message
        if self.ruling is not None and self.ruling.heard(packet, worker.number):
            return packet.close()
        packet.close()
        if isinstance(message, protocol.Result):
            self.results += 1
            self._last_result = time.monotonic()
            self._last_seqs.append(message.seq)
            if self.serving is not None and self.serving.worker is worker:
                self.tally.add(message)
            self._on_result(self.config.name, message)
        elif isinstance(message, protocol.Unchanged):
            self.unchanged += 1
            self._last_result = time.monotonic()
            self._last_seqs.append(message.seq)
        elif isinstance(message, protocol.Finished):
            future = self._finished.setdefault(worker, asyncio.get_running_loop().create_future())
            if not future.done():
                future.set_result(message)
            if self.serving is not None and self.serving.worker is worker and worker is not self._leaving:
                # the source gave it up, or went away: it has to ask anew
                self._ended_by_us = worker
                worker.kill()
        elif isinstance(message, protocol.Fault):
            fault = fault_error(message)
            log.error("line %s: %s", self.config.name, fault.message, extra={"reason": fault.reason.value})
            worker.kill()

    def _no_more_of(self, successor: int) -> None:
        """Of the workers before number `successor` rules hear nothing more."""
        if self.ruling is not None:
            self.ruling.interrupted(successor)

    def _ended(self, worker: Worker, end: Exit) -> None:
        self._finished.pop(worker, None)
        sources = isinstance(self.source, FusedSource) and self.source.ended(worker, end)
        if self.serving is None or self.serving.worker is not worker:
            return
        self._no_more_of(worker.number + 1)
        ours = worker is self._ended_by_us or end.lost or sources
        if not ours:
            self.tally.crashes += 1
            self.tally.last_crash = end.reason
        self._on_event("worker_exit", {"line": self.config.name, "reason": end.reason.value, "detail": str(end)})
        if time.monotonic() - self._up_since > STABLE_S:
            self._backoff_s = 0.0
        if self._revive is None or self._revive.done() or self._replaced is not self.serving:
            # else somebody is to take its place already, and it is not wanted back
            self.keep_trying(self.serving.candidate, self.serving.verdict)
        if not ours:
            self._on_crash(self.config.name, self.serving.candidate, end.reason)

    def _revive_if_dead(self) -> None:
        """After a start that failed, or a trial that wanted room: whoever served before is still wanted."""
        if self.serving is not None and self.serving.worker.exited.done():
            self.keep_trying(self.serving.candidate, self.serving.verdict)
        elif self.serving is None and self._wanted is not None:
            self.keep_trying(*self._wanted)

    async def _bring_back(self, candidate: Candidate, verdict: Verdict, lost: Serving | None) -> None:
        """Start `candidate` with back-off, until it serves or something else than `lost` does."""
        while True:
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(max(2 * self._backoff_s, BACKOFF_S[0]), BACKOFF_S[1])
            async with self._lock:
                if self.serving is not lost:
                    return
                try:
                    await self._put_to_work(candidate, verdict, fresh=False)
                except (AgentError, OtaError, OSError) as e:
                    self._failed_to_return(candidate, e)
                    continue
            self.restarts += 1
            self._on_event("worker_restarted", {"line": self.config.name, "restarts": self.restarts})
            return

    def _failed_to_return(self, candidate: Candidate, error: AgentError | OtaError | OSError) -> None:
        """A worker that had no source or no host to come to is no crash of the model."""
        if isinstance(error, AgentError) and error.reason is not Reason.WORKER_UNAVAILABLE:
            self.tally.crashes += 1
            self.tally.last_crash = error.reason
            self._on_crash(self.config.name, candidate, error.reason)
        reason = "" if isinstance(error, OSError) else error.reason.value
        log.error("line %s: %s", self.config.name, error, extra={"reason": reason})

    async def _watch_serving(self) -> None:
        """Ask a worker that says nothing whether it is alive; `request` kills one that does not answer."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            serving = self.serving
            quiet = time.monotonic() - self._last_result > WATCH_INTERVAL_S
            if serving is None or serving.worker.exited.done() or not quiet:
                continue
            try:
                await serving.worker.request(
                    protocol.Measure(0, 0), protocol.Measured, timeout_s=self._limits.run_timeout_s
                )
            except AgentError as e:
                log.error("line %s: %s", self.config.name, e.message, extra={"reason": e.reason.value})

    def _cancel_revival(self) -> None:
        revive, self._revive = self._revive, None
        if revive is not None and revive is not asyncio.current_task():
            revive.cancel()
