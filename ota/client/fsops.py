"""The only module of the device that makes bytes durable: `Disk` is the system calls, `Fs` the recipes built of them.

A recipe is what survives a power cut: write a temporary file, fsync it, rename it, fsync the directory. Nothing else in
`ota.client` writes. Not here: what the bytes mean. Paths are relative to the root, `/`-separated and made by our own
code from hashes and fixed names, never from a name that somebody sent.
Invariants: a reader sees the old or the new content of an atomically written file, never a mixture; a failed write
leaves no temporary file behind while the disk still answers; every `OSError` becomes a `StoreError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from ota.errors import OtaError, Reason, StoreError

TEMPORARY_SUFFIX = ".tmp"
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE})
# stat(2) counts st_blocks in these, whatever the file system's own blocks are
_BLOCK_BYTES = 512
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Disk:
    """One system call per method, below `root`. Raises OSError alone; files are 0600, directories 0700."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _at(self, path: str) -> Path:
        return self._root / path

    def mkdir(self, path: str) -> None:
        """Create one directory; the parent exists."""
        os.mkdir(self._at(path), 0o700)

    def write(self, path: str, offset: int, data: bytes) -> None:
        """Write at `offset`, creating the file if it is absent; follows no symbolic link."""
        fd = os.open(self._at(path), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(fd, view, offset)
                offset += written
                view = view[written:]
        finally:
            os.close(fd)

    def truncate(self, path: str, length: int) -> None:
        """Set the length of an existing file."""
        os.truncate(self._at(path), length)

    def fsync(self, path: str) -> None:
        """Make the content of a file durable."""
        self._sync(path, os.O_RDONLY)

    def fsync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""
        self._sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, source: str, destination: str) -> None:
        """Replace `destination` by `source` in one step."""
        os.rename(self._at(source), self._at(destination))

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(self._at(path))

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`."""
        fd = os.open(self._at(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    def size(self, path: str) -> int:
        """Length of a file in bytes."""
        return os.stat(self._at(path), follow_symlinks=False).st_size

    def allocated(self, path: str) -> int:
        """Bytes that a file takes up on the disk; holes do not count."""
        return os.stat(self._at(path), follow_symlinks=False).st_blocks * _BLOCK_BYTES

    def names(self, path: str) -> list[str]:
        """Names in a directory."""
        return os.listdir(self._at(path))

    def free_bytes(self) -> int:
        """Bytes an unprivileged writer may still use."""
        stat = os.statvfs(self._root)
        return stat.f_bavail * stat.f_frsize

    def _sync(self, path: str, flags: int) -> None:
        fd = os.open(self._at(path), flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Fs:
    """Durable files below one directory.

    Args:
        root: the state directory, which exists; or any object with the methods of `Disk`.
    """

    def __init__(self, root: Path | Disk) -> None:
        self._disk = Disk(root) if isinstance(root, Path) else root

    def make_dirs(self, path: str) -> None:
        """Create `path` and its parents below the root, durably; existing ones stay.

        Raises:
            StoreError: `no_space` or `io_error`.
        """
        parent = ""
        for name in path.split("/"):
            current = f"{parent}/{name}" if parent else name
            try:
                self._disk.mkdir(current)
            except FileExistsError:
                pass
            except OSError as e:
                raise _store_error(e, current) from e
            else:
                _attempt(current, self._disk.fsync_dir, parent or ".")
            parent = current

    def write_atomic(self, path: str, data: bytes | Iterable[bytes]) -> None:
        """Replace the file `path` by `data`, whole and durable, or leave it as it was.

        Raises:
            StoreError: `no_space` or `io_error`; the temporary file is gone again if the disk allows.
            OtaError: whatever `data` raises when it cannot go on; likewise.
        """
        temporary = path + TEMPORARY_SUFFIX
        position = 0
        try:
            self._drop(temporary)
            for chunk in (data,) if isinstance(data, bytes) else data:
                self._disk.write(temporary, position, chunk)
                position += len(chunk)
            if position == 0:
                self._disk.write(temporary, 0, b"")
            self._disk.fsync(temporary)
            self._disk.rename(temporary, path)
            self._disk.fsync_dir(_parent(path))
        except OSError as e:
            try:
                self._drop(temporary)
            except OSError:
                pass  # the first error says what is wrong with the disk; `sweep` removes the file later
            raise _store_error(e, path) from e
        except OtaError:
            # what was to be written did not come to its end
            with contextlib.suppress(OSError):
                self._drop(temporary)
            raise

    def write_at(self, path: str, offset: int, data: bytes) -> None:
        """Write a piece in place; durable only after `flush`.

        Raises:
            StoreError: `no_space` or `io_error`.
        """
        _attempt(path, self._disk.write, path, offset, data)

    def flush(self, path: str) -> None:
        """Make what `write_at` wrote durable, the file's name included.

        Raises:
            StoreError: `io_error`.
        """
        _attempt(path, self._disk.fsync, path)
        _attempt(path, self._disk.fsync_dir, _parent(path))

    def truncate(self, path: str, length: int) -> None:
        """Cut an existing file to `length` bytes; durable only after `flush`.

        Raises:
            StoreError: `io_error`.
        """
        _attempt(path, self._disk.truncate, path, length)

    def remove(self, path: str) -> None:
        """Remove a file; absent is well. Not durable on purpose: whoever removes does so again after a power cut
        that brought the file back.

        Raises:
            StoreError: `io_error`.
        """
        try:
            self._disk.unlink(path)
        except FileNotFoundError:
            return
        except OSError as e:
            raise _store_error(e, path) from e

    def read(self, path: str, max_bytes: int) -> bytes | None:
        """The whole file, or None when it is absent.

        Raises:
            StoreError: `io_error`, also for a file larger than `max_bytes`.
        """
        size = self.size(path)
        if size is None:
            return None
        if size > max_bytes:
            raise StoreError(Reason.IO_ERROR, f"{path}: {size} bytes where at most {max_bytes} belong")
        return b"".join(self.chunks(path))

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; empty for an absent file.

        Raises:
            StoreError: `io_error`.
        """
        try:
            return self._disk.read(path, offset, length)
        except FileNotFoundError:
            return b""
        except OSError as e:
            raise _store_error(e, path) from e

    def chunks(self, path: str, offset: int = 0, size: int = 1 << 20) -> Iterator[bytes]:
        """The file's bytes from `offset` on, in pieces.

        Raises:
            StoreError: `io_error`.
        """
        while chunk := self.read_at(path, offset, size):
            offset += len(chunk)
            yield chunk

    def size(self, path: str) -> int | None:
        """Length in bytes, None when absent.

        Raises:
            StoreError: `io_error`.
        """
        try:
            return self._disk.size(path)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise _store_error(e, path) from e

    def allocated(self, path: str) -> int:
        """Bytes that a file takes up on the disk, holes not counted; 0 when it is absent.

        Raises:
            StoreError: `io_error`.
        """
        try:
            return self._disk.allocated(path)
        except FileNotFoundError:
            return 0
        except OSError as e:
            raise _store_error(e, path) from e

    def names(self, path: str) -> list[str]:
        """Sorted names in a directory of ours; empty when it is absent.

        Raises:
            StoreError: `io_error`.
        """
        try:
            return sorted(self._disk.names(path))
        except FileNotFoundError:
            return []
        except OSError as e:
            raise _store_error(e, path) from e

    def free_bytes(self) -> int:
        """Bytes left on the file system.

        Raises:
            StoreError: `io_error`.
        """
        return _attempt(".", self._disk.free_bytes)

    def sweep(self, path: str) -> None:
        """Remove the temporary files that a power cut left in a directory. One that cannot be removed stays for the
        next time: a disk that turned read-only must not keep anybody from starting.

        Raises:
            StoreError: `io_error`: the directory cannot be read.
        """
        for name in self.names(path):
            if name.endswith(TEMPORARY_SUFFIX):
                try:
                    self.remove(f"{path}/{name}")
                except StoreError:
                    return

    def _drop(self, path: str) -> None:
        try:
            self._disk.unlink(path)
        except FileNotFoundError:
            pass


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "."


def _attempt(path: str, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    try:
        return call(*args, **kwargs)
    except OSError as e:
        raise _store_error(e, path) from e


def _store_error(error: OSError, path: str) -> StoreError:
    detail = f"{path}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno in _NO_SPACE:
        return StoreError(Reason.NO_SPACE, detail, hint="free space on the device's state partition", retry=True)
    hint = "check the device's storage: it may be read-only or failing"
    return StoreError(Reason.IO_ERROR, detail, hint=hint)
