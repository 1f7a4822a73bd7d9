"""Whole JPEG pictures out of a stream of bytes, one behind the other, as cameras' programs write them.

It decodes nothing and copies nothing but the rest of a buffer to its front. ITU-T T.81 B.1: a picture is SOI (FFD8),
segments with their lengths, a scan in which FF is followed by 00 or a restart marker only, EOI (FFD9); the segments are
walked, so that a thumbnail inside one is not taken for the picture.
Invariants: never more than the limit is held; after nonsense or a picture without an end the next SOI begins anew.
"""

from __future__ import annotations

from agent.errors import Reason, SourceError

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
# TEM and the restart markers have no length
_BARE = (0x01, *range(0xD0, 0xD8))


class JpegStream:
    """Bytes that came, and the pictures in them.

    Args:
        limit: most bytes of one picture.

    Attributes:
        skipped: how many bytes belonged to no whole picture.
    """

    def __init__(self, limit: int) -> None:
        self._data = bytearray(limit)
        self._view = memoryview(self._data)
        self._begin = self._scan = self._end = 0
        self._found = self._in_scan = False
        self.skipped = 0

    def space(self) -> memoryview:
        """Where the next bytes go; views that `next` gave become invalid.

        Raises:
            SourceError: `source_unreadable`: a picture is larger than the limit.
        """
        if self._begin:
            held = self._end - self._begin
            self._view[:held] = self._view[self._begin : self._end]
            self._scan -= self._begin
            self._begin, self._end = 0, held
        if self._end == len(self._data):
            raise SourceError(
                Reason.SOURCE_UNREADABLE,
                f"no JPEG picture within {len(self._data)} bytes",
                hint="let the command write MJPEG: JPEG pictures without a container",
            )
        return self._view[self._end :]

    def filled(self, count: int) -> None:
        """So many bytes were written into `space()`."""
        self._end += count

    def next(self) -> memoryview | None:
        """The next whole picture; None when more bytes are needed. Valid until `space` is called."""
        while self._find_begin() and self._find_scan():
            again = self._data.find(b"\xff\xd8", self._scan, self._end)
            end = self._data.find(b"\xff\xd9", self._scan, again if again >= 0 else self._end)
            if end < 0 <= again:  # this one has lost its end
                self._drop(again)
            elif end < 0:
                self._scan = max(self._scan, self._end - 1)
                return None
            else:
                picture = self._view[self._begin : end + 2]
                self._restart(end + 2)
                return picture
        return None

    def _find_begin(self) -> bool:
        if not self._found:
            at = self._data.find(b"\xff\xd8", self._begin, self._end)
            if at < 0:
                self._drop(max(self._begin, self._end - 1))  # its first byte may be there
                return False
            self._drop(at)
            self._found, self._scan = True, at + 2
        return True

    def _find_scan(self) -> bool:
        """Walk the segments up to the picture's data; False when more bytes are needed."""
        data = self._data
        while not self._in_scan:
            if self._scan + 4 > self._end:
                return False
            marker = data[self._scan + 1]
            if data[self._scan] != 0xFF or marker in (0x00, _SOI, _EOI):
                self._drop(self._begin + 2)
                if not self._find_begin():
                    return False
            elif marker == 0xFF:
                self._scan += 1
            elif marker in _BARE:
                self._scan += 2
            else:
                self._scan += 2 + int.from_bytes(data[self._scan + 2 : self._scan + 4], "big")
                self._in_scan = marker == _SOS
        return self._scan <= self._end

    def _drop(self, to: int) -> None:
        self.skipped += to - self._begin
        self._restart(to)

    def _restart(self, at: int) -> None:
        self._begin = self._scan = at
        self._found = self._in_scan = False
