"""Committed and staged files at rest: `store/<plain_sha256>.cbs`, sealed under the device storage key; release.json of
every installed release beside them.

A `.cbs` file is the header of `sealed`, then Cobblestone-256 ciphertext whose context binds header and plaintext hash.
The header names the key: the current one, or a retired one until the file is re-sealed (`reseal`). Full, delta and
sideload installs of one component end in the same plaintext.
Invariants: no plaintext in any file; `open` hands out a memfd only after the whole file authenticated and its hash
agreed; a damaged file is never repaired in place, only removed and fetched again; without a key nothing is opened,
written or judged damaged.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from ota import payload, release
from ota.client import memfd, offload, sealed
from ota.client.fsops import TEMPORARY_SUFFIX, Fs
from ota.errors import OtaError, PayloadError, Reason, StoreError

DIRECTORY = "store"
RELEASES = "releases"
MAGIC = b"EDGECBS\n"
CONTEXT = b"edge-ota store v2\0" + payload.SUITE.encode() + b"\0"
_SUFFIX = ".cbs"
_ENDS = ("", TEMPORARY_SUFFIX)
_AGAIN = "it is fetched again by the next update check"


class Store:
    """Sealed files by the hash of their plaintext. Methods may be called in threads; two never use one file at once.

    Args:
        storage_key: 32 bytes; empty when the sealed key of this device is not available: then every file stays as it
            is, and whatever needs a key raises `sealed_key_unavailable`.
        reserve_bytes: disk that stays free for the journal and metadata, whatever is admitted.
        retired: earlier keys, under which files may still be sealed.

    Raises:
        StoreError: the disk cannot be written.
    """

    def __init__(self, fs: Fs, storage_key: bytes, reserve_bytes: int, retired: Sequence[bytes] = ()) -> None:
        self._fs = fs
        self._reserve_bytes = reserve_bytes
        self.use_keys((storage_key, *retired) if storage_key else ())
        self._turn = threading.Condition()
        self._busy: set[str] = set()
        for directory in (DIRECTORY, RELEASES):
            fs.make_dirs(directory)
            fs.sweep(directory)

    def use_keys(self, keys: Sequence[bytes]) -> None:
        """Seal under the first of `keys` from now on, open under any; empty: under none."""
        named = {sealed.key_id(key): key for key in keys}
        # one assignment: another thread sees the old pair or the new one
        self._keys = (next(iter(named), ""), named)

    def admit(self, needed_bytes: int, what: str) -> None:
        """Refuse work for which the disk is too small, before it begins.

        Args:
            needed_bytes: sum of signed lengths still to be written.

        Raises:
            StoreError: `no_space`; `sealed_key_unavailable`: what was fetched could not be kept.
        """
        self._refuse_keyless()
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
        return self._fs.size(path_of(plain_sha256)) is not None

    def put(self, fd: int, plain_sha256: str, length: int) -> None:
        """Seal the plaintext behind `fd` into the store, durably; one that opens already is left alone.

        Raises:
            PayloadError: the plaintext is not what was signed.
            StoreError: `no_space`, `io_error` or `sealed_key_unavailable`.
        """
        self._refuse_keyless()
        memfd.check(fd, plain_sha256, length, f"plaintext {plain_sha256[:12]}")
        with self._alone(plain_sha256):
            if self.has(plain_sha256):
                try:
                    os.close(self._open(plain_sha256))
                    return
                except StoreError as e:
                    if e.reason not in (Reason.PAYLOAD_CORRUPT, Reason.NOT_FOUND):
                        raise  # a disk that does not answer now says nothing about the file
                    self._fs.remove(path_of(plain_sha256))
            self._write(plain_sha256, length, memfd.chunks(fd))

    async def keep(self, fd: int, plain_sha256: str, length: int) -> None:
        """As `put`, in a thread; `fd` stays the caller's, who may close it at once."""
        own = os.dup(fd)

        def work() -> None:
            try:
                self.put(own, plain_sha256, length)
            finally:
                os.close(own)

        await offload.finished(work)

    def open(self, plain_sha256: str) -> int:
        """A new sealed memfd with the plaintext; the caller closes it. Waits while the file is sealed anew: replaced in
        the middle of the reading, it would give the header of one and the pieces of another.

        Raises:
            StoreError: `not_found`; `payload_corrupt` for a file that is damaged, cut short or sealed by another key;
                `sealed_key_unavailable`.
        """
        self._refuse_keyless()
        with self._alone(plain_sha256):
            return self._open(plain_sha256)

    def _open(self, plain_sha256: str) -> int:
        path = path_of(plain_sha256)
        try:
            header, pieces = self._opened(path, plain_sha256)
            fd = memfd.write_sealed("model", header.length, partial(_fill, pieces))
            try:
                memfd.check(fd, plain_sha256, header.length, path)
            except PayloadError:
                os.close(fd)
                raise
        except PayloadError as e:
            raise StoreError(Reason.PAYLOAD_CORRUPT, f"{path}: {e.message}", hint=_AGAIN) from e
        return fd

    async def read(self, plain_sha256: str) -> int:
        """As `open`, in a thread."""
        return await offload.opened(partial(self.open, plain_sha256))

    def stale(self) -> list[str]:
        """Plaintext hashes of the files that are sealed under another key than the current one, those included whose
        writing began before the key was current: it waits for them.

        Raises:
            StoreError: `io_error`.
        """
        with self._turn:
            writing = set(self._busy)
            self._turn.wait_for(lambda: not writing & self._busy)
        return [name for name, key in self.seals() if key != self._keys[0]]

    def seals(self) -> Iterator[tuple[str, str]]:
        """Plaintext hash and key id of every file; the id is empty for one whose header cannot be read.

        Raises:
            StoreError: `io_error`.
        """
        for name in self._fs.names(DIRECTORY):
            sha256, size = name.removesuffix(_SUFFIX), self._fs.size(f"{DIRECTORY}/{name}")
            if sha256 == name or size is None:
                continue
            try:
                head = self._fs.read_at(path_of(sha256), 0, sealed.HEADER_BYTES)
                yield sha256, sealed.parse(head, MAGIC, size).key_id
            except PayloadError:
                yield sha256, ""

    def reseal(self, plain_sha256: str) -> bool:
        """Seal one file anew under the current key; a cut leaves the old or the new one. Never more of it in memory
        than a piece, never more on the disk than this one file's second copy.

        Returns:
            False for a file that is gone meanwhile, or sealed under the current key already.

        Raises:
            StoreError: `payload_corrupt`: it does not open, and stays as it is; `no_space`, `io_error`,
                `sealed_key_unavailable`.
        """
        self._refuse_keyless()
        path = path_of(plain_sha256)
        with self._alone(plain_sha256):
            if not self.has(plain_sha256):
                return False
            try:
                header, pieces = self._opened(path, plain_sha256)
                if header.key_id == self._keys[0]:
                    return False
                self.admit(sealed_size(header.length), f"sealing {path} anew")
                self._write(plain_sha256, header.length, _proved(pieces, plain_sha256, header.length))
            except PayloadError as e:
                raise StoreError(Reason.PAYLOAD_CORRUPT, f"{path}: {e.message}", hint=_AGAIN) from e
            return True

    def discard(self, plain_sha256: str) -> None:
        """Remove a file that `open` refused.

        Raises:
            StoreError: `io_error`.
        """
        self._fs.remove(path_of(plain_sha256))

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
        """Remove every file that neither set names, but none that is being written: the next call finds it.

        Raises:
            StoreError: `io_error`.
        """
        for directory, keep in (
            (DIRECTORY, {f"{sha256}{_SUFFIX}{end}" for sha256 in {*plain, *self._busy} for end in _ENDS}),
            (RELEASES, {f"{sha256}.json" for sha256 in releases}),
        ):
            for name in self._fs.names(directory):
                if name not in keep:
                    self._fs.remove(f"{directory}/{name}")

    def _opened(self, path: str, plain_sha256: str) -> tuple[sealed.Header, Iterator[bytes]]:
        """Header and decrypted pieces of a file. The pieces count for nothing until all of them came.

        Raises:
            StoreError: `not_found`.
            PayloadError: it is damaged, or sealed under a key that is not here; also while the pieces are read.
        """
        size = self._fs.size(path)
        if size is None:
            raise StoreError(Reason.NOT_FOUND, f"{path} is not in the store", hint="run an update check")
        head = self._fs.read_at(path, 0, sealed.HEADER_BYTES)
        # checked before anything is allocated: the header is not authenticated yet
        header = sealed.parse(head, MAGIC, size)
        key = self._keys[1].get(header.key_id)
        if key is None:
            raise PayloadError(Reason.PAYLOAD_CORRUPT, f"sealed under key {header.key_id}, which is not here")
        pieces = self._fs.chunks(path, sealed.HEADER_BYTES)
        return header, payload.open_chunks(pieces, key, _context(head, plain_sha256))

    def _write(self, plain_sha256: str, length: int, plain: Iterable[bytes]) -> None:
        current, keys = self._keys
        header = sealed.Header(current, length).pack(MAGIC)
        pieces = payload.seal_chunks(plain, keys[current], _context(header, plain_sha256))
        self._fs.write_atomic(path_of(plain_sha256), _chain(header, pieces))

    @contextmanager
    def _alone(self, plain_sha256: str) -> Iterator[None]:
        """Wait until no other thread reads or writes this file; meanwhile others wait."""
        with self._turn:
            self._turn.wait_for(lambda: plain_sha256 not in self._busy)
            self._busy.add(plain_sha256)
        try:
            yield
        finally:
            with self._turn:
                self._busy.discard(plain_sha256)
                self._turn.notify_all()

    def _refuse_keyless(self) -> None:
        if not self._keys[0]:
            raise keyless()


def keyless() -> StoreError:
    """What a device says that has no storage key: nothing can be opened, kept or judged."""
    return StoreError(
        Reason.SEALED_KEY_UNAVAILABLE,
        "the storage key of this device is not available",
        hint="edge-agent status names the cause",
        retry=True,
    )


def sealed_size(plain_length: int) -> int:
    """Bytes on disk of a plaintext of `plain_length` bytes."""
    return sealed.HEADER_BYTES + payload.sealed_length(plain_length)


def path_of(plain_sha256: str) -> str:
    """Where the file with that plaintext lies, below the state directory."""
    return f"{DIRECTORY}/{plain_sha256}{_SUFFIX}"


def _release_path(sha256: str) -> str:
    return f"{RELEASES}/{sha256}.json"


def _context(header: bytes, plain_sha256: str) -> bytes:
    return CONTEXT + header + plain_sha256.encode()


def _chain(header: bytes, pieces: Iterable[bytes]) -> Iterable[bytes]:
    yield header
    yield from pieces


def _fill(pieces: Iterable[bytes], view: memoryview) -> None:
    position = 0
    for piece in pieces:
        end = position + len(piece)
        if end > len(view):
            raise PayloadError(Reason.PAYLOAD_CORRUPT, f"opens to more than {len(view)} bytes")
        view[position:end] = piece
        position = end
    if position != len(view):
        raise PayloadError(Reason.PAYLOAD_TRUNCATED, f"opens to {position} bytes of {len(view)}")


def _proved(pieces: Iterable[bytes], sha256: str, length: int) -> Iterator[bytes]:
    """The same pieces; raises instead of ending when they are not the plaintext of that hash and length."""
    digest, position = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        position += len(piece)
        yield piece
    if position != length or digest.hexdigest() != sha256:
        raise PayloadError(Reason.PAYLOAD_CORRUPT, "opens to another plaintext than its name says")
