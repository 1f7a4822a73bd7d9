"""Sealed memfds: where plaintext of a release lives in this process. No file on disk ever holds it.

Invariant: a descriptor that `write_sealed` returned can never change again, and one that failed half-way is closed.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator

from ota.errors import PayloadError, Reason, StoreError

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def write_sealed(name: str, length: int, fill: Callable[[memoryview], None]) -> int:
    """A new sealed, close-on-exec memfd of `length` bytes, written by `fill` through a mapping.

    Whatever `fill` raises is passed on after the descriptor is closed. The caller closes the descriptor returned.

    Raises:
        StoreError: `no_space`: the system has no memory or no descriptor left for it.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            if length:
                os.ftruncate(fd, length)
                with mmap.mmap(fd, length) as mapping, memoryview(mapping) as view:
                    fill(view)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
    except OSError as e:
        raise StoreError(
            Reason.NO_SPACE,
            f"no memory for {length} bytes of a model: {e.strerror or e}",
            hint="see what uses this board's memory; it is tried again by itself",
            retry=True,
        ) from e
    return fd


def is_sealed(fd: int) -> bool:
    """Whether nothing can change the bytes behind `fd` any more."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def check(fd: int, sha256: str, length: int, what: str) -> None:
    """Check that `fd` is sealed and holds exactly the bytes that were signed.

    Raises:
        PayloadError: `payload_truncated` for another length, `payload_corrupt` for another hash or an unsealed memfd.
    """
    actual = os.fstat(fd).st_size
    if actual != length:
        raise PayloadError(Reason.PAYLOAD_TRUNCATED, f"{what} opens to {actual} bytes, {length} are signed")
    if not is_sealed(fd):
        raise PayloadError(Reason.PAYLOAD_CORRUPT, f"{what} lies in a memfd that can still change")
    digest = hashlib.sha256()
    for chunk in chunks(fd):
        digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise PayloadError(
            Reason.PAYLOAD_CORRUPT,
            f"{what} opens to other bytes than the release signs",
            hint="the publisher built this release wrongly: publish a new version",
        )


def chunks(fd: int, size: int = 1 << 20) -> Iterator[bytes]:
    """The bytes behind `fd` from its beginning; does not move the file offset."""
    position = 0
    while chunk := os.pread(fd, size, position):
        position += len(chunk)
        yield chunk
