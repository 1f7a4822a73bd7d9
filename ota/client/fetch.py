"""Runs a `Transfer` over transports and keeps its progress in the inbox: `<sha256>.part`, `<sha256>.map`.

A thin driver: it owns tasks, time-outs and files, and decides nothing about blocks. A block is written before the map
claims it, so a process killed at any moment leaves a map that claims no more than what was written; a power cut may
leave it claiming more, which the hash check on resume finds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.ports import Transport
from ota.client.transfer import Block, Counts, Transfer, Verdict, claimed
from ota.errors import OtaError, Reason, StoreError, TransferError
from ota.release import LEAF_BYTES, MAX_PAYLOAD_BYTES, Payload

DIRECTORY = "inbox"
_MAP_MAX_BYTES = 32 + MAX_PAYLOAD_BYTES // LEAF_BYTES // 8
# causes for which the same payload may still come from another source
_ELSEWHERE = frozenset({Reason.SOURCE_UNREACHABLE, Reason.TRANSFER_TIMEOUT, Reason.TRANSFER_CORRUPT, Reason.NOT_FOUND})


class Inbox:
    """Payloads on their way, one part and one map file each.

    Args:
        rng: jitter of the back-off.

    Raises:
        StoreError: the disk cannot be written.
    """

    def __init__(self, fs: Fs, limits: Limits, rng: random.Random) -> None:
        self._fs = fs
        self._limits = limits
        self._rng = rng
        fs.make_dirs(DIRECTORY)

    def missing_bytes(self, payload: Payload) -> int:
        """Bytes of the payload that the map does not claim yet: what fetching it will add to the disk."""
        return max(0, payload.length - LEAF_BYTES * len(claimed(payload, self._read_map(payload)) or ()))

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

    async def fetch(self, payload: Payload, transports: Sequence[Transport], counts: Counts) -> None:
        """Complete the payload in the inbox, from the first transport that can, each going on where the last stopped.

        Args:
            counts: bytes are added to it as they arrive, also when this raises.

        Raises:
            TransferError: no transport could; what arrived stays for the next call.
            StoreError: the disk refuses.
        """
        loop = asyncio.get_running_loop()
        transfer = Transfer(payload, self._limits, loop.time())
        transfer.counts = counts
        self._resume(transfer)
        try:
            await self._from_any(transfer, transports)
        except (OtaError, asyncio.CancelledError):
            try:
                self._flush(transfer)
            except StoreError:
                pass  # the first cause is the one to report, and an unflushed map only claims less
            raise
        self._flush(transfer)

    async def _from_any(self, transfer: Transfer, transports: Sequence[Transport]) -> None:
        failure: TransferError | None = None
        for transport in transports:
            try:
                await _Run(self._fs, self._limits, self._rng, transfer, transport).complete()
                return
            except TransferError as e:
                if e.reason not in _ELSEWHERE:
                    raise
                failure = failure or e
                transfer.release()
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
        # a map that a power cut damaged is thrown away: then every block of the part has to prove itself
        blocks = claimed(payload, self._read_map(payload))
        for index in range(-(-length // LEAF_BYTES)) if blocks is None else blocks:
            if index < len(payload.leaves):
                start, end = payload.leaf_range(index)
                transfer.resume(index, self._fs.read_at(_part(payload), start, end - start), claimed=blocks is not None)

    def _read_map(self, payload: Payload) -> bytes:
        return self._fs.read_at(_map(payload), 0, _MAP_MAX_BYTES + 1)

    def _flush(self, transfer: Transfer) -> None:
        payload = transfer.payload
        if self._fs.size(_part(payload)) is not None:
            self._fs.flush(_part(payload))
            self._fs.write_at(_map(payload), 0, transfer.bitmap())
            self._fs.flush(_map(payload))


class _Run:
    """One transfer over one transport."""

    def __init__(self, fs: Fs, limits: Limits, rng: random.Random, transfer: Transfer, transport: Transport) -> None:
        self._fs = fs
        self._limits = limits
        self._rng = rng
        self._transfer = transfer
        self._transport = transport
        self._since_flush = 0

    async def complete(self) -> None:
        tasks: dict[asyncio.Task[bytes], Block] = {}
        loop = asyncio.get_running_loop()
        try:
            while not self._transfer.complete:
                for block in self._transfer.requests():
                    tasks[loop.create_task(self._ask(block))] = block
                done, _ = await asyncio.wait(tasks, timeout=self._limits.stall_s, return_when=asyncio.FIRST_COMPLETED)
                # every block that came is kept before the first failure ends the run
                failures = [failure for task in done if (failure := self._arrived(tasks.pop(task), task))]
                if failures:
                    raise failures[0]
                self._transfer.check_rate(loop.time())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, block: Block) -> bytes:
        if block.attempt > 1:
            ceiling = min(self._limits.retry_cap_s, self._limits.retry_base_s * 2 ** (block.attempt - 2))
            await asyncio.sleep(self._rng.uniform(0, ceiling))
        try:
            async with asyncio.timeout(self._limits.block_timeout_s):
                return await self._transport.block(self._transfer.payload.sha256, block.offset, block.length)
        except TimeoutError as e:
            raise TransferError(
                Reason.TRANSFER_TIMEOUT, f"{self._transport.name} did not answer for a block", retry=True
            ) from e

    def _arrived(self, block: Block, task: asyncio.Task[bytes]) -> OtaError | None:
        """Take over one answer; returns what makes going on over this transport pointless."""
        try:
            data = task.result()
        except TransferError as e:
            return self._again(block, e)
        except OtaError as e:
            return e
        try:
            if self._transfer.received(block.offset, data) is not Verdict.ACCEPTED:
                return None
        except TransferError as e:
            return e
        payload = self._transfer.payload
        self._fs.write_at(_part(payload), block.offset, data)
        # in the page cache, which survives a killed process; after a power cut every claim is checked
        self._fs.write_at(_map(payload), 0, self._transfer.bitmap())
        self._since_flush += 1
        if self._since_flush >= self._limits.flush_blocks:
            self._since_flush = 0
            self._fs.flush(_part(payload))
            self._fs.flush(_map(payload))
        return None

    def _again(self, block: Block, error: TransferError) -> OtaError | None:
        if error.reason not in (Reason.TRANSFER_TIMEOUT, Reason.TRANSFER_CORRUPT):
            return error
        try:
            self._transfer.again(block.index, error.reason)
        except TransferError as e:
            return e
        return None


def _part(payload: Payload) -> str:
    return f"{DIRECTORY}/{payload.sha256}.part"


def _map(payload: Payload) -> str:
    return f"{DIRECTORY}/{payload.sha256}.map"
