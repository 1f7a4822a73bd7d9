"""Durable files of the repository: the one place of the publisher that writes, renames and syncs.

Invariants: a reader sees the old file or the whole new one, never a part; after `write_atomic` returned, a power cut
does not lose the file; what is read is a regular file and never a link.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ota.errors import PublishError, Reason

SECRET_MODE = 0o600
PUBLIC_MODE = 0o644
SECRET_DIRECTORY_MODE = 0o700
PUBLIC_DIRECTORY_MODE = 0o755
# a listener or a publish in cron holds the lock for moments, and nobody should be sent away for that; a device that
# asks the listener waits for ten seconds in all
LOCK_WAIT_S = 4.0


def make_directory(path: Path, mode: int = PUBLIC_DIRECTORY_MODE) -> None:
    """Create `path` and its missing parents, each new one with `mode` and on disk before this returns.

    Raises:
        PublishError: `io_error` or `no_space`.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_directory(path.parent, mode)
    try:
        path.mkdir(exist_ok=True)
        path.chmod(mode)  # mkdir's own mode is cut by the umask
        _sync_directory(path.parent)
    except OSError as e:
        raise _io_error(f"cannot create {path}", e) from e


def write_atomic(path: Path, data: bytes, mode: int = PUBLIC_MODE) -> None:
    """Replace or create `path` with `data`: temporary file, fsync, rename, fsync of the directory.

    Raises:
        PublishError: `io_error` or `no_space`; `path` is then unchanged and no temporary file is left.
    """
    temporary: str | None = None
    try:
        fd, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
        temporary = None
        _sync_directory(path.parent)
    except OSError as e:
        raise _io_error(f"cannot write {path}", e) from e
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet, on whatever file system a stick has: without a temporary name, and
    without modes, which FAT does not take. Durable when this returns, with the directories that it needed; a cut
    before leaves nothing, or a part.

    Raises:
        PublishError: `io_error` or `no_space`; the file is gone again if the stick allows.
    """
    try:
        missing = [parent for parent in path.parents if not parent.is_dir()]
        for parent in reversed(missing):
            parent.mkdir()
            _sync_directory(parent.parent, anywhere=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PUBLIC_MODE)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            _sync_directory(path.parent, anywhere=True)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
    except OSError as e:
        raise _io_error(f"cannot write {path}", e) from e


def take_back(paths: Sequence[Path], root: Path) -> None:
    """Remove files that `write_new` wrote below `root`, which was empty, and the directories that it made, as far as
    the stick allows; `root` itself stays."""
    for path in paths:
        with suppress(OSError):
            path.unlink()
    for folder, _, _ in os.walk(root, topdown=False):
        if Path(folder) != root:
            with suppress(OSError):
                os.rmdir(folder)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that does not exist yet, to be written in pieces; durable afterwards, removed again if that fails.

    Raises:
        PublishError: `io_error` or `no_space`.
    """
    try:
        with path.open("xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                _sync_directory(path.parent, anywhere=True)
            except BaseException:
                with suppress(OSError):
                    path.unlink()
                raise
    except OSError as e:
        raise _io_error(f"cannot write {path}", e) from e


def rename(path: Path, to: Path) -> None:
    """Move a file within the repository, durably.

    Raises:
        PublishError: `io_error`.
    """
    try:
        os.rename(path, to)
        _sync_directory(to.parent)
        _sync_directory(path.parent)
    except OSError as e:
        raise _io_error(f"cannot move {path} to {to}", e) from e


def remove(path: Path) -> None:
    """Unlink `path` if it is there.

    Raises:
        PublishError: `io_error`.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        raise _io_error(f"cannot remove {path}", e) from e


def open_regular(path: Path) -> tuple[int, int] | None:
    """Descriptor (owned by the caller) and length of the regular file `path`, or None when it is not there.

    Raises:
        PublishError: `unsafe_file` for a link, a directory or a device; `io_error` otherwise.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise PublishError(Reason.UNSAFE_FILE, f"{path} is a symbolic link") from e
        raise _io_error(f"cannot open {path}", e) from e
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise PublishError(Reason.UNSAFE_FILE, f"{path} is not a regular file")
    return fd, status.st_size


def read_regular(path: Path, max_bytes: int) -> bytes | None:
    """Content of the regular file `path`, or None when it is not there.

    Raises:
        PublishError: `unsafe_file`, also when it is larger than `max_bytes`; `io_error`.
    """
    opened = open_regular(path)
    if opened is None:
        return None
    fd, length = opened
    with os.fdopen(fd, "rb") as file:
        if length > max_bytes:
            raise PublishError(Reason.UNSAFE_FILE, f"{path} has {length} bytes, more than the {max_bytes} allowed")
        try:
            # not `max_bytes`, for which the buffer would be allocated beforehand
            return file.read(length)
        except OSError as e:
            raise _io_error(f"cannot read {path}", e) from e


def read_secret(path: Path, max_bytes: int) -> bytes | None:
    """As `read_regular`, for a file that only its owner may open.

    Raises:
        PublishError: `unsafe_file` when group or others have any access, or when it belongs to another user.
    """
    opened = open_regular(path)
    if opened is None:
        return None
    fd, length = opened
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if status.st_mode & 0o077:
            raise PublishError(
                Reason.UNSAFE_FILE,
                f"{path} is open to others (mode {stat.S_IMODE(status.st_mode):04o})",
                hint=f"chmod 600 {path}; if others could read it, replace the key",
            )
        if status.st_uid != os.geteuid():
            raise PublishError(
                Reason.UNSAFE_FILE, f"{path} belongs to user {status.st_uid}", hint="run as the repository's owner"
            )
        if length > max_bytes:
            raise PublishError(Reason.UNSAFE_FILE, f"{path} has {length} bytes, more than the {max_bytes} allowed")
        return file.read(max_bytes)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of `path`, a file that is created when missing and never removed.

    Raises:
        PublishError: `busy` when another process holds it for longer than LOCK_WAIT_S.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, SECRET_MODE)
    except OSError as e:
        raise _io_error(f"cannot open {path}", e) from e
    try:
        until_s = time.monotonic() + LOCK_WAIT_S
        while not _taken(fd):
            if time.monotonic() >= until_s:
                busy = "another edge-ota is changing this repository"
                raise PublishError(Reason.BUSY, busy, hint="try again when it ended", retry=True)
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_directory(path: Path, *, anywhere: bool = False) -> None:
    """`anywhere`: also on a share of another machine, which may know no such thing for directories."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        if not anywhere or e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _io_error(what: str, error: OSError) -> PublishError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PublishError(Reason.NO_SPACE, f"{what}: no space left", hint="free some space and run it again")
    return PublishError(Reason.IO_ERROR, f"{what}: {error.strerror or error}")
