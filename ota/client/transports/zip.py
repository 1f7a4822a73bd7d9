"""A stored zip with a repository in it as a transport: looked up by exact names and read in place, never extracted.

A strict small reader of its own: it takes only what a packer of plain files writes (no compression, encryption, zip64,
comment, data descriptors, links, gaps or overlaps), so that nothing in the archive can be read in two ways, and no
archive costs more memory than its bounded directory. Checksums of the format are ignored: signatures decide.
Layout inside: that of FORMAT.md §1. Not here: writing one (`ota.publisher.sideload`).
Invariants: the file is opened for each call, so a stick can be unmounted at any time; one whose size or date changed
since its directory was read is refused; a read never leaves the range that the directory gives a name.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ota.client.transports import layout
from ota.client.transports.directory import close, read_at
from ota.client.transports.failures import unreachable
from ota.client.transports.reading import aside
from ota.errors import Reason, TransferError, TrustError

MAX_ENTRIES = 16384
MAX_DIRECTORY_BYTES = 4 << 20

# APPNOTE.TXT 6.3.10, paragraphs 4.3.7, 4.3.12 and 4.3.16
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = 0x04034B50, 0x02014B50, 0x06054B50
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*/?")
_MAX_NAME_BYTES = 255
_UTF8_NAMES = 0x0800  # the one flag that changes nothing for names of ASCII
_ENCRYPTED = 0x0001
_VERSION = 45  # 4.5 "needed to extract": what came later is compression and encryption
_ZIP64_EXTRA = 0x0001
_ZIP64_SIZE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored file: its length, where its local header starts, and where the next thing does."""

    name: str
    crc: int
    length: int
    offset: int
    end: int


@dataclass(frozen=True, slots=True)
class _Index:
    """The directory of an archive, and what the file looked like when it was read."""

    entries: dict[str, Entry]
    size: int
    mtime_ns: int


class ZipTransport:
    """Implements `ota.client.ports.Transport` over a stored zip file.

    Args:
        path: the archive; not a link.
        device: id of this device, whose desired.json is read.
    """

    def __init__(self, path: Path, device: str) -> None:
        self._path = path
        self._desired = layout.desired_place(device)
        self._index: _Index | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """`zip`."""
        return "zip"

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        """As the directory's; every method also raises TransferError `bad_archive` and `unsafe_file`."""
        return await aside(self._whole, layout.metadata_place(role, version), max_bytes)

    async def desired(self, max_bytes: int) -> bytes:
        """This device's document."""
        return await aside(self._whole, self._desired, max_bytes)

    async def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """A target under the name that consistent snapshots give it."""
        return await aside(self._whole, layout.target_place(path, sha256), max_bytes)

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        """A piece of a payload; shorter at its end."""
        return await aside(self._block, layout.payload_place(sha256), offset, length)

    def _whole(self, place: layout.Place, max_bytes: int) -> bytes:
        with self._opened() as (fd, index):
            entry = self._entry(index, place)
            if entry.length > max_bytes:
                raise TrustError(
                    Reason.METADATA_TOO_LARGE, f"{entry.name} is larger than the {max_bytes} bytes allowed"
                )
            return self._read(fd, _data_offset(fd, entry), entry.length)

    def _block(self, place: layout.Place, offset: int, length: int) -> bytes:
        with self._opened() as (fd, index):
            entry = self._entry(index, place)
            wanted = max(0, min(length, entry.length - offset))
            return self._read(fd, _data_offset(fd, entry) + offset, wanted) if wanted else b""

    def _entry(self, index: _Index, place: layout.Place) -> Entry:
        name = "/".join(place)
        entry = index.entries.get(name)
        if entry is None:
            raise TransferError(Reason.NOT_FOUND, f"{name} is not in {self._path.name}")
        return entry

    def _read(self, fd: int, offset: int, length: int) -> bytes:
        data = read_at(fd, length, offset)
        if len(data) < length:
            raise self._changed()
        return data

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, _Index]]:
        """The open archive and its directory, which is read once."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise unreachable(self._path, e) from e
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise TransferError(Reason.UNSAFE_FILE, f"{self._path.name} is not a regular file", hint=_AGAIN)
            with self._lock:
                if self._index is None:
                    entries = read_directory(fd, facts.st_size)
                    self._index = _Index(entries, facts.st_size, facts.st_mtime_ns)
                index = self._index
            if (facts.st_size, facts.st_mtime_ns) != (index.size, index.mtime_ns):
                raise self._changed()
            yield fd, index
        except OSError as e:
            raise unreachable(self._path, e) from e
        finally:
            close(fd)

    def _changed(self) -> TransferError:
        return TransferError(
            Reason.SOURCE_UNREACHABLE, f"{self._path} changed while it was read", hint="try again", retry=True
        )


_AGAIN = "write it again with edge-ota bundle; another packer has to store plain files uncompressed"


def read_directory(fd: int, size: int) -> dict[str, Entry]:
    """Every entry of the archive `fd` of `size` bytes, by name.

    Raises:
        TransferError: `bad_archive`.
        OSError: the file cannot be read.
    """
    count, length, start = _end_record(fd, size)
    data = read_at(fd, length, start)
    if len(data) != length:
        raise _bad("its directory is cut short")
    found: list[Entry] = []
    position = 0
    for _ in range(count):
        entry, position = _central(data, position)
        found.append(entry)
    if position != length:
        raise _bad("its directory has bytes that belong to no entry")
    return _arranged(found, start)


def _end_record(fd: int, size: int) -> tuple[int, int, int]:
    """Number of entries, length and offset of the directory, which ends where the last 22 bytes of the file begin."""
    data = read_at(fd, _END.size, max(0, size - _END.size))
    if len(data) != _END.size:
        raise _bad("it is too short for an archive")
    magic, disk, first_disk, here, count, length, start, comment = _END.unpack(data)
    if magic != _END_MAGIC or comment:
        raise _bad("it is cut short, has a comment or something behind its end, or is no zip file")
    if (disk, first_disk, here) != (0, 0, count):
        raise _bad("it is one part of several")
    if count == 0xFFFF or _ZIP64_SIZE in (length, start):
        raise _bad("it is a zip64 archive")
    if count > MAX_ENTRIES or length > MAX_DIRECTORY_BYTES:
        raise _bad(f"it has more than {MAX_ENTRIES} entries or {MAX_DIRECTORY_BYTES} bytes of directory")
    if start + length + _END.size != size:
        raise _bad("its directory is not where it says")
    return count, length, start


def _central(data: bytes, position: int) -> tuple[Entry, int]:
    """The entry at `position` of the directory, and where the next one starts."""
    try:
        fields = _CENTRAL.unpack_from(data, position)
    except struct.error as e:
        raise _bad("its directory is cut short") from e
    magic, _, needs, flags, method, _, _, crc, packed, length, names, extras, comment, disk, _, mode, offset = fields
    end = position + _CENTRAL.size + names + extras
    if magic != _CENTRAL_MAGIC or end > len(data) or comment or disk:
        raise _bad("its directory is damaged or has comments")
    name = _name(data[position + _CENTRAL.size : end - extras])
    if needs & 0xFF > _VERSION:
        raise _bad(f"{name} needs a reader of version {(needs & 0xFF) / 10}")
    _check_plain(name, flags, method, packed, length)
    kind = stat.S_IFMT(mode >> 16)
    if kind not in (0, stat.S_IFDIR if name.endswith("/") else stat.S_IFREG) or (name.endswith("/") and length):
        raise _bad(f"{name} is a link or another special file")
    _check_extras(name, data[end - extras : end])
    return Entry(name, crc, length, offset, 0), end


def _name(raw: bytes) -> str:
    name = raw.decode("ascii", "replace")
    if len(raw) > _MAX_NAME_BYTES or not _NAME.fullmatch(name) or ".." in name:
        raise _bad(f"the name {name[:80]!r} in it is not allowed")
    return name


def _check_plain(name: str, flags: int, method: int, packed: int, length: int) -> None:
    if flags & _ENCRYPTED:
        raise _bad(f"{name} is encrypted")
    if flags & ~_UTF8_NAMES:
        raise _bad(f"{name} has flags that are not understood ({flags:#06x})")
    if _ZIP64_SIZE in (packed, length):
        raise _bad(f"{name} is a zip64 entry")
    if method or packed != length:
        raise _bad(f"{name} is compressed")


def _check_extras(name: str, data: bytes) -> None:
    """Extra fields say nothing that is used, and none may claim other sizes."""
    while data:
        if len(data) < 4:
            raise _bad(f"{name} has a damaged extra field")
        kind, length = struct.unpack_from("<HH", data)
        if kind == _ZIP64_EXTRA or 4 + length > len(data):
            raise _bad(f"{name} is a zip64 entry, or has a damaged extra field")
        data = data[4 + length :]


def _arranged(found: list[Entry], start: int) -> dict[str, Entry]:
    """The entries by name, each with its end; they fill the file up to its directory, which starts at `start`."""
    entries: dict[str, Entry] = {}
    found.sort(key=lambda entry: entry.offset)
    if start and (not found or found[0].offset):
        raise _bad("it has something before its first entry")
    for entry, after in zip(found, [*(entry.offset for entry in found[1:]), start], strict=True):
        slack = after - (entry.offset + _LOCAL.size + len(entry.name) + entry.length)
        if not 0 <= slack <= 0xFFFF:
            raise _bad(f"{entry.name} overlaps something else, or is followed by a gap")
        if entry.name in entries:
            raise _bad(f"{entry.name} is in it twice")
        entries[entry.name] = Entry(entry.name, entry.crc, entry.length, entry.offset, after)
    return entries


def _data_offset(fd: int, entry: Entry) -> int:
    """Where the bytes of `entry` begin, after a local header that says the same as the directory."""
    data = read_at(fd, _LOCAL.size + len(entry.name), entry.offset)
    if len(data) != _LOCAL.size + len(entry.name):
        raise _bad(f"the header of {entry.name} is cut short")
    magic, _, flags, method, _, _, crc, packed, length, names, extras = _LOCAL.unpack_from(data)
    if magic != _LOCAL_MAGIC or names != len(entry.name) or data[_LOCAL.size :] != entry.name.encode():
        raise _bad(f"the header of {entry.name} names something else")
    _check_plain(entry.name, flags, method, packed, length)
    begin: int = entry.offset + len(data) + extras
    if (crc, length) != (entry.crc, entry.length) or begin + length != entry.end:
        raise _bad(f"the header of {entry.name} contradicts the directory")
    return begin


def _bad(why: str) -> TransferError:
    return TransferError(Reason.BAD_ARCHIVE, f"the archive is refused: {why}", hint=_AGAIN)
