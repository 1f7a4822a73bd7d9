"""A directory with a repository in it (a USB stick, a mounted share, the publisher's own folder) as a transport.

Every name is built from validated parts and opened exactly: nothing is listed, followed or extracted, so a hostile
stick with links, devices, pipes or a million files only ever answers `not_found` or `unsafe_file`.
Layout: `metadata/`, `targets/`, `payloads/`, `devices/<id>/desired.json`, as FORMAT.md says.
Invariants: a path component is opened relative to its parent with O_NOFOLLOW; only regular files are read; never more
bytes than the caller allows.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from ota.errors import OtaError, Reason, TransferError, TrustError
from ota.release import DEVICE_PATTERN, check_target_name

_ROLE = re.compile(r"root|timestamp|snapshot|targets|release-[a-z0-9][a-z0-9-]{0,31}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
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
        if not DEVICE_PATTERN.fullmatch(device):
            raise OtaError(Reason.BAD_TARGET_NAME, f"device id {device[:60]!r} is not allowed")
        self._root = root
        self._device = device

    @property
    def name(self) -> str:
        """`directory`."""
        return "directory"

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        """`metadata/<version>.<role>.json`, or `metadata/timestamp.json`."""
        if not _ROLE.fullmatch(role):
            raise OtaError(Reason.BAD_TARGET_NAME, f"role {role[:60]!r} is not allowed")
        prefix = "" if version is None else f"{int(version)}."
        return self._whole(("metadata", f"{prefix}{role}.json"), max_bytes)

    async def desired(self, max_bytes: int) -> bytes:
        """`devices/<device>/desired.json`."""
        return self._whole(("devices", self._device, "desired.json"), max_bytes)

    async def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """`targets/<path>` with the hash before the file's name, as TUF's consistent snapshots lay it out."""
        *folders, name = check_target_name(path).split("/")
        return self._whole(("targets", *folders, f"{_hex(sha256)}.{name}"), max_bytes)

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        """A piece of `payloads/<sha256>`; shorter at the end of the file."""
        fd = self._open(("payloads", _hex(sha256)))
        try:
            return os.pread(fd, length, offset)
        except OSError as e:
            raise self._unreachable(e) from e
        finally:
            os.close(fd)

    def _whole(self, parts: tuple[str, ...], max_bytes: int) -> bytes:
        fd = self._open(parts)
        try:
            data = b""
            while len(data) <= max_bytes and (chunk := os.read(fd, max_bytes + 1 - len(data))):
                data += chunk
        except OSError as e:
            raise self._unreachable(e) from e
        finally:
            os.close(fd)
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
            raise self._unreachable(e) from e
        part = ""
        try:
            for part in parts[:-1]:
                below = os.open(part, _FOLDER, dir_fd=folder)
                os.close(folder)
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
            raise self._unreachable(e) from e
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise _unsafe("/".join(parts))
        return fd

    def _unreachable(self, error: OSError) -> TransferError:
        return TransferError(
            Reason.SOURCE_UNREACHABLE,
            f"{self._root}: {error.strerror}",
            hint="is the stick still plugged in and mounted?",
            retry=True,
        )


def _is_link(folder: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _hex(sha256: str) -> str:
    if not _HEX64.fullmatch(sha256):
        raise OtaError(Reason.BAD_TARGET_NAME, f"{sha256[:80]!r} is not a SHA-256")
    return sha256


def _unsafe(name: str) -> TransferError:
    return TransferError(
        Reason.UNSAFE_FILE,
        f"{name} is not a regular file",
        hint="copy the bundle again; links, pipes and devices are not read",
    )
