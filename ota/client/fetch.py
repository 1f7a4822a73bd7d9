"""Runs a `Transfer` over transports and keeps its progress in the inbox: `<sha256>.part`, `<sha256>.map`.

A thin driver: it owns tasks, time-outs and files, and decides nothing about blocks. A leaf is written before the map
claims it, so a process killed at any moment leaves a map that claims no more than what was written; a power cut may
leave it claiming more, which the hash check on resume finds.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ota.client import policy
from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.policy import Gate
from ota.client.ports import Transport
from ota.client.transfer import Arrival, Block, Counts, Transfer, Verdict, claimed
from ota.errors import BlockTooLarge, OtaError, Reason, StoreError, TransferError
from ota.release import LEAF_BYTES, MAX_PAYLOAD_BYTES, Payload

DIRECTORY = "inbox"
_MAP_MAX_BYTES = 32 + MAX_PAYLOAD_BYTES // LEAF_BYTES // 8
# causes for which the same payload may still come from another source
_ELSEWHERE = frozenset(
    {
        Reason.SOURCE_UNREACHABLE,
        Reason.TRANSFER_TIMEOUT,
        Reason.TRANSFER_CORRUPT,
        Reason.BLOCK_TOO_LARGE,
        Reason.NOT_FOUND,
        Reason.UNSUPPORTED,
        Reason.SERVER_UNTRUSTED,
        Reason.SERVER_REFUSED,
        Reason.SERVER_NOT_YET_VALID,
    }
)
# a transfer looks at the clock so often, for the end of an update window
_GLANCE_S = 5.0


class Inbox:
    """Payloads on their way, one part and one map file each.

    Args:
        rng: jitter of the back-off.
        gate: rate and times of day at which payloads are fetched; None fetches always.

    Raises:
        StoreError: the disk cannot be written.
    """

    def __init__(self, fs: Fs, limits: Limits, rng: random.Random, gate: Gate | None = None) -> None:
        self._fs = fs
        self._limits = limits
        self._rng = rng
        self._gate = gate
        fs.make_dirs(DIRECTORY)

    def missing_bytes(self, payload: Payload) -> int:
        """What fetching the payload will add to the disk. A part counts whether its map survived a power cut or not: a
        full disk must not refuse to complete what already lies on it."""
        return max(0, payload.length - self._fs.allocated(_part(payload)))

    def chunks(self, payload: Payload) -> Iterator[bytes]:
        """The bytes of a fetched payload.

        Raises:
            StoreError: `io_error`.
        """
        return self._fs.chunks(_part(payload))

    def discard(self, payload: Payload) -> None:
        """Remove a payload, complete or not.

        Raises:
            StoreError: `io_error`.
        """
        self._fs.remove(_map(payload))
        self._fs.remove(_part(payload))

    def collect(self, keep: frozenset[str]) -> None:
        """Remove the files of every payload whose ciphertext hash is not in `keep`.

        Raises:
            StoreError: `io_error`.
        """
        for name in self._fs.names(DIRECTORY):
            if name.partition(".")[0] not in keep:
                self._fs.remove(f"{DIRECTORY}/{name}")

    async def fetch(
        self, payload: Payload, transports: Sequence[Transport], counts: Counts, *, delta: bool = False
    ) -> None:
        """Complete the payload in the inbox, from the first transport that can, each going on where the last stopped.

        Args:
            counts: bytes are added to it as they arrive, also when this raises.
            delta: whether the policy is to treat it as part of a delta.

        Raises:
            Postponed: the policy says "not now"; what arrived stays for the next call.
            TransferError: no transport could; as above.
            StoreError: the disk refuses.
        """
        loop = asyncio.get_running_loop()
        transfer = Transfer(payload, self._limits, loop.time())
        transfer.counts = counts
        # a large part on a slow card takes longer to hash than the daemon's loop may stand still
        await asyncio.to_thread(self._resume, transfer)
        part = _Part(self._fs, self._limits, transfer, loop.time())
        try:
            await self._from_any(transfer, part, transports, delta)
        except (OtaError, asyncio.CancelledError):
            try:
                part.flush()
            except StoreError:
                pass  # the first cause is the one to report, and an unflushed map only claims less
            raise
        await part.flush_aside()

    async def _from_any(self, transfer: Transfer, part: _Part, transports: Sequence[Transport], delta: bool) -> None:
        loop = asyncio.get_running_loop()
        failure: TransferError | None = None
        for transport in transports:
            gate = None if transport.name in policy.BY_HAND else self._gate
            run = _Run(self._limits, self._rng, transfer, part, transport)
            try:
                await run.complete(_Admission(gate, delta))
                return
            except TransferError as e:
                if e.reason not in _ELSEWHERE:
                    raise
                failure = failure or e
                transfer.release(loop.time())
        raise failure or TransferError(
            Reason.SOURCE_UNREACHABLE, "there is no transport to fetch from", hint="configure a broker", retry=True
        )

    def _resume(self, transfer: Transfer) -> None:
        payload = transfer.payload
        length = self._fs.size(_part(payload))
        if length is None:
            return
        if length > payload.length:
            self._fs.truncate(_part(payload), payload.length)
        # a map that a power cut damaged is thrown away: then every leaf of the part has to prove itself
        leaves = claimed(payload, self._read_map(payload))
        for index in range(-(-length // LEAF_BYTES)) if leaves is None else leaves:
            if index < len(payload.leaves):
                start, end = payload.leaf_range(index)
                transfer.resume(index, self._fs.read_at(_part(payload), start, end - start), claimed=leaves is not None)

    def _read_map(self, payload: Payload) -> bytes:
        return self._fs.read_at(_map(payload), 0, _MAP_MAX_BYTES + 1)


class _Part:
    """The files of one transfer: a leaf is written before the map claims it."""

    def __init__(self, fs: Fs, limits: Limits, transfer: Transfer, now_s: float) -> None:
        self._fs = fs
        self._limits = limits
        self._transfer = transfer
        self._unflushed = 0
        self._flushed_s = now_s

    def write(self, arrival: Arrival) -> None:
        """Keep a leaf: in the page cache, which survives a killed process; after a power cut every claim is checked."""
        payload = self._transfer.payload
        self._fs.write_at(_part(payload), arrival.offset, arrival.leaf)
        self._fs.write_at(_map(payload), 0, self._transfer.bitmap())
        self._unflushed += 1

    def due(self, now_s: float) -> bool:
        """Whether enough lies in the page cache alone to be worth waiting for the disk."""
        late = now_s - self._flushed_s >= self._limits.flush_s
        return self._unflushed >= self._limits.flush_blocks or (late and self._unflushed > 0)

    async def flush_aside(self) -> None:
        """As `flush`, in a thread: a slow card must not stop the daemon's loop, and nothing is written meanwhile."""
        await asyncio.to_thread(self.flush)
        self._flushed_s = asyncio.get_running_loop().time()

    def flush(self) -> None:
        """Make what was written durable, the part before the map."""
        payload = self._transfer.payload
        if self._unflushed:
            self._unflushed = 0
            self._fs.flush(_part(payload))
            self._fs.write_at(_map(payload), 0, self._transfer.bitmap())
            self._fs.flush(_map(payload))


class _Admission:
    """The gate as one run sees it: which kind of payload it asks for, and how long the rate makes it wait."""

    def __init__(self, gate: Gate | None, delta: bool) -> None:
        self._gate = gate
        self._delta = delta
        self._turn = None if gate is None else gate.turn()

    def check(self) -> None:
        """Raises `Postponed` when nothing may be fetched now."""
        if self._gate is not None:
            self._gate.check(delta=self._delta)

    def take(self, length: int) -> float:
        """See `Turn.take`."""
        return 0.0 if self._turn is None else self._turn.take(length)

    def leave(self) -> None:
        """See `Turn.leave`."""
        if self._turn is not None:
            self._turn.leave()


@dataclass(slots=True)
class _Ask:
    """One request under way; `due_s` is when it counts as late, None once it does, `ends_s` when it is given up."""

    block: Block
    due_s: float | None
    ends_s: float


class _Run:
    """One transfer over one transport."""

    def __init__(
        self, limits: Limits, rng: random.Random, transfer: Transfer, part: _Part, transport: Transport
    ) -> None:
        self._limits = limits
        self._rng = rng
        self._transfer = transfer
        self._part = part
        self._transport = transport
        self._asks: dict[asyncio.Task[bytes], _Ask] = {}
        self._given_up: set[asyncio.Task[bytes]] = set()
        self._now = asyncio.get_running_loop().time

    async def complete(self, admission: _Admission) -> None:
        """Fetch what is missing.

        Raises:
            TransferError, StoreError: this transport, the policy or the disk does not allow it.
        """
        try:
            while not self._transfer.complete:
                admission.check()
                held_s = self._launch(admission)
                if not self._asks:
                    # the rate is used up; nobody is asked, so nobody is slow
                    pause_s = min(held_s, _GLANCE_S)
                    await asyncio.sleep(pause_s)
                    self._transfer.paused(pause_s)
                    continue
                done, _ = await asyncio.wait(
                    self._asks, timeout=min(held_s, self._patience_s()), return_when=asyncio.FIRST_COMPLETED
                )
                # every block that came is kept before the first failure ends the run
                failures = [failure for task in done if (failure := self._arrived(self._asks.pop(task), task))]
                if failures:
                    raise failures[0]
                self._give_up_late()
                if self._part.due(self._now()):
                    await self._part.flush_aside()
                self._transfer.check_rate(self._now())
        finally:
            admission.leave()
            for task in self._asks:
                task.cancel()
            await asyncio.gather(*self._asks, *self._given_up, return_exceptions=True)

    def _launch(self, admission: _Admission) -> float:
        """Ask for what the window and the rate allow; seconds after which the rate allows more."""
        transfer = self._transfer
        loop = asyncio.get_running_loop()
        while transfer.ready and len(self._asks) < 2 * self._limits.window_blocks:
            wait_s = admission.take(transfer.window.block_bytes)
            if wait_s > 0:
                return wait_s
            block = transfer.next(self._now())
            if block is None:
                break
            pause_s = self._pause_s(block)
            asked_s = block.asked_s + pause_s
            task = loop.create_task(self._ask(block, pause_s) if pause_s else self._block(block))
            ends_s = asked_s + self._limits.block_timeout_s
            self._asks[task] = _Ask(block, min(ends_s, asked_s + transfer.window.wait_s), ends_s)
        return math.inf

    def _pause_s(self, block: Block) -> float:
        """Full jitter before a block is asked for again, so that a fleet does not do it together."""
        if block.attempt == 1:
            return 0.0
        ceiling_s = min(self._limits.retry_cap_s, self._limits.retry_base_s * 2 ** (block.attempt - 2))
        return self._rng.uniform(0, ceiling_s)

    def _patience_s(self) -> float:
        due_s = min(ask.ends_s if ask.due_s is None else ask.due_s for ask in self._asks.values())
        return max(0.0, min(due_s - self._now(), self._limits.stall_s, _GLANCE_S))

    def _give_up_late(self) -> None:
        """Blocks that are overdue are asked for again; their answers stay welcome for `block_timeout_s`."""
        now_s = self._now()
        for task, ask in list(self._asks.items()):
            if ask.due_s is not None and ask.due_s <= now_s:
                ask.due_s = None
                self._transfer.late(ask.block, now_s)
            if ask.ends_s <= now_s:
                task.cancel()
                self._given_up.add(task)
                task.add_done_callback(self._given_up.discard)
                del self._asks[task]

    def _block(self, block: Block) -> Coroutine[Any, Any, bytes]:
        return self._transport.block(self._transfer.payload.sha256, block.offset, block.length)

    async def _ask(self, block: Block, pause_s: float) -> bytes:
        await asyncio.sleep(pause_s)
        return await self._block(block)

    def _arrived(self, ask: _Ask, task: asyncio.Task[bytes]) -> OtaError | None:
        """Take over one answer; returns what makes going on over this transport pointless."""
        block, now_s = ask.block, self._now()
        try:
            data = task.result()
        except TransferError as e:
            return self._again(ask, e)
        except OtaError as e:
            return e
        try:
            arrival = self._transfer.received(block.offset, data, now_s)
            # the answer may have been that of an earlier, shorter request: this one will not get another
            self._transfer.failed(block, Reason.TRANSFER_CORRUPT)
        except TransferError as e:
            return e
        if arrival.verdict is Verdict.ACCEPTED:
            self._part.write(arrival)
        return None

    def _again(self, ask: _Ask, error: TransferError) -> OtaError | None:
        try:
            if isinstance(error, BlockTooLarge):
                self._transfer.too_large(ask.block, error.largest_bytes)
            elif error.reason is Reason.TRANSFER_CORRUPT:
                self._transfer.failed(ask.block, error.reason)
            elif error.reason is not Reason.TRANSFER_TIMEOUT:
                return error
            elif ask.due_s is not None:
                self._transfer.late(ask.block, self._now())
        except TransferError as e:
            return e
        return None


def _part(payload: Payload) -> str:
    return f"{DIRECTORY}/{payload.sha256}.part"


def _map(payload: Payload) -> str:
    return f"{DIRECTORY}/{payload.sha256}.map"
