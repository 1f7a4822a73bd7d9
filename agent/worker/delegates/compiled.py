"""What a runtime made of a model, as bytes that know what they belong to.

Layout: magic, length of the binding (uint32, little-endian), the binding (JSON), zeros up to a multiple of 64, the
runtime's own export. The binding names delegate, runtime, driver, model and options; only equal bytes of it are
imported, because a runtime checks its own export carelessly or not at all. It is no protection against forgery: the
daemon seals the whole before it keeps it.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from typing import Any

import numpy as np

from agent import memfd
from agent.worker.delegates import Delegate, Options

MAGIC = b"EDGECMP1"
_HEAD = struct.Struct("<8sI")
# for runtimes that use tensors where they lie
ALIGNMENT = 64
MAX_COMPILED_BYTES = 1 << 31


def binding(delegate: Delegate, options: Options) -> bytes:
    """What an export of `options.model` on this delegate is good for; empty without a model's digest."""
    if not options.model:
        return b""
    facts = {
        "bf16": options.bf16,
        "delegate": delegate.name,
        "driver": delegate.driver,
        "model": options.model,
        "runtime": delegate.runtime,
        "threads": options.threads,
    }
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


def wrap(bound: bytes, export: bytes | memoryview) -> int:
    """A new sealed memfd of `export`, bound to `bound`; the caller closes it."""
    fd = memfd.create("compiled")
    try:
        for data in (_header(bound), export):
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        memfd.seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def unwrap(fd: int, bound: bytes) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """The export behind a sealed `fd`, mapped without a copy; None when it is bound to anything but `bound`."""
    head = _header(bound)
    length = os.fstat(fd).st_size
    if not bound or not memfd.is_sealed(fd) or not len(head) < length <= MAX_COMPILED_BYTES:
        return None
    if os.pread(fd, len(head), 0) != head:
        return None
    # private and writable: runtimes refuse memory that they could not write to
    mapping = mmap.mmap(fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    return np.frombuffer(mapping, np.uint8, offset=len(head))


def _header(bound: bytes) -> bytes:
    head = _HEAD.pack(MAGIC, len(bound)) + bound
    return head + bytes(-len(head) % ALIGNMENT)
