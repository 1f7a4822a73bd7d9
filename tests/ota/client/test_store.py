"""Files at rest: sealed, bound to their name, and never handed out damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ota.client import memfd
from ota.client.fsops import Disk, Fs
from ota.client.store import Store, sealed_size
from ota.errors import PayloadError, Reason, StoreError
from tests.ota.client.conftest import model
from tests.ota.client.simulator import sha256

PLAIN = model(1, 70_000)
KEY = b"k" * 32


def _memfd(data: bytes) -> int:
    return memfd.write_sealed("test", len(data), lambda view: view.__setitem__(slice(None), data))


def _put(store: Store, data: bytes) -> str:
    fd = _memfd(data)
    try:
        store.put(fd, sha256(data), len(data))
    finally:
        os.close(fd)
    return sha256(data)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Fs(tmp_path), KEY, 0)


def test_what_was_put_comes_back_in_a_sealed_memfd(store: Store) -> None:
    fd = store.open(_put(store, PLAIN))
    assert memfd.is_sealed(fd)
    assert b"".join(memfd.chunks(fd)) == PLAIN
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


def test_the_size_on_disk_is_known_beforehand(store: Store, tmp_path: Path) -> None:
    for length in (1, 16383, 16384, 16385, 70_000):
        name = _put(store, model(2, length))
        assert (tmp_path / "store" / f"{name}.cbs").stat().st_size == sealed_size(length)


def test_no_descriptor_is_left_open_by_any_refusal(store: Store, tmp_path: Path) -> None:
    name = _put(store, PLAIN)
    path = tmp_path / "store" / f"{name}.cbs"
    good = path.read_bytes()
    before = len(os.listdir("/proc/self/fd"))
    for position in range(0, len(good), 997):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(StoreError) as failure:
            store.open(name)
        assert failure.value.reason is Reason.PAYLOAD_CORRUPT
    for length in (0, 5, 40, 41, 100, 16496, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(StoreError) as failure:
            store.open(name)
        assert failure.value.reason is Reason.PAYLOAD_CORRUPT
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_file_in_the_place_of_another_does_not_open(store: Store, tmp_path: Path) -> None:
    first, second = _put(store, PLAIN), _put(store, model(3, len(PLAIN)))
    (tmp_path / "store" / f"{first}.cbs").rename(tmp_path / "store" / f"{second}.cbs")
    with pytest.raises(StoreError):
        store.open(second)
    with pytest.raises(StoreError) as absent:
        store.open(first)
    assert absent.value.reason is Reason.NOT_FOUND


def test_another_devices_storage_key_opens_nothing(store: Store, tmp_path: Path) -> None:
    name = _put(store, PLAIN)
    with pytest.raises(StoreError) as failure:
        Store(Fs(tmp_path), b"x" * 32, 0).open(name)
    assert failure.value.reason is Reason.PAYLOAD_CORRUPT


def test_a_damaged_file_is_replaced_and_a_whole_one_left_alone(store: Store, tmp_path: Path) -> None:
    name = _put(store, PLAIN)
    path = tmp_path / "store" / f"{name}.cbs"
    inode = path.stat().st_ino
    _put(store, PLAIN)
    assert path.stat().st_ino == inode
    path.write_bytes(b"rot")
    _put(store, PLAIN)
    os.close(store.open(name))


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE])
def test_a_file_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(tmp_path: Path, error: int) -> None:
    """Another line has the same file in service: neither removed nor replaced, whatever the disk says next."""

    class Failing(Disk):
        fails = False

        def read(self, path: str, offset: int, length: int) -> bytes:
            if self.fails:
                raise OSError(error, os.strerror(error))
            return super().read(path, offset, length)

    disk = Failing(tmp_path)
    store = Store(Fs(disk), KEY, 0)
    name = _put(store, PLAIN)
    before = (tmp_path / "store" / f"{name}.cbs").read_bytes()
    disk.fails = True
    with pytest.raises(StoreError) as failure:
        _put(store, PLAIN)
    assert failure.value.reason in (Reason.IO_ERROR, Reason.NO_SPACE)
    assert (tmp_path / "store" / f"{name}.cbs").read_bytes() == before


def test_a_board_without_memory_for_a_model_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    name = _put(store, PLAIN)
    before = len(os.listdir("/proc/self/fd"))
    for call in ("memfd_create", "ftruncate"):

        def fails(*_: object) -> int:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            with pytest.raises(StoreError) as failure:
                store.open(name)
        assert (failure.value.reason, failure.value.retry) == (Reason.NO_SPACE, True)
        assert failure.value.hint
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(store.open(name))


@pytest.mark.parametrize("change", [b"x", b""])
def test_a_plaintext_that_is_not_what_was_signed_is_not_stored(store: Store, tmp_path: Path, change: bytes) -> None:
    fd = _memfd(PLAIN[:-1] + change)
    with pytest.raises(PayloadError):
        store.put(fd, sha256(PLAIN), len(PLAIN))
    os.close(fd)
    assert not list((tmp_path / "store").iterdir())


def test_a_memfd_that_could_still_change_is_not_stored(store: Store) -> None:
    fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.write(fd, PLAIN)
    with pytest.raises(PayloadError):
        store.put(fd, sha256(PLAIN), len(PLAIN))
    os.close(fd)


def test_collecting_keeps_what_is_named(store: Store, tmp_path: Path) -> None:
    first, second = _put(store, PLAIN), _put(store, b"other")
    store.put_release(b"{}", sha256(b"{}"))
    store.collect([second], [])
    assert [path.name for path in (tmp_path / "store").iterdir()] == [f"{second}.cbs"]
    assert not list((tmp_path / "releases").iterdir())
    assert not store.has(first)


def test_a_kept_release_that_rotted_is_absent(store: Store, tmp_path: Path) -> None:
    store.put_release(b"{}", sha256(b"{}"))
    (tmp_path / "releases" / f"{sha256(b'{}')}.json").write_bytes(b"[]")
    assert store.release(sha256(b"{}")) is None
