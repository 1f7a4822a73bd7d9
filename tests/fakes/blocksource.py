"""A repository's read side in memory, for block servers under test."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ota.errors import OtaError, Reason


@dataclass
class MemorySource:
    """Serves what it was given; `broken` makes every read fail as a dying disk does."""

    metadata: Mapping[tuple[str, int | None], bytes] = field(default_factory=dict)
    desired: Mapping[str, bytes] = field(default_factory=dict)
    targets: Mapping[tuple[str, str], bytes] = field(default_factory=dict)
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    broken: bool = False
    reads: int = 0

    def read_metadata(self, role: str, version: int | None) -> bytes | None:
        self._read()
        return self.metadata.get((role, version))

    def read_desired(self, device: str) -> bytes | None:
        self._read()
        return self.desired.get(device)

    def read_target(self, path: str, sha256: str) -> bytes | None:
        self._read()
        return self.targets.get((path, sha256))

    def open_payload(self, sha256: str) -> tuple[int, int] | None:
        self._read()
        payload = self.payloads.get(sha256)
        if payload is None:
            return None
        fd = os.memfd_create("payload")
        os.write(fd, payload)
        return fd, len(payload)

    def _read(self) -> None:
        self.reads += 1
        if self.broken:
            raise OtaError(Reason.IO_ERROR, "the disk is dying")


def payload(size: int, seed: int = 1) -> tuple[str, bytes]:
    """`size` reproducible bytes and their hash."""
    block = hashlib.sha256(seed.to_bytes(8, "big")).digest()
    data = b"".join(hashlib.sha256(block + n.to_bytes(4, "big")).digest() for n in range(-(-size // 32)))[:size]
    return hashlib.sha256(data).hexdigest(), data
