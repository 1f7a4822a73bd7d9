"""Latencies in fixed logarithmic buckets: constant memory, quantiles within a known error, mergeable. Pure."""

from __future__ import annotations

import array
import math

BUCKETS_PER_OCTAVE = 8
OCTAVES = 27
"""From 1 µs to 2^27 µs (134 s); what is longer counts as longest."""


class Histogram:
    """Counts of values in microseconds. A quantile is off by at most 2^(1/16) - 1 = 4.5 % of itself."""

    __slots__ = ("_buckets", "count")

    def __init__(self) -> None:
        self._buckets = array.array("Q", bytes(8 * (BUCKETS_PER_OCTAVE * OCTAVES + 1)))
        self.count = 0

    def add(self, value_us: float) -> None:
        """Count one value; everything below 1 µs counts as 1 µs."""
        index = int(math.log2(value_us) * BUCKETS_PER_OCTAVE) if value_us > 1 else 0
        self._buckets[min(index, BUCKETS_PER_OCTAVE * OCTAVES)] += 1
        self.count += 1

    def quantile(self, share: float) -> float:
        """The value in µs below which a `share` (0 to 1) of the counted ones lie; 0.0 when nothing was counted."""
        rank = math.ceil(share * self.count)
        seen = 0
        for index, count in enumerate(self._buckets):
            seen += count
            if seen >= rank and count:
                # the geometric middle of the bucket
                return float(2.0 ** ((index + 0.5) / BUCKETS_PER_OCTAVE))
        return 0.0
