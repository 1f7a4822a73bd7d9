"""Sealed memfds: the only place outside a process's heap where plaintext model bytes exist.

Importable on Python 3.10. Invariant: a memfd that left this module through `seal` can never change again.
"""

from __future__ import annotations

import fcntl
import os

ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def create(name: str, length: int = 0) -> int:
    """A new sealable memfd of `length` zero bytes; close-on-exec."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if length:
        os.ftruncate(fd, length)
    return fd


def seal(fd: int) -> None:
    """Forbid every further change; fails while a writable mapping exists."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)


def is_sealed(fd: int) -> bool:
    """Whether nothing can change the bytes any more."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ALL_SEALS == ALL_SEALS
    except OSError:
        return False


def of_bytes(name: str, data: bytes) -> int:
    """A sealed memfd holding `data`."""
    fd = create(name)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    seal(fd)
    return fd
