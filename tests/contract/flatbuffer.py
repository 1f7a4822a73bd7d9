"""Writes flatbuffers, with no library: back to front, so that whatever a table points at is there before it.

A position is a distance from the end of the file. Numbers are named by their `struct` code.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Where something lies that a table or a list may point at."""

    position: int


Field = Place | tuple[str, float]


class Flatbuffer:
    """One file as it grows towards its front."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def _put(self, data: bytes, align: int) -> None:
        """Put `data` in front, so that its first byte is aligned."""
        pad = -(self._size + len(data)) % align
        self._parts += [bytes(pad), data]
        self._size += pad + len(data)

    def _point(self, to: Place) -> None:
        self._put(bytes(-self._size % 4), 1)
        self._put(struct.pack("<I", self._size + 4 - to.position), 4)

    def numbers(self, code: str, items: Sequence[float], align: int = 8) -> Place:
        """A list of numbers."""
        self._put(struct.pack(f"<{len(items)}{code}", *items), align)
        return self._counted(len(items))

    def data(self, content: bytes) -> Place:
        """A list of bytes, aligned for whatever number they are."""
        self._put(content, 16)
        return self._counted(len(content))

    def text(self, content: str) -> Place:
        """A string, with the zero behind it that readers of C expect."""
        self._put(content.encode() + b"\0", 4)
        return self._counted(len(content.encode()))

    def places(self, items: Sequence[Place]) -> Place:
        """A list of tables."""
        self._put(b"", 4)
        for item in reversed(items):
            self._point(item)
        return self._counted(len(items))

    def _counted(self, count: int) -> Place:
        self._put(struct.pack("<I", count), 4)
        return Place(self._size)

    def table(self, fields: Mapping[int, Field]) -> Place:
        """A table of fields by their number."""
        end, at = self._size, {}
        for slot, value in fields.items():
            if isinstance(value, Place):
                self._point(value)
            else:
                code, number = value
                self._put(struct.pack(f"<{code}", number), struct.calcsize(code))
            at[slot] = self._size
        self._put(b"", 4)
        start = self._size + 4
        slots = [start - at[slot] if slot in at else 0 for slot in range(max(at, default=-1) + 1)]
        layout = struct.pack(f"<{2 + len(slots)}H", 4 + 2 * len(slots), start - end, *slots)
        self._put(struct.pack("<i", len(layout)), 4)
        self._put(layout, 2)
        return Place(start)

    def file(self, root: Place, kind: bytes) -> bytes:
        """All of it, with `root` as its first table."""
        pad = -(self._size + 8) % 16
        self._put(bytes(pad), 1)
        self._put(kind, 1)
        self._put(struct.pack("<I", self._size + 4 - root.position), 1)
        return b"".join(reversed(self._parts))
