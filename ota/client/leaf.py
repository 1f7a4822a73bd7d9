"""One leaf of a payload in the making: which of its sixteen units of 4 KiB came, which are wanted, what was asked for.

Bit sets in plain integers, unit 0 lowest. Not here: what a leaf must hash to (`transfer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ota.client.window import UNIT_BYTES
from ota.release import LEAF_BYTES

UNITS = LEAF_BYTES // UNIT_BYTES


@dataclass(slots=True)
class Leaf:
    """`wanted` and `got` are bit sets, `tries` how often each unit was asked for, `asked` every (offset, length) that
    was; `buffer` is LEAF_BYTES long, and None until a block came that is not the whole leaf."""

    wanted: int
    got: int = 0
    tries: bytearray = field(default_factory=lambda: bytearray(UNITS))
    asked: set[tuple[int, int]] = field(default_factory=set)
    buffer: bytearray | None = None


def mask(first: int, units: int) -> int:
    """The set of `units` units from `first` on."""
    return ((1 << units) - 1) << first


def first_run(wanted: int, most: int) -> tuple[int, int]:
    """First unit of a set that is not empty, and how many from it on are in the set up to the next multiple of
    `most`."""
    first = (wanted & -wanted).bit_length() - 1
    end = first + 1
    while end % most and wanted >> end & 1:
        end += 1
    return first, end - first
