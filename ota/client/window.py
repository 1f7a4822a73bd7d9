"""How many blocks of which size may be outstanding, and how long silence may last: learnt from answers, sans-IO.

The rule is window × block ≥ 2 × bandwidth × delay: one such product travels, the other waits at the narrowest place, so
that the link never runs dry and never holds up anything else for long. Bandwidth is the best delivery rate seen
lately, delay the shortest answer (the estimators of BBR, draft-cardwell-iccrg-bbr-congestion-control, without its
phases). Blocks are fractions of a signed leaf; their size falls when blocks are lost or a broker does not carry them,
and rises again after a calm. Not here: which block is next (`transfer`); who waits (`fetch`).
Invariants: 1 ≤ `blocks` ≤ the limit; `block_bytes` is one of `SIZES`; one loss per round trip counts.
"""

from __future__ import annotations

from ota.errors import Reason, TransferError
from ota.release import LEAF_BYTES

UNIT_BYTES = 4096
SIZES = (4096, 8192, 16384, 32768, LEAF_BYTES)
"""Sizes of a block in bytes: a leaf, its half, … down to a sixteenth."""

_FIRST_BLOCKS = 2
_FIRST_SIZE = 2
_FIRST_WAIT_S = 4.0
_SHORTEST_WAIT_S = 1.0
# a block that takes the link no longer than this delays nobody
_UNNOTICED_S = 0.1
_FADING = 0.99
_SLOWER = 0.7
_EPOCH_S = 30.0
# answers without a loss before a size that was lost is tried again: one that once worked, one that never did
_CALM_PROVEN, _CALM_UNPROVEN, _CALM_MOST = 16, 512, 4096


class Window:
    """What one transfer over one transport may have outstanding.

    Args:
        most_blocks: upper bound of `blocks`.
        longest_wait_s: upper bound of `wait_s`.
        now_s: monotonic seconds at the start.

    Attributes:
        blocks: blocks that may be outstanding.
    """

    def __init__(self, most_blocks: int, longest_wait_s: float, now_s: float) -> None:
        self._most_blocks = most_blocks
        self._longest_wait_s = longest_wait_s
        self.blocks = min(_FIRST_BLOCKS, most_blocks)
        self._size = _FIRST_SIZE
        self._ceiling = len(SIZES) - 1
        self._hard_ceiling = len(SIZES) - 1
        self._proven = -1
        self._calm = 0
        self._calm_needed = _CALM_PROVEN
        self._rate = 0.0
        self._shortest_s = 0.0
        self._epoch_shortest_s = 0.0
        self._epoch_s = now_s
        self._smooth_s = 0.0
        self._deviation_s = 0.0
        self._backoff = 1.0
        self._cut_s = now_s

    @property
    def block_bytes(self) -> int:
        """Size of the next block."""
        return SIZES[self._size]

    @property
    def wait_s(self) -> float:
        """Silence after which a block counts as lost."""
        if not self._smooth_s:
            return min(self._longest_wait_s, _FIRST_WAIT_S * self._backoff)
        # twice the smoothed time, because a window that grows makes the next answers slower than the last
        wait_s = max(_SHORTEST_WAIT_S, 2 * self._smooth_s + 4 * self._deviation_s)
        return min(self._longest_wait_s, wait_s * self._backoff)

    def answered(self, length: int, asked_s: float, now_s: float, delivered_bytes: int, *, first: bool) -> None:
        """A block of `length` bytes, asked for at `asked_s`, came.

        Args:
            delivered_bytes: what came in all since it was asked for, itself included.
            first: whether it was asked for once; nobody knows which request a repeated one answers (Karn).
        """
        self._proven = max(self._proven, _index(length))
        self._calm += 1
        if self._calm >= self._calm_needed and self._ceiling < self._hard_ceiling:
            self._ceiling += 1
            self._calm = 0
        if asked_s >= self._cut_s:
            self._backoff = 1.0
        took_s = now_s - asked_s
        if first and took_s > 0:
            self._learn(took_s, delivered_bytes / took_s, now_s)
        self._fit()

    def lost(self, length: int, asked_s: float, now_s: float) -> None:
        """A block of `length` bytes, asked for at `asked_s`, did not come within `wait_s`."""
        if asked_s < self._cut_s:
            return  # what was under way when the last loss was noticed is the same loss
        self._cut_s = now_s
        size = _index(length)
        self._calm = 0
        if size > self._proven >= 0:
            # this way has never carried so much at once: the size is to blame, not the link
            self._ceiling = self._proven
            self._calm_needed = min(_CALM_MOST, max(_CALM_UNPROVEN, 2 * self._calm_needed))
        else:
            self._ceiling = max(0, min(self._ceiling, size) - 1)
            self._calm_needed = min(_CALM_MOST, 2 * self._calm_needed) if size == 0 else _CALM_PROVEN
            self._rate *= _SLOWER
            self._backoff = min(2 * self._backoff, 16.0)
            self.blocks = max(1, self.blocks // 2)
        self._fit()

    def refused(self, largest_bytes: int) -> None:
        """The source says that nothing above `largest_bytes` gets through.

        Raises:
            TransferError: `block_too_large`: not even the smallest block does.
        """
        if largest_bytes < SIZES[0]:
            raise TransferError(
                Reason.BLOCK_TOO_LARGE,
                f"the broker carries at most {largest_bytes} bytes of a payload, the smallest block has {SIZES[0]}",
                hint="raise max_packet_size and message_size_limit of the broker",
            )
        self._hard_ceiling = _index(largest_bytes)
        self._ceiling = min(self._ceiling, self._hard_ceiling)
        self._fit()

    def _learn(self, took_s: float, rate: float, now_s: float) -> None:
        if not self._smooth_s:
            self._smooth_s, self._deviation_s = took_s, took_s / 2
            self._shortest_s = self._epoch_shortest_s = took_s
            self._epoch_s = now_s
        else:
            self._deviation_s += (abs(self._smooth_s - took_s) - self._deviation_s) / 4
            self._smooth_s += (took_s - self._smooth_s) / 8
        self._rate = max(rate, self._rate * _FADING)
        self._shortest_s = min(self._shortest_s, took_s)
        self._epoch_shortest_s = min(self._epoch_shortest_s, took_s)
        if now_s - self._epoch_s >= _EPOCH_S:
            # the way may have become longer; half, because our own window waits in what is measured
            self._shortest_s = max(self._shortest_s, self._epoch_shortest_s / 2)
            self._epoch_shortest_s, self._epoch_s = took_s, now_s

    def _fit(self) -> None:
        """Choose size and number for 2 × bandwidth × delay bytes."""
        if not self._rate:
            self._size = min(self._size, self._ceiling)
            return
        wanted = 2 * self._rate * self._shortest_s
        self._size = min(self._ceiling, _index(int(max(wanted / 2, self._rate * _UNNOTICED_S))))
        least = 1 if self._backoff > 1 else 2
        self.blocks = max(1, min(self._most_blocks, max(least, -int(-wanted // self.block_bytes))))


def _index(length: int) -> int:
    """Place in `SIZES` of the largest size within `length`, 0 when none is."""
    return max((place for place, size in enumerate(SIZES) if size <= length), default=0)
