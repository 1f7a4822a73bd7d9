"""Which blocks of a payload to ask for next, and what becomes of those that arrive: sans-IO, no clock of its own.

A payload consists of leaves of 64 KiB whose SHA-256 the release signs. A block is a leaf or a fraction of one (`window`
says how large and how many); blocks of one leaf are put together in a buffer, and nothing is handed out that was not
checked whole, from any source, so that a transfer may change sources half-way. Not here: sockets and tasks (`fetch`),
files (`fetch`, through `fsops`).
Invariants: at most `window.blocks` blocks are outstanding, and at most as many leaves in the making; a lost block is
asked for again alone; a leaf is accepted once; a bitmap read from disk is a claim, not a fact: every leaf it claims is
hashed again before it counts.
"""

from __future__ import annotations

import enum
import hashlib
from collections import deque
from dataclasses import dataclass

from ota.client.leaf import UNITS, Leaf, first_run, mask
from ota.client.limits import Limits
from ota.client.window import UNIT_BYTES, Window
from ota.errors import Reason, TransferError
from ota.release import LEAF_BYTES, Payload

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Block:
    """One request: `length` bytes at `offset`, within one leaf; `attempt` counts from 1.

    `asked_s` is when it was handed out, `delivered_bytes` what had arrived by then.
    """

    offset: int
    length: int
    attempt: int
    asked_s: float
    delivered_bytes: int


class Verdict(enum.Enum):
    """What became of a block that arrived. `ACCEPTED`: its leaf is complete and right; `KEPT`: more of it must come."""

    ACCEPTED = "accepted"
    KEPT = "kept"
    DUPLICATE = "duplicate"
    UNASKED = "unasked"
    WRONG_LENGTH = "wrong_length"
    WRONG_HASH = "wrong_hash"


@dataclass(frozen=True, slots=True)
class Arrival:
    """`verdict` on a block and, when it is `ACCEPTED`, the whole leaf, to be written at `offset`."""

    verdict: Verdict
    offset: int = 0
    leaf: bytes = b""


@dataclass(slots=True)
class Counts:
    """Bytes by purpose and blocks by verdict, of one transfer in one process."""

    fetched_bytes: int = 0
    refetched_bytes: int = 0
    duplicate_bytes: int = 0
    resumed_bytes: int = 0
    refused_blocks: int = 0
    lost_blocks: int = 0


class Transfer:
    """Progress of one payload.

    Args:
        payload: lengths and leaf hashes that a verified release signs.
        limits: attempts, patience with rubbish, slowest rate.
        now_s: monotonic seconds at the start; all times are of one clock.
    """

    def __init__(self, payload: Payload, limits: Limits, now_s: float) -> None:
        self.payload = payload
        self.counts = Counts()
        self._limits = limits
        self._lost = bytearray(len(payload.leaves))
        self._have = bytearray(-(-len(payload.leaves) // 8))
        self._waiting: deque[int] = deque(range(len(payload.leaves)))
        self._making: dict[int, Leaf] = {}
        self._spare: list[bytearray] = []
        self._outstanding: dict[tuple[int, int], Block] = {}
        self._missing = len(payload.leaves)
        self._delivered = 0
        self._owed = 0  # answers to requests given up as late, which may still come
        self._offences = 0
        self._mark_s = now_s
        self._mark_bytes = 0
        self.window = Window(limits.window_blocks, limits.block_timeout_s, now_s)

    @property
    def complete(self) -> bool:
        """Whether every leaf was accepted."""
        return self._missing == 0

    @property
    def ready(self) -> bool:
        """Whether `next` has a block now."""
        if len(self._outstanding) >= self.window.blocks:
            return False
        self._skip()
        return bool(self._waiting) or any(leaf.wanted for leaf in self._making.values())

    @property
    def missing_bytes(self) -> int:
        """Bytes of the leaves still to be completed."""
        return sum(self._length(index) for index in range(len(self.payload.leaves)) if not self._has(index))

    def resume(self, index: int, data: bytes, *, claimed: bool = True) -> bool:
        """Take over a leaf that an earlier process may have written; False (and it is fetched, a second time if the
        map `claimed` it) when it is not what was signed. Only before the first request."""
        if self._has(index) or not self._matches(index, data):
            self._lost[index] = claimed
            return False
        self._keep(index)
        self.counts.resumed_bytes += len(data)
        return True

    def next(self, now_s: float) -> Block | None:
        """The next block to ask for, or None while the window is full or nothing is wanted."""
        if len(self._outstanding) >= self.window.blocks:
            return None
        index = self._next_leaf()
        if index is None:
            return None
        leaf = self._making[index]
        first, units = first_run(leaf.wanted, self.window.block_bytes // UNIT_BYTES)
        leaf.wanted &= ~mask(first, units)
        attempt = 1 + max(leaf.tries[first : first + units])
        leaf.tries[first : first + units] = bytes([attempt]) * units
        within = first * UNIT_BYTES
        length = min(units * UNIT_BYTES, self._length(index) - within)
        block = Block(index * LEAF_BYTES + within, length, attempt, now_s, self._delivered)
        leaf.asked.add((block.offset, length))
        self._outstanding[block.offset, length] = block
        return block

    def received(self, offset: int, data: bytes, now_s: float) -> Arrival:
        """A block arrived; the caller writes the leaf to disk when the verdict is `ACCEPTED`, and nothing otherwise.

        Any offset and any data are allowed. A block that was given up as late is as welcome as any other.

        Raises:
            TransferError: `transfer_corrupt` once the source sent more rubbish than `bad_blocks`, or one leaf came
                wrong as often as `block_attempts` allows.
        """
        index, within = divmod(offset, LEAF_BYTES)
        if within % UNIT_BYTES or not 0 <= index < len(self.payload.leaves):
            return self._refuse(Verdict.UNASKED, data)
        asked = self._outstanding.get((offset, len(data)))
        if self._has(index):
            return self._duplicate(asked, data)
        leaf = self._making.get(index)
        if leaf is None or not any(start == offset for start, _ in leaf.asked):
            return self._refuse(Verdict.UNASKED, data)
        if (offset, len(data)) not in leaf.asked:
            return self._wrong_length(offset, data)
        first, units = within // UNIT_BYTES, -(-len(data) // UNIT_BYTES)
        if not mask(first, units) & ~leaf.got:
            return self._duplicate(asked, data)
        self._answered(index, asked, data, now_s)
        return self._put(index, leaf, within, data)

    def late(self, block: Block, now_s: float) -> None:
        """An outstanding block did not come within `window.wait_s`: it is asked for again, in pieces if need be.

        Raises:
            TransferError: as `failed`, with `transfer_timeout`.
        """
        if (block.offset, block.length) in self._outstanding:
            self.counts.lost_blocks += 1
            self._owed += 1
            self.window.lost(block.length, block.asked_s, now_s)
            self.failed(block, Reason.TRANSFER_TIMEOUT)

    def too_large(self, block: Block, largest_bytes: int) -> None:
        """The source cannot send so much at once: `block` is asked for again in pieces of at most `largest_bytes`.

        Raises:
            TransferError: `block_too_large`: not even the smallest block gets through.
        """
        self.window.refused(largest_bytes)
        self.failed(block, Reason.BLOCK_TOO_LARGE)

    def failed(self, block: Block, reason: Reason) -> None:
        """An outstanding block will not come: it is wanted again, before all others.

        Raises:
            TransferError: `reason`, once a part of it was asked for `block_attempts` times.
        """
        if self._outstanding.pop((block.offset, block.length), None) is None:
            return
        index, within = divmod(block.offset, LEAF_BYTES)
        leaf = self._making.get(index)
        if leaf is None:
            return
        first, units = within // UNIT_BYTES, -(-block.length // UNIT_BYTES)
        leaf.wanted |= mask(first, units) & ~leaf.got
        self._check_attempts(leaf, first, units, index, reason)

    def release(self, now_s: float) -> None:
        """Forget all outstanding requests, attempts and what was learnt of the way, for a transfer that goes on over
        another source. Leaves in the making keep what they have."""
        self._outstanding.clear()
        for index, leaf in self._making.items():
            leaf.wanted = self._full(index) & ~leaf.got
            leaf.tries = bytearray(UNITS)
            leaf.asked.clear()
        self._owed = self._offences = 0
        self.window = Window(self._limits.window_blocks, self._limits.block_timeout_s, now_s)
        self._mark_s, self._mark_bytes = now_s, self._delivered

    def paused(self, for_s: float) -> None:
        """Nothing was asked for during `for_s` seconds because of us: the source is not to blame."""
        self._mark_s += for_s

    def check_rate(self, now_s: float) -> None:
        """Give up on a source that keeps the transfer alive with a trickle.

        Raises:
            TransferError: `transfer_timeout` when `stall_s` passed at less than `min_bytes_per_s`.
        """
        elapsed = now_s - self._mark_s
        if elapsed < self._limits.stall_s:
            return
        got = self._delivered - self._mark_bytes
        if got < self._limits.min_bytes_per_s * elapsed:
            raise TransferError(
                Reason.TRANSFER_TIMEOUT,
                f"{got} bytes in {elapsed:.0f} s is slower than this device waits for",
                hint="the update resumes where it stopped at the next check",
                retry=True,
            )
        self._mark_s = now_s
        self._mark_bytes = self._delivered

    def bitmap(self) -> bytes:
        """Content of the map file: a digest that binds it to this payload, then one bit per leaf."""
        return _map_digest(self.payload.sha256, bytes(self._have)) + self._have

    # -- leaves --------------------------------------------------------------------------------------------------------

    def _next_leaf(self) -> int | None:
        """A leaf that wants something: one in the making before a new one, so that few are open at a time."""
        for index, leaf in self._making.items():
            if leaf.wanted:
                return index
        self._skip()
        if not self._waiting:
            return None
        index = self._waiting.popleft()
        self._making[index] = Leaf(self._full(index))
        return index

    def _skip(self) -> None:
        while self._waiting and self._has(self._waiting[0]):
            self._waiting.popleft()

    def _put(self, index: int, leaf: Leaf, within: int, data: bytes) -> Arrival:
        """Add a right-sized block to its leaf; the leaf when that completes it."""
        length = self._length(index)
        whole = data if len(data) == length else self._assemble(leaf, within, data, length)
        if not whole:
            return Arrival(Verdict.KEPT)
        if not self._matches(index, whole):
            return self._spoilt(index, leaf)
        self._drop(index, leaf)
        self._keep(index)
        return Arrival(Verdict.ACCEPTED, index * LEAF_BYTES, whole)

    def _assemble(self, leaf: Leaf, within: int, data: bytes, length: int) -> bytes:
        """Copy a block into the leaf's buffer; the whole leaf once nothing is missing, else nothing."""
        if leaf.buffer is None:
            leaf.buffer = self._spare.pop() if self._spare else bytearray(LEAF_BYTES)
        leaf.buffer[within : within + len(data)] = data
        leaf.got |= mask(within // UNIT_BYTES, -(-len(data) // UNIT_BYTES))
        leaf.wanted &= ~leaf.got
        if leaf.got != (1 << -(-length // UNIT_BYTES)) - 1:
            return b""
        return bytes(memoryview(leaf.buffer)[:length])

    def _spoilt(self, index: int, leaf: Leaf) -> Arrival:
        """A complete leaf is not what was signed; which of its blocks is to blame nobody can say, so all come again."""
        self._lost[index] = 1
        leaf.got = 0
        leaf.wanted = self._full(index)
        for offset, length in self._outstanding:
            if offset // LEAF_BYTES == index:
                leaf.wanted &= ~mask(offset % LEAF_BYTES // UNIT_BYTES, -(-length // UNIT_BYTES))
        self._check_attempts(leaf, 0, UNITS, index, Reason.TRANSFER_CORRUPT)
        return self._refuse(Verdict.WRONG_HASH, b"")

    def _drop(self, index: int, leaf: Leaf) -> None:
        del self._making[index]
        if leaf.buffer is not None:
            self._spare.append(leaf.buffer)

    def _keep(self, index: int) -> None:
        self._have[index // 8] |= 1 << index % 8
        self._missing -= 1

    def _has(self, index: int) -> bool:
        return bool(self._have[index // 8] >> index % 8 & 1)

    def _full(self, index: int) -> int:
        return (1 << -(-self._length(index) // UNIT_BYTES)) - 1

    def _length(self, index: int) -> int:
        start, end = self.payload.leaf_range(index)
        return end - start

    def _matches(self, index: int, data: bytes) -> bool:
        return len(data) == self._length(index) and hashlib.sha256(data).hexdigest() == self.payload.leaves[index]

    # -- answers -------------------------------------------------------------------------------------------------------

    def _answered(self, index: int, asked: Block | None, data: bytes, now_s: float) -> None:
        self._delivered += len(data)
        if self._lost[index]:
            self.counts.refetched_bytes += len(data)
        else:
            self.counts.fetched_bytes += len(data)
        if asked is not None:  # an answer that was given up says nothing of the way as it is now
            del self._outstanding[asked.offset, asked.length]
            delivered = self._delivered - asked.delivered_bytes
            self.window.answered(asked.length, asked.asked_s, now_s, delivered, first=asked.attempt == 1)

    def _duplicate(self, asked: Block | None, data: bytes) -> Arrival:
        # asked for twice by ourselves, when the first answer was late
        if asked is not None:
            del self._outstanding[asked.offset, asked.length]
        elif self._owed:
            self._owed -= 1
        else:
            return self._refuse(Verdict.DUPLICATE, data)
        self.counts.duplicate_bytes += len(data)
        return Arrival(Verdict.DUPLICATE)

    def _wrong_length(self, offset: int, data: bytes) -> Arrival:
        for block in [block for block in self._outstanding.values() if block.offset == offset]:
            self.failed(block, Reason.TRANSFER_CORRUPT)
        return self._refuse(Verdict.WRONG_LENGTH, data)

    def _refuse(self, verdict: Verdict, data: bytes) -> Arrival:
        self.counts.duplicate_bytes += len(data)
        self.counts.refused_blocks += 1
        self._offences += 1
        if self._offences > self._limits.bad_blocks:
            raise TransferError(
                Reason.TRANSFER_CORRUPT,
                f"more than {self._limits.bad_blocks} wrong or unasked blocks of {self.payload.sha256[:12]}",
                hint="look at the block server or whoever stands between",
                retry=True,
            )
        return Arrival(verdict)

    def _check_attempts(self, leaf: Leaf, first: int, units: int, index: int, reason: Reason) -> None:
        attempts = max(leaf.tries[first : first + units])
        if attempts >= self._limits.block_attempts:
            raise TransferError(
                reason,
                f"block {index} of {self.payload.sha256[:12]} failed {attempts} times: {reason.value}",
                hint="the update resumes where it stopped at the next check",
                retry=True,
            )


def claimed(payload: Payload, data: bytes) -> list[int] | None:
    """Leaves that the map file `data` claims to be on disk; None when it is damaged or another payload's, and thus
    says nothing."""
    bits = data[_DIGEST_BYTES:]
    if len(bits) != -(-len(payload.leaves) // 8) or data[:_DIGEST_BYTES] != _map_digest(payload.sha256, bits):
        return None
    return [index for index in range(len(payload.leaves)) if bits[index // 8] >> index % 8 & 1]


def _map_digest(sha256: str, bits: bytes) -> bytes:
    return hashlib.sha256(b"edge-ota map v1\0" + sha256.encode() + bits).digest()
