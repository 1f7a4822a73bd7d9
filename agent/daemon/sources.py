"""One source process for each configured source: opened, watched, restarted, and told who reads it.

Frames themselves never pass through the daemon; it hands each reader's socket to both ends.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from agent import protocol
from agent.config import Config
from agent.daemon.offeredring import check_ring
from agent.daemon.supervisor import BACKOFF_S, Supervisor
from agent.daemon.worker import Exit, Worker, fault_error, one_line
from agent.errors import AgentError, Reason, WorkerError
from agent.sourceconfig import NETWORK_KINDS, SourceConfig

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 30.0
SWITCH_TIMEOUT_S = 10.0
STABLE_S = 60.0
SILENT_S = 20.0
"""An open source speaks every second; one that is silent for so long hangs, whatever its readers see."""
LIVE_BACKOFF_S = (0.25, 1.0)
"""Of a source that has to be waited for: a camera that is back is seen within seconds, however long it was away."""
HUNG = 75  # EX_TEMPFAIL: the process gave up a call that never returned
NETWORK_MEMORY_BYTES = 1 << 30
"""Of a process that reads a network source, whose sender may announce any size; a 4K stream takes a quarter."""
FPS_WINDOW_S = 5.0
FPS_LEAST_S = 0.9
TOLD_BURST = 8
TOLD_EVERY_S = 10.0
STATES = ("opening", "streaming", "stale", "reconnecting", "ended")
DROP_REASONS = ("backlog", "worker_lost", "no_reader", "stopped")


def network_host(config: Config, on_lost: Callable[[], None]) -> Supervisor | None:
    """The workers of edge-source.service, where workers are units and a source needs the network; None elsewhere."""
    if config.workers != "unit" or not any(source.kind in NETWORK_KINDS for source in config.sources):
        return None
    return Supervisor(listen=config.source_socket, host_command=(), on_lost=on_lost, unit="edge-source.service")


class SourceRuntime:
    """A configured source and the process that reads it.

    Args:
        options: makes the options for the process, called at each opening; those of `config` when None. It puts secrets
            in the place of the names of their files, so that neither status nor settings ever hold them.
        on_dropped: called with (line, sequence numbers, reason).
        on_restarted: called after the source came back with a new ring; readers must attach again.
        on_state: called when the source's state or reason has changed, less often while they change often.
        silent_s: a process that says nothing for so long hangs, and is ended.

    Attributes:
        state, reason, detail: of `STATES`; why; for people.
        frames, reconnects, restarts: frames that came, how often the source was found again within one process, and how
            often there was a new process.
        drops: frames that no reader got, by reason.
        samples: of a source that hears on the broker: messages heard, those that were no samples, samples dropped.
    """

    role = "model"
    """Of the worker that reads it: the model's own, or one that is source and model in one process."""

    def __init__(
        self,
        config: SourceConfig,
        supervisor: Supervisor,
        *,
        on_dropped: Callable[[str, list[int], str], None],
        on_restarted: Callable[[SourceRuntime], None],
        on_state: Callable[[SourceRuntime], None],
        options: Callable[[SourceConfig], Mapping[str, Any]] | None = None,
        rng: random.Random | None = None,
        silent_s: float = SILENT_S,
    ) -> None:
        self.config = config
        self.state = "opening"
        self.detail = ""
        self.reason = ""
        self.restarts = 0
        self.drops: collections.Counter[str] = collections.Counter()
        self.samples: Mapping[str, int] = {}
        self.opened: protocol.SourceOpened | None = None
        self._supervisor = supervisor
        self._on_dropped = on_dropped
        self._on_restarted = on_restarted
        self._on_state = on_state
        self._options = options or (lambda config: config.options)
        self._rng = rng or random.Random()
        self._silent_s = silent_s
        self._heard = 0.0
        self._said_last = protocol.SourceState("opening", "", "", 0, 0, 0)
        self._before = (0, 0)  # frames and reconnects of processes that are gone
        self._rates: collections.deque[tuple[float, int]] = collections.deque(maxlen=64)
        self._told = ("opening", "")
        self._may_tell, self._tells_since = float(TOLD_BURST), time.monotonic()
        self._tell_later: asyncio.TimerHandle | None = None
        self._worker: Worker | None = None
        self._ring = -1
        self._next_reader = 1
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._exited = asyncio.Event()
        self._read_by: set[str] = set()
        self._divisor = 1

    @property
    def pid(self) -> int:
        """Process id of the source; 0 while there is none."""
        return self._worker.pid if self._worker is not None else 0

    @property
    def open_limit_s(self) -> float:
        """A process that has not opened the source by then hangs; what the source itself may wait comes on top."""
        return OPEN_TIMEOUT_S + float(self.config.options.get("timeout_s", 0.0))

    @property
    def isolation(self) -> str:
        """What separates the process that reads it from the daemon: `unit` or `process`."""
        return self._supervisor.isolation

    @property
    def frames(self) -> int:
        """How many frames came since the daemon started."""
        return self._before[0] + self._said_last.frames

    @property
    def reconnects(self) -> int:
        """How often the source was found again without a new process."""
        return self._before[1] + self._said_last.reconnects

    @property
    def fps(self) -> float:
        """Frames per second over the last few seconds."""
        if len(self._rates) < 2 or self.state != "streaming":
            return 0.0
        (t0, first), (t1, last) = self._rates[0], self._rates[-1]
        # two words may come one upon the other
        return max(0.0, (last - first) / (t1 - t0)) if t1 - t0 > FPS_LEAST_S else 0.0

    @property
    def age_s(self) -> float | None:
        """Seconds since the last frame that the source told of, which it does once a second; None before the first."""
        last_ns = self._said_last.last_ns
        return max(0.0, (time.monotonic_ns() - last_ns) / 1e9) if last_ns > 0 else None

    def start(self) -> None:
        """Open the source and keep it open until `stop`."""
        self._task = asyncio.create_task(self._keep_open(), name=f"source {self.config.name}")

    async def stop(self) -> None:
        """End the source process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._tell_later is not None:
            self._tell_later.cancel()
        self._forget()

    def set_pace(self, divisor: int) -> None:
        """Deliver only so much of the frames from now on, also after a restart; see `protocol.SetPace`."""
        self._divisor = divisor
        if self._worker is not None and self._ready.is_set():
            self._worker.tell(protocol.SetPace(divisor))

    def feed(self, t_ns: int, rows: list[list[float]]) -> bool:
        """Hand over samples that the daemon heard for the source, none where some are missing; False while its process
        is not there."""
        if self._worker is None or not self._ready.is_set():
            return False
        self._worker.tell(protocol.Feed(t_ns, rows))
        return True

    async def attach(
        self, line: str, model: Worker, *, active: bool, timeout_s: float, after: str = ""
    ) -> tuple[int, float]:
        """Connect `model` as a reader of `line`, which may follow the line `after`; returns the reader's number and its
        warm-up time in ms.

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
            worker.tell(protocol.AttachReader(reader, line, active, after), fds=(theirs.fileno(),))
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
        limits = LIVE_BACKOFF_S if self.config.live else BACKOFF_S
        backoff_s = limits[0]
        while True:
            opened_at = time.monotonic()
            try:
                self._worker = None
                await self._open(*limits)
                opened_at = time.monotonic()
                if self.restarts:
                    self._on_restarted(self)
                await self._watch()
                if time.monotonic() - opened_at > STABLE_S:
                    backoff_s = limits[0]
            except AgentError as e:
                self._failed(e)
            self._forget()
            self.restarts += 1
            await asyncio.sleep(backoff_s * self._rng.uniform(0.75, 1.0))
            backoff_s = min(2 * backoff_s, limits[1])

    async def _open(self, first_s: float, longest_s: float) -> None:
        """Start a process and let it open the source, again and again while there is only the source to blame."""
        self._exited.clear()
        memory_bytes = NETWORK_MEMORY_BYTES if self.config.kind in NETWORK_KINDS else 0
        worker = await self._supervisor.spawn("source", memory_bytes=memory_bytes)
        worker.on_message = lambda packet: self._said(worker, packet)
        worker.on_exit = lambda end: self._ended(worker, end)
        self._worker = worker
        backoff_s = first_s
        while True:
            try:
                packet = await worker.request(
                    protocol.OpenSource(self.config.name, self.config.kind, dict(self._options(self.config))),
                    protocol.SourceOpened,
                    timeout_s=self.open_limit_s,
                )
                break
            except WorkerError:
                raise
            except AgentError as e:
                self._failed(e)
            await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, longest_s)
        (self._ring,) = packet.take(1)
        check_ring(packet.message, self._ring, pictures=self.config.kind in NETWORK_KINDS)
        self.opened = packet.message
        self._heard = time.monotonic()
        self._ready.set()
        if self._divisor != 1:
            self.set_pace(self._divisor)

    async def _watch(self) -> None:
        """Until the process has ended; one that says nothing is ended."""
        while True:
            try:
                async with asyncio.timeout(self._silent_s / 2):
                    await self._exited.wait()
                    return
            except TimeoutError:
                silent_s = time.monotonic() - self._heard
            if silent_s >= self._silent_s:
                raise WorkerError(
                    Reason.WORKER_HUNG, f"the source process has said nothing for {silent_s:.0f} s and was ended"
                )

    def _failed(self, error: AgentError) -> None:
        if (self.state, self.reason) != ("reconnecting", error.reason.value):
            log.error(
                "source %s: %s",
                self.config.name,
                error.message,
                extra={"reason": error.reason.value, "hint": error.hint},
            )
        self._set_state("reconnecting", error.message, error.reason.value)

    def _said(self, worker: Worker, packet: protocol.Packet) -> None:
        message = packet.message
        packet.close()
        if worker is self._worker:
            self._heard = time.monotonic()
        if isinstance(message, protocol.Dropped) and self._knows(message):
            self.drops[message.reason] += len(message.seqs)
            self._on_dropped(message.line, message.seqs, message.reason)
        elif isinstance(message, protocol.SourceState) and message.state in STATES:
            if worker is self._worker:
                self._note(message)
        elif isinstance(message, protocol.Fault):
            fault = fault_error(message)
            if (self.state, self.reason) != ("stale", fault.reason.value):  # else it has been said
                log.error("source %s: %s", self.config.name, fault.message, extra={"reason": fault.reason.value})
            self._set_state("stale", fault.message, fault.reason.value)
        elif isinstance(message, (protocol.Dropped, protocol.SourceState)):
            log.error("source %s speaks nonsense and is ended", self.config.name)
            worker.kill()

    def _note(self, message: protocol.SourceState) -> None:
        """What the process says of itself, as far as it can be true."""
        now = time.monotonic()
        self._said_last = message
        self._rates.append((now, self.frames))
        while now - self._rates[0][0] > FPS_WINDOW_S:
            self._rates.popleft()
        known = message.reason in Reason._value2member_map_
        self._set_state(message.state, one_line(message.detail), message.reason if known else "")

    def _knows(self, message: protocol.Dropped) -> bool:
        return message.line in self._read_by and message.reason in DROP_REASONS

    def _ended(self, worker: Worker, end: Exit) -> None:
        if worker is self._worker:  # the end of one that was given up may be told late
            if self.state != "reconnecting" or end.status not in (0, HUNG):  # else it has said itself why it went
                self._set_state("reconnecting", f"the source process {end}", end.reason.value)
            self._ready.clear()
            self._exited.set()

    def _set_state(self, state: str, detail: str, reason: str = "") -> None:
        self.state, self.detail, self.reason = state, detail, reason
        if (state, reason) != self._told and self._tell_later is None:
            self._tell()

    def _tell(self) -> None:
        """Pass a change on; a source that flickers is told of every now and then, as it is at that moment."""
        self._tell_later = None
        if (self.state, self.reason) == self._told:
            return
        now = time.monotonic()
        refilled = self._may_tell + (now - self._tells_since) / TOLD_EVERY_S
        self._may_tell, self._tells_since = min(float(TOLD_BURST), refilled), now
        if self._may_tell < 1:
            wait_s = (1 - self._may_tell) * TOLD_EVERY_S
            self._tell_later = asyncio.get_running_loop().call_later(wait_s, self._tell)
            return
        self._may_tell -= 1
        self._told = (self.state, self.reason)
        self._on_state(self)

    def _forget(self) -> None:
        self._ready.clear()
        self._before = (self.frames, self.reconnects)
        self._said_last = protocol.SourceState(self.state, "", "", 0, 0, self._said_last.last_ns)
        self._rates.clear()
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
        if self._ring >= 0:
            os.close(self._ring)
            self._ring = -1
