"""Committed and staged files at rest: `store/<plain_sha256>.cbs`, sealed under the device storage key; release.json of
every installed release beside them.

Layout of a `.cbs` file: magic, header version, suite name, plaintext length, then Cobblestone-256 ciphertext whose
context binds header and plaintext hash. Full, delta and sideload installs of one component end in the same plaintext.
Invariants: no plaintext in any file; `open` hands out a memfd only after the whole file authenticated and its hash
agreed; a damaged file is never repaired in place, only removed and fetched again.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable

from ota import payload, release
from ota.client import memfd
from ota.client.fsops import Fs
from ota.errors import OtaError, PayloadError, Reason, StoreError

DIRECTORY = "store"
RELEASES = "releases"
_SUITE = b"cobblestone-256"
# magic, header version, padding, suite name (zero-padded), plaintext length
_HEADER = struct.Struct("<8sB7x16sQ")
_MAGIC = b"EDGECBS\n"
_VERSION = 1


class Store:
    """Sealed files by the hash of their plaintext.

    Args:
        storage_key: 32 bytes.
        reserve_bytes: disk that stays free for the journal and metadata, whatever is admitted.

    Raises:
        StoreError: the disk cannot be written.
    """

    def __init__(self, fs: Fs, storage_key: bytes, reserve_bytes: int) -> None:
        self._fs = fs
        self._key = storage_key
        self._reserve_bytes = reserve_bytes
        for directory in (DIRECTORY, RELEASES):
            fs.make_dirs(directory)
            fs.sweep(directory)

    def admit(self, needed_bytes: int, what: str) -> None:
        """Refuse work for which the disk is too small, before it begins.

        Args:
            needed_bytes: sum of signed lengths still to be written.

        Raises:
            StoreError: `no_space`.
        """
        free = self._fs.free_bytes()
        if free < needed_bytes + self._reserve_bytes:
            raise StoreError(
                Reason.NO_SPACE,
                f"{what} needs {needed_bytes} bytes beside a reserve of {self._reserve_bytes}, {free} are free",
                hint="free space on the device's state partition",
                retry=True,
            )

    def has(self, plain_sha256: str) -> bool:
        """Whether a file of that name exists; only `open` says whether it is whole."""
        return self._fs.size(_path(plain_sha256)) is not None

    def put(self, fd: int, plain_sha256: str, length: int) -> None:
        """Seal the plaintext behind `fd` into the store, durably; one that opens already is left alone.

        Raises:
            PayloadError: the plaintext is not what was signed.
            StoreError: `no_space` or `io_error`.
        """
        memfd.check(fd, plain_sha256, length, f"plaintext {plain_sha256[:12]}")
        if self.has(plain_sha256):
            try:
                os.close(self.open(plain_sha256))
            except StoreError:
                self.discard(plain_sha256)
            else:
                return
        header = _HEADER.pack(_MAGIC, _VERSION, _SUITE, length)
        sealed = payload.seal_chunks(memfd.chunks(fd), self._key, _context(header, plain_sha256))
        self._fs.write_atomic(_path(plain_sha256), _chain(header, sealed))

    def open(self, plain_sha256: str) -> int:
        """A new sealed memfd with the plaintext; the caller closes it.

        Raises:
            StoreError: `not_found`; `payload_corrupt` for a file that is damaged, cut short or sealed by another key.
        """
        path = _path(plain_sha256)
        size = self._fs.size(path)
        if size is None:
            raise StoreError(Reason.NOT_FOUND, f"{path} is not in the store", hint="run an update check")
        try:
            header, length = self._header(path, size)
            context = _context(header, plain_sha256)

            def fill(view: memoryview) -> None:
                written = payload.open_into(self._fs.chunks(path, _HEADER.size), self._key, context, view)
                if written != length:
                    raise PayloadError(Reason.PAYLOAD_TRUNCATED, f"opens to {written} bytes of {length}")

            fd = memfd.write_sealed("model", length, fill)
            try:
                memfd.check(fd, plain_sha256, length, path)
            except PayloadError:
                os.close(fd)
                raise
        except PayloadError as e:
            raise StoreError(
                Reason.PAYLOAD_CORRUPT, f"{path}: {e.message}", hint="it is fetched again by the next update check"
            ) from e
        return fd

    def discard(self, plain_sha256: str) -> None:
        """Remove a file that `open` refused.

        Raises:
            StoreError: `io_error`.
        """
        self._fs.remove(_path(plain_sha256))

    def put_release(self, data: bytes, sha256: str) -> None:
        """Keep the bytes of a release.json.

        Raises:
            StoreError: `no_space` or `io_error`.
        """
        if self._fs.size(_release_path(sha256)) != len(data):
            self._fs.write_atomic(_release_path(sha256), data)

    def release(self, sha256: str) -> release.Release | None:
        """The kept release, None when it is absent or damaged (then it is removed).

        Raises:
            StoreError: `io_error`.
        """
        path = _release_path(sha256)
        size = self._fs.size(path)
        if size is None:
            return None
        data = self._fs.read_at(path, 0, release.MAX_RELEASE_BYTES + 1)
        if hashlib.sha256(data).hexdigest() != sha256:
            self._fs.remove(path)
            return None
        try:
            return release.parse(data)
        except OtaError:
            return None  # an older agent kept it, or a newer one: this one cannot read it

    def collect(self, plain: Iterable[str], releases: Iterable[str]) -> None:
        """Remove every file that neither set names.

        Raises:
            StoreError: `io_error`.
        """
        for directory, keep in (
            (DIRECTORY, {f"{sha256}.cbs" for sha256 in plain}),
            (RELEASES, {f"{sha256}.json" for sha256 in releases}),
        ):
            for name in self._fs.names(directory):
                if name not in keep:
                    self._fs.remove(f"{directory}/{name}")

    def _header(self, path: str, size: int) -> tuple[bytes, int]:
        header = self._fs.read_at(path, 0, _HEADER.size)
        if len(header) < _HEADER.size:
            raise PayloadError(Reason.PAYLOAD_TRUNCATED, "shorter than its header")
        magic, version, suite, length = _HEADER.unpack(header)
        if magic != _MAGIC or version != _VERSION or suite.rstrip(b"\0") != _SUITE:
            raise PayloadError(Reason.PAYLOAD_CORRUPT, "not a store file of this version")
        # checked before the memfd is allocated: the header is not authenticated yet
        if payload.plain_length(size - _HEADER.size) != length:
            raise PayloadError(Reason.PAYLOAD_TRUNCATED, f"{size} bytes do not hold {length}")
        return header, length


def sealed_size(plain_length: int) -> int:
    """Bytes on disk of a plaintext of `plain_length` bytes."""
    return _HEADER.size + payload.sealed_length(plain_length)


def _path(plain_sha256: str) -> str:
    return f"{DIRECTORY}/{plain_sha256}.cbs"


def _release_path(sha256: str) -> str:
    return f"{RELEASES}/{sha256}.json"


def _context(header: bytes, plain_sha256: str) -> bytes:
    return b"edge-ota store v1\0" + header + plain_sha256.encode()


def _chain(header: bytes, sealed: Iterable[bytes]) -> Iterable[bytes]:
    yield header
    yield from sealed
