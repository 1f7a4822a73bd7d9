"""A directory with a repository in it (a USB stick, a mounted share, the publisher's own folder) as a transport.

Every name is built from validated parts and opened exactly: nothing is listed, followed or extracted, so a hostile
stick with links, devices, pipes or a million files only ever answers `not_found` or `unsafe_file`.
Layout: `metadata/`, `targets/`, `payloads/`, `devices/<id>/desired.json`, as FORMAT.md says.
Invariants: a path component is opened relative to its parent with O_NOFOLLOW; only regular files are read; never more
bytes than the caller allows; a stick that hangs keeps a thread waiting, never the daemon's loop.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ota.client.transports import layout
from ota.client.transports.failures import unreachable
from ota.client.transports.reading import aside
from ota.errors import Reason, TransferError, TrustError

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_IRREGULAR = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV})
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# non-blocking, so that a pipe put in the place of a file cannot stop the daemon
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class DirectoryTransport:
    """Implements `ota.client.ports.Transport` over a directory.

    Args:
        root: the repository's directory; itself may be a symbolic link or a mount point.
        device: id of this device, whose desired.json is read.
    """

    def __init__(self, root: Path, device: str) -> None:
        self._root = root
        self._desired = layout.desired_place(device)

    @property
    def name(self) -> str:
        """`directory`."""
        return "directory"

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        """`metadata/<version>.<role>.json`, or `metadata/timestamp.json`."""
        return await aside(self._whole, layout.metadata_place(role, version), max_bytes)

    async def desired(self, max_bytes: int) -> bytes:
        """`devices/<device>/desired.json`."""
        return await aside(self._whole, self._desired, max_bytes)

    async def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """`targets/<path>` with the hash before the file's name, as TUF's consistent snapshots lay it out."""
        return await aside(self._whole, layout.target_place(path, sha256), max_bytes)

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        """A piece of `payloads/<sha256>`; shorter at the end of the file."""
        return await aside(self._piece, layout.payload_place(sha256), offset, length)

    def _piece(self, place: layout.Place, offset: int, length: int) -> bytes:
        fd = self._open(place)
        try:
            return read_at(fd, length, offset)
        except OSError as e:
            raise unreachable(self._root, e) from e
        finally:
            close(fd)

    def _whole(self, parts: tuple[str, ...], max_bytes: int) -> bytes:
        fd = self._open(parts)
        try:
            data = b""
            while len(data) <= max_bytes and (chunk := os.read(fd, max_bytes + 1 - len(data))):
                data += chunk
        except OSError as e:
            raise unreachable(self._root, e) from e
        finally:
            close(fd)
        if len(data) > max_bytes:
            raise TrustError(
                Reason.METADATA_TOO_LARGE, f"{'/'.join(parts)} is larger than the {max_bytes} bytes allowed"
            )
        return data

    def _open(self, parts: tuple[str, ...]) -> int:
        """Descriptor of a regular file below the root; the caller closes it."""
        try:
            folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise unreachable(self._root, e) from e
        part = ""
        try:
            for part in parts[:-1]:
                below = os.open(part, _FOLDER, dir_fd=folder)
                close(folder)
                folder = below
            part = parts[-1]
            fd = os.open(part, _FILE, dir_fd=folder)
        except OSError as e:
            name = "/".join(parts)
            # a link in the place of a folder is reported as "not a directory"
            if e.errno in _IRREGULAR or _is_link(folder, part):
                raise _unsafe(name) from e
            if e.errno in _ABSENT:
                raise TransferError(Reason.NOT_FOUND, f"{name} is not in {self._root.name or self._root}") from e
            raise unreachable(self._root, e) from e
        finally:
            close(folder)
        try:
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
        except OSError as e:  # a file system in user space that ended
            close(fd)
            raise unreachable(self._root, e) from e
        if not regular:
            close(fd)
            raise _unsafe("/".join(parts))
        return fd


def read_at(fd: int, length: int, offset: int) -> bytes:
    """As `os.pread`, with fewer bytes only at the end of the file: a read that meets a bad sector gives what lies
    before it, and the next one the error."""
    data = b""
    while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data


def close(fd: int) -> None:
    """Close a descriptor that was only read from: where a stick was pulled, even that is answered with an error."""
    try:
        os.close(fd)
    except OSError:
        pass  # the descriptor is gone all the same, and what was read is judged by its hash


def _is_link(folder: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _unsafe(name: str) -> TransferError:
    return TransferError(
        Reason.UNSAFE_FILE,
        f"{name} is not a regular file",
        hint="copy the bundle again; links, pipes and devices are not read",
    )
