"""Which blocks of a payload to ask for next, and what becomes of those that arrive: sans-IO, no clock of its own.

One block is one leaf: 64 KiB whose SHA-256 the release signs, so nothing is kept that was not checked, from any source,
and a transfer may change sources half-way. Not here: sockets and tasks (`fetch`), files (`fetch`, through `fsops`).
Invariants: at most `window_blocks` blocks are outstanding; a block is written once; a bitmap read from disk is a claim,
not a fact: every block it claims is hashed again before it counts.
"""

from __future__ import annotations

import enum
import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ota.client.limits import Limits
from ota.errors import Reason, TransferError
from ota.release import LEAF_BYTES, Payload

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Block:
    """One request: `length` bytes at `offset`; `attempt` counts from 1."""

    index: int
    offset: int
    length: int
    attempt: int


class Verdict(enum.Enum):
    """What became of a block that arrived."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    UNASKED = "unasked"
    WRONG_LENGTH = "wrong_length"
    WRONG_HASH = "wrong_hash"


@dataclass(slots=True)
class Counts:
    """Bytes by purpose and blocks by verdict, of one transfer in one process."""

    fetched_bytes: int = 0
    refetched_bytes: int = 0
    duplicate_bytes: int = 0
    resumed_bytes: int = 0
    refused_blocks: int = 0


class Transfer:
    """Progress of one payload.

    Args:
        payload: lengths and leaf hashes that a verified release signs.
        limits: window, attempts, rate.
        now_s: monotonic seconds at the start.
    """

    def __init__(self, payload: Payload, limits: Limits, now_s: float) -> None:
        self.payload = payload
        self.counts = Counts()
        self._limits = limits
        self._have = bytearray(len(payload.leaves))
        self._lost = bytearray(len(payload.leaves))
        self._attempts = [0] * len(payload.leaves)
        self._outstanding: set[int] = set()
        self._wanted: deque[int] = deque(range(len(payload.leaves)))
        self._missing = len(payload.leaves)
        self._mark_s = now_s
        self._mark_bytes = 0

    @property
    def complete(self) -> bool:
        """Whether every block was accepted."""
        return self._missing == 0

    @property
    def missing_bytes(self) -> int:
        """Bytes still to be fetched."""
        return sum(self._length(index) for index, have in enumerate(self._have) if not have)

    def resume(self, index: int, data: bytes, *, claimed: bool = True) -> bool:
        """Take over a block that an earlier process may have written; False (and it is fetched, a second time if the
        map `claimed` it) when it is not what was signed. Only before the first request."""
        if self._have[index] or not self._matches(index, data):
            self._lost[index] = claimed
            return False
        self._have[index] = 1
        self._missing -= 1
        self.counts.resumed_bytes += len(data)
        return True

    def requests(self) -> Iterator[Block]:
        """Blocks to ask for now, until the window is full."""
        while self._wanted and len(self._outstanding) < self._limits.window_blocks:
            index = self._wanted.popleft()
            if self._have[index]:
                continue
            self._outstanding.add(index)
            self._attempts[index] += 1
            yield Block(index, index * LEAF_BYTES, self._length(index), self._attempts[index])

    def received(self, offset: int, data: bytes) -> Verdict:
        """A block arrived; the caller writes it to disk when this answers `ACCEPTED`, and ignores it otherwise.

        Any offset and any data are allowed.

        Raises:
            TransferError: `transfer_corrupt` once the source sent more rubbish than `bad_blocks`, or one block came
                wrong as often as `block_attempts` allows.
        """
        index, rest = divmod(offset, LEAF_BYTES)
        if rest or not 0 <= index < len(self._have):
            return self._refuse(Verdict.UNASKED, data)
        if self._have[index]:
            return self._refuse(Verdict.DUPLICATE, data)
        if index not in self._outstanding:
            return self._refuse(Verdict.UNASKED, data)
        if not self._matches(index, data):
            self.again(index, Reason.TRANSFER_CORRUPT)
            wrong_length = len(data) != self._length(index)
            self.counts.refetched_bytes += len(data)
            return self._refuse(Verdict.WRONG_LENGTH if wrong_length else Verdict.WRONG_HASH, b"")
        self._outstanding.discard(index)
        self._have[index] = 1
        self._missing -= 1
        if self._lost[index]:
            self.counts.refetched_bytes += len(data)
        else:
            self.counts.fetched_bytes += len(data)
        return Verdict.ACCEPTED

    def again(self, index: int, reason: Reason) -> None:
        """An outstanding block did not come, or came wrong: it is wanted again, before all others.

        Raises:
            TransferError: `reason`, once the block was asked for `block_attempts` times.
        """
        if index not in self._outstanding:
            return
        self._outstanding.discard(index)
        if self._attempts[index] >= self._limits.block_attempts:
            raise TransferError(
                reason,
                f"block {index} of {self.payload.sha256[:12]} failed {self._attempts[index]} times: {reason.value}",
                hint="the update resumes where it stopped at the next check",
                retry=True,
            )
        self._wanted.appendleft(index)

    def release(self) -> None:
        """Forget all outstanding requests and attempts, for a transfer that goes on over another source."""
        self._wanted = deque(index for index, have in enumerate(self._have) if not have)
        self._outstanding.clear()
        self._attempts = [0] * len(self._have)
        self.counts.refused_blocks = 0

    def check_rate(self, now_s: float) -> None:
        """Give up on a source that keeps the transfer alive with a trickle.

        Raises:
            TransferError: `transfer_timeout` when `stall_s` passed at less than `min_bytes_per_s`.
        """
        elapsed = now_s - self._mark_s
        if elapsed < self._limits.stall_s:
            return
        total = self.counts.fetched_bytes + self.counts.refetched_bytes
        if total - self._mark_bytes < self._limits.min_bytes_per_s * elapsed:
            raise TransferError(
                Reason.TRANSFER_TIMEOUT,
                f"{total - self._mark_bytes} bytes in {elapsed:.0f} s is slower than this device waits for",
                hint="the update resumes where it stopped at the next check",
                retry=True,
            )
        self._mark_s = now_s
        self._mark_bytes = total

    def bitmap(self) -> bytes:
        """Content of the map file: a digest that binds it to this payload, then one bit per block."""
        bits = bytearray(-(-len(self._have) // 8))
        for index, have in enumerate(self._have):
            if have:
                bits[index // 8] |= 1 << index % 8
        return _map_digest(self.payload.sha256, bytes(bits)) + bytes(bits)

    def _refuse(self, verdict: Verdict, data: bytes) -> Verdict:
        self.counts.duplicate_bytes += len(data)
        self.counts.refused_blocks += 1
        if self.counts.refused_blocks > self._limits.bad_blocks:
            raise TransferError(
                Reason.TRANSFER_CORRUPT,
                f"more than {self._limits.bad_blocks} wrong or unasked blocks of {self.payload.sha256[:12]}",
                hint="look at the block server or whoever stands between",
                retry=True,
            )
        return verdict

    def _length(self, index: int) -> int:
        start, end = self.payload.leaf_range(index)
        return end - start

    def _matches(self, index: int, data: bytes) -> bool:
        return len(data) == self._length(index) and hashlib.sha256(data).hexdigest() == self.payload.leaves[index]


def claimed(payload: Payload, data: bytes) -> list[int] | None:
    """Blocks that the map file `data` claims to be on disk; None when it is damaged or another payload's, and thus
    says nothing."""
    bits = data[_DIGEST_BYTES:]
    if len(bits) != -(-len(payload.leaves) // 8) or data[:_DIGEST_BYTES] != _map_digest(payload.sha256, bits):
        return None
    return [index for index in range(len(payload.leaves)) if bits[index // 8] >> index % 8 & 1]


def _map_digest(sha256: str, bits: bytes) -> bytes:
    return hashlib.sha256(b"edge-ota map v1\0" + sha256.encode() + bits).digest()
