"""A stored zip is believed only if it can be read in one way; everything else about it is refused by one reason."""

from __future__ import annotations

import asyncio
import os
import stat
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ota.client.transports import zip as stored
from ota.client.transports.zip import ZipTransport
from ota.errors import OtaError, Reason, TransferError
from tests.contract.test_transports import pack
from tests.ota.client.conftest import DEVICE, LINE, Device, run
from tests.ota.client.simulator import sha256

TIMESTAMP = "metadata/timestamp.json"
ROOT = "metadata/1.root.json"
FILES = {TIMESTAMP: b"timestamp" * 20, ROOT: b"root" * 30, f"devices/{DEVICE}/desired.json": b"desired"}


def archive(files: dict[str, bytes] = FILES, *, method: int = zipfile.ZIP_STORED) -> bytearray:
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", method) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names are meant
        for name, data in files.items():
            made.writestr(zipfile.ZipInfo(name), data, method)
    return bytearray(packed.getvalue())


def read(path: Path, name: str = TIMESTAMP) -> bytes:
    role = name.removeprefix("metadata/").removesuffix(".json")
    version, _, role = role.rpartition(".")
    return asyncio.run(ZipTransport(path, DEVICE).metadata(role, int(version) if version else None, 10000))


def refused(data: bytes, tmp_path: Path) -> TransferError:
    path = tmp_path / "stick.zip"
    path.write_bytes(data)
    with pytest.raises(TransferError) as caught:
        read(path)
    assert caught.value.reason is Reason.BAD_ARCHIVE
    assert "edge-ota bundle" in caught.value.hint
    return caught.value


def central(data: bytes, index: int = 0) -> int:
    """Where the index-th entry of the directory starts."""
    at = struct.unpack_from("<I", data, len(data) - 6)[0]
    for _ in range(index):
        names, extras, comment = struct.unpack_from("<HHH", data, at + 28)
        at += 46 + names + extras + comment
    return at


def put(data: bytearray, offset: int, form: str, *values: int) -> bytearray:
    struct.pack_into(form, data, offset, *values)
    return data


def everywhere(data: bytearray, local: int, here: int, form: str, value: int) -> bytearray:
    """Set a field of the first entry in its local header and in the directory."""
    return put(put(data, local, form, value), central(data) + here, form, value)


def renamed(old: str, new: str) -> bytearray:
    assert len(old) == len(new)
    return bytearray(bytes(archive()).replace(old.encode(), new.encode()))


def end(data: bytearray) -> int:
    return len(data) - 22


HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "compressed": ("compressed", lambda: archive(method=zipfile.ZIP_DEFLATED)),
    "compressed, said in the header alone": ("compressed", lambda: put(archive(), 8, "<H", 8)),
    "packed and plain lengths differ": ("compressed", lambda: everywhere(archive(), 18, 20, "<I", 5)),
    "encrypted": ("encrypted", lambda: everywhere(archive(), 6, 8, "<H", 1)),
    "lengths behind the data": ("flags", lambda: everywhere(archive(), 6, 8, "<H", 8)),
    "zip64 by its directory": ("zip64", lambda: put(archive(), end(archive()) + 8, "<HH", 0xFFFF, 0xFFFF)),
    "zip64 by an entry": (
        "zip64",
        lambda: put(put(archive(), central(archive()) + 20, "<II", 0xFFFFFFFF, 0xFFFFFFFF), 18, "<II", 9, 9),
    ),
    "several disks": ("several", lambda: put(archive(), end(archive()) + 4, "<HH", 1, 1)),
    "more entries than there are": ("cut short", lambda: put(archive(), end(archive()) + 8, "<HH", 4, 4)),
    "fewer entries than there are": ("no entry", lambda: put(archive(), end(archive()) + 8, "<HH", 2, 2)),
    "a directory somewhere else": ("where it says", lambda: put(archive(), end(archive()) + 16, "<I", 60)),
    "bytes before it": ("where it says", lambda: b"MZ program" + archive()),
    "bytes before it, offsets mended": (
        "before its first entry",
        lambda: _prefixed(b"#!/bin/sh\n", archive()),
    ),
    "bytes behind it": ("behind its end", lambda: archive() + b"trailing"),
    "a comment": ("comment", lambda: put(archive(), end(archive()) + 20, "<H", 4) + b"note"),
    "an entry with a comment": ("comments", lambda: put(archive(), central(archive()) + 32, "<H", 4)),
    "a gap between entries": ("gap", lambda: _with_gap(archive())),
    "overlapping entries": ("overlaps", lambda: put(archive(), central(archive(), 1) + 42, "<I", 40)),
    "two entries over one place": ("overlaps", lambda: put(archive(), central(archive(), 1) + 42, "<I", 0)),
    "an entry over the directory": ("overlaps", lambda: _longer(archive({ROOT: b"x" * 9}))),
    "a name twice": ("twice", lambda: _twice()),
    "a name in two cases": ("not allowed", lambda: archive({**FILES, "metadata/TIMESTAMP.json": b"x"})),
    "an absolute name": ("not allowed", lambda: archive({**FILES, "/etc/cron.d/x": b"x"})),
    "a name that climbs": ("not allowed", lambda: archive({**FILES, "metadata/../../x": b"x"})),
    "a name with dots": ("not allowed", lambda: archive({**FILES, "metadata/..": b"x"})),
    "a drive": ("not allowed", lambda: archive({**FILES, "c:/x": b"x"})),
    "a backslash": ("not allowed", lambda: renamed("metadata/timestamp", "metadata\\timestamp")),
    "an escape sequence": ("not allowed", lambda: archive({**FILES, "\x1b[2J": b"x"})),
    "a name without end": ("not allowed", lambda: archive({**FILES, "a" * 256: b"x"})),
    "a header with another name": ("something else", lambda: put(archive(), 30, "<B", ord("n"))),
    "a header with another length": ("contradicts", lambda: put(archive(), 18, "<II", 9, 9)),
    "a header with another checksum": ("contradicts", lambda: put(archive(), 14, "<I", 1)),
    "a header that is none": ("something else", lambda: put(archive(), 0, "<I", 0)),
    "a later version of the format": ("version 4.6", lambda: put(archive(), central(archive()) + 6, "<H", 46)),
    "a symbolic link": ("link", lambda: put(archive(), central(archive()) + 38, "<I", (stat.S_IFLNK | 0o777) << 16)),
    "a device": ("link", lambda: put(archive(), central(archive()) + 38, "<I", (stat.S_IFBLK | 0o600) << 16)),
    "a folder with content": ("link", lambda: archive({**FILES, "devices/": b"x"})),
    "a damaged extra field": ("extra field", lambda: _with_extra(b"\x01")),
    "an extra field beyond its end": ("extra field", lambda: _with_extra(b"\x99\x99\xff\x00")),
    "zip64 by an extra field": ("zip64", lambda: _with_extra(b"\x01\x00\x08\x00" + bytes(8))),
    "nothing": ("too short", lambda: b""),
    "half of it": ("cut short", lambda: archive()[: len(archive()) // 2]),
    "something else": ("no zip file", lambda: os.urandom(1000)),
    "another root folder with a slash": ("not allowed", lambda: archive({"metadata//timestamp.json": b"x"})),
}


def _prefixed(prefix: bytes, data: bytearray) -> bytes:
    """Put something in front the way self-extracting archives do, with every offset mended."""
    start = central(data)
    for index in range(3):
        at = central(data, index) + 42
        put(data, at, "<I", struct.unpack_from("<I", data, at)[0] + len(prefix))
    put(data, end(data) + 16, "<I", start + len(prefix))
    return prefix + bytes(data)


def _with_gap(data: bytearray) -> bytes:
    """70,000 bytes that belong to nothing between the last entry and the directory."""
    at = central(data)
    put(data, end(data) + 16, "<I", at + 70_000)
    return bytes(data[:at]) + bytes(70_000) + bytes(data[at:])


def _longer(data: bytearray) -> bytes:
    """Its one entry claims to be longer than what lies before the directory."""
    return bytes(put(put(data, 18, "<II", 99, 99), central(data) + 20, "<II", 99, 99))


def _twice() -> bytes:
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in (b"one", b"two"):
            made.writestr(zipfile.ZipInfo(TIMESTAMP), data)
    return packed.getvalue()


def _with_extra(extra: bytes) -> bytes:
    """An archive whose first entry has that extra field in the directory."""
    data = archive({TIMESTAMP: b"x"})
    at = central(data)
    put(data, at + 30, "<H", len(extra))
    put(data, end(data) + 12, "<I", struct.unpack_from("<I", data, end(data) + 12)[0] + len(extra))
    cut = end(data)
    return bytes(data[:cut]) + extra + bytes(data[cut:])


@pytest.mark.fault("F58")
@pytest.mark.parametrize("case", HOSTILE)
def test_an_archive_that_can_be_read_in_two_ways_is_refused(case: str, tmp_path: Path) -> None:
    why, make = HOSTILE[case]
    assert why in refused(bytes(make()), tmp_path).message


@pytest.mark.fault("F59")
def test_a_bomb_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    """50 MiB of zeros deflate to 51 kB; the directory tells, and nothing is inflated."""
    bomb = bytes(archive({TIMESTAMP: bytes(50 << 20)}, method=zipfile.ZIP_DEFLATED))
    assert len(bomb) < 60_000
    tracemalloc.start()
    assert "compressed" in refused(bomb, tmp_path).message
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.fault("F62")
def test_a_directory_without_end_is_refused_unread(tmp_path: Path) -> None:
    data = put(archive(), end(archive()) + 8, "<HH", stored.MAX_ENTRIES + 1, stored.MAX_ENTRIES + 1)
    assert "more than" in refused(data, tmp_path).message
    sparse = tmp_path / "sparse.zip"
    with sparse.open("wb") as file:
        file.truncate(3 << 30)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, 3 << 30, 0, 0))
    with pytest.raises(TransferError) as caught:
        read(sparse)
    assert caught.value.reason is Reason.BAD_ARCHIVE


def test_as_many_entries_as_allowed_are_read_quickly_and_in_little_memory(tmp_path: Path) -> None:
    many = {f"payloads/{index:064x}": b"" for index in range(stored.MAX_ENTRIES - 1)} | {TIMESTAMP: b"found"}
    path = tmp_path / "many.zip"
    path.write_bytes(archive(many))
    tracemalloc.start()
    assert read(path) == b"found"
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_an_archive_of_another_packer_is_read_if_it_only_stores(tmp_path: Path) -> None:
    """Folders of their own and dates in extra fields, as Info-ZIP writes them with `zip -0 -r`."""
    dates = struct.pack("<HHBI", 0x5455, 5, 1, 1_700_000_000)
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as made:
        for name, data in {"metadata/": b"", **FILES}.items():
            entry = zipfile.ZipInfo(name)
            entry.extra = dates
            entry.external_attr = ((stat.S_IFDIR if name.endswith("/") else stat.S_IFREG) | 0o644) << 16
            made.writestr(entry, data)
    (tmp_path / "stick.zip").write_bytes(packed.getvalue())
    assert read(tmp_path / "stick.zip") == FILES[TIMESTAMP]
    assert read(tmp_path / "stick.zip", ROOT) == FILES[ROOT]


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.fault("F57")
@pytest.mark.parametrize("replace", [_link, _pipe])
def test_a_file_that_is_replaced_by_a_link_or_a_pipe_is_not_read(
    tmp_path: Path, replace: Callable[[Path], None]
) -> None:
    path = tmp_path / "stick.zip"
    path.write_bytes(archive())
    transport = ZipTransport(path, DEVICE)
    assert asyncio.run(transport.metadata("timestamp", None, 1000))
    replace(path)
    with pytest.raises(TransferError) as caught:
        asyncio.run(transport.metadata("timestamp", None, 1000))
    assert caught.value.reason in (Reason.UNSAFE_FILE, Reason.SOURCE_UNREACHABLE)


@pytest.mark.fault("F60")
@pytest.mark.parametrize("change", ["replaced", "cut short", "grown"])
def test_an_archive_that_changes_after_its_directory_was_read_is_not_read_on(tmp_path: Path, change: str) -> None:
    path = tmp_path / "stick.zip"
    path.write_bytes(archive())
    transport = ZipTransport(path, DEVICE)
    assert asyncio.run(transport.metadata("timestamp", None, 1000)) == FILES[TIMESTAMP]
    data = bytes(archive({TIMESTAMP: b"T" * 180, ROOT: b"R" * 120, f"devices/{DEVICE}/desired.json": b"DESIRED"}))
    path.write_bytes({"replaced": data, "cut short": data[:100], "grown": data + data}[change])
    os.utime(path, (1, 1))
    with pytest.raises(TransferError) as caught:
        asyncio.run(transport.metadata("timestamp", None, 1000))
    assert (caught.value.reason, caught.value.retry) == (Reason.SOURCE_UNREACHABLE, True)


def test_an_update_from_a_zip_ends_in_the_same_bytes_as_over_the_network(committed: Device, tmp_path: Path) -> None:
    committed.release("1.1.0")
    committed.repository.write(tmp_path / "stick", DEVICE)
    committed.transport.unreachable = True
    event = run(committed.reboot().sideload(pack(tmp_path / "stick", tmp_path / "stick.zip")))[-1]
    assert event.outcome == "committed"
    plain = committed.repository.built[LINE, "1.1.0"].plain["int8"]
    assert committed.host.serving[LINE] == ("1.1.0", plain)
    assert (committed.disk / "store" / f"{sha256(plain)}.cbs").exists()  # type: ignore[operator]


def test_a_bad_archive_ends_the_update_with_its_reason(committed: Device, tmp_path: Path) -> None:
    (tmp_path / "stick.zip").write_bytes(b"not a zip file at all, but long enough for one")
    event = run(committed.reboot().sideload(tmp_path / "stick.zip"))[-1]
    assert (event.outcome, event.reason, committed.serving) == ("failed", Reason.BAD_ARCHIVE, "1.0.0")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_accepted_reads_like_any_other_reader_reads_it(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed anywhere: refused by its reason, or the same names and bytes as the standard library finds."""
    mutated = archive()
    for _ in range(data.draw(st.integers(1, 4))):
        offset = data.draw(st.integers(0, len(mutated) - 1))
        mutated[offset] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del mutated[data.draw(st.integers(0, len(mutated))) :]
    path = tmp_path / "stick.zip"
    path.write_bytes(mutated)
    fd = os.open(path, os.O_RDONLY)
    entries: dict[str, stored.Entry] | None = None
    why = None
    try:
        entries = stored.read_directory(fd, len(mutated))
    except OtaError as e:
        why = e.reason
    finally:
        os.close(fd)
    if entries is None:
        assert why is Reason.BAD_ARCHIVE
        return
    with zipfile.ZipFile(path) as other:
        assert sorted(entries) == sorted(other.namelist())
        for name, entry in entries.items():
            info = other.getinfo(name)
            assert (entry.length, entry.offset, info.compress_type) == (info.file_size, info.header_offset, 0)
