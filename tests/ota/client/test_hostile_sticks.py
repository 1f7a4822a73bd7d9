"""Sticks that somebody prepared, or that break while they are read: the device serves on, quickly, and says why."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ota.client.transports.directory import DirectoryTransport
from ota.errors import Reason
from tests.contract.test_transports import pack
from tests.ota.client.conftest import DEVICE, LINE, Device, model, run
from tests.ota.client.simulator import sha256

SECRET = b"root:$6$secret:19000:0:99999:7:::\n"


@pytest.fixture
def stick(committed: Device, tmp_path: Path) -> Path:
    """A stick with 1.1.0 for a device that runs 1.0.0 and has no network."""
    committed.release("1.1.0", data=model(110, 400_000))
    folder = tmp_path / "stick"
    committed.repository.write(folder, DEVICE)
    committed.transport.unreachable = True
    return folder


def payload(device: Device, stick: Path) -> Path:
    document = json.loads(device.repository.built[LINE, "1.1.0"].data)
    return stick / "payloads" / document["components"][0]["full"]["sha256"]


def places(device: Device, stick: Path) -> list[Path]:
    """One file of every kind that is opened."""
    built = device.repository.built[LINE, "1.1.0"]
    return [
        stick / "metadata/timestamp.json",
        stick / "metadata/2.root.json",  # absent on a good stick: the walk along the roots looks for it
        stick / f"devices/{DEVICE}/desired.json",
        stick / f"targets/{LINE}/1.1.0/{sha256(built.data)}.release.json",
        payload(device, stick),
    ]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has a hundred bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def _folder(path: Path) -> None:
    path.mkdir()


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _out_of_the_stick(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _endless(path: Path) -> None:
    os.mknod(path, 0o644 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero


def _disk(path: Path) -> None:
    os.mknod(path, 0o644 | stat.S_IFBLK, os.makedev(7, 0))  # /dev/loop0


@pytest.mark.fault("F57")
@pytest.mark.parametrize("what", range(5), ids=["timestamp", "root", "desired", "release", "payload"])
@pytest.mark.parametrize("put", [_fifo, _socket, _folder, _dangling, _out_of_the_stick, _endless, _disk])
def test_no_special_file_is_ever_read_or_waited_for(
    committed: Device, stick: Path, put: Callable[[Path], None], what: int
) -> None:
    if put in (_endless, _disk) and os.geteuid():
        pytest.skip("only root makes device nodes")
    place = places(committed, stick)[what]
    place.unlink(missing_ok=True)
    put(place)
    began = time.monotonic()
    event = run(committed.reboot().sideload(stick))[-1]
    assert (event.outcome, event.reason, committed.serving) == ("failed", Reason.UNSAFE_FILE, "1.0.0")
    assert time.monotonic() - began < 2


@pytest.mark.fault("F57")
def test_a_file_that_is_a_hard_link_to_a_secret_tells_nothing_of_it(
    committed: Device, stick: Path, tmp_path: Path
) -> None:
    """It is a regular file, so it is read; what was read is in no message and nowhere on the device."""
    (tmp_path / "shadow").write_bytes(SECRET)
    for place in places(committed, stick):
        backup = place.read_bytes() if place.exists() else None
        place.unlink(missing_ok=True)
        os.link(tmp_path / "shadow", place)
        event = run(committed.reboot().sideload(stick))[-1]
        assert event.outcome in ("failed", "rejected")
        assert "secret" not in event.message + event.hint
        place.unlink()
        if backup is not None:
            place.write_bytes(backup)
    for kept in committed.disk.rglob("*"):  # type: ignore[union-attr]
        assert not kept.is_file() or SECRET not in kept.read_bytes()


@pytest.mark.fault("F62")
def test_a_hundred_thousand_files_and_a_deep_tree_cost_nothing(committed: Device, stick: Path, tmp_path: Path) -> None:
    crowded = Path("/dev/shm") / f"stick-{os.getpid()}"  # in memory: they have to be made first
    shutil.copytree(stick, crowded)
    try:
        for folder in ("metadata", "payloads"):
            for number in range(50_000):
                os.close(os.open(crowded / folder / f"{number:064x}", os.O_CREAT | os.O_WRONLY))
        fd = os.open(crowded / "targets", os.O_RDONLY)
        for _ in range(2_000):
            os.mkdir("deeper", dir_fd=fd)
            below = os.open("deeper", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        updater = committed.reboot()
        tracemalloc.start()
        began = time.monotonic()
        assert run(updater.sideload(crowded))[-1].outcome == "committed"
        assert time.monotonic() - began < 5
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        tracemalloc.stop()
    finally:
        # Python's own recursion ends before two thousand folders
        subprocess.run(["rm", "-rf", str(crowded)], check=True)


@pytest.mark.fault("F66")
def test_a_place_with_escapes_in_its_name_is_read_like_any_other(
    committed: Device, stick: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "LABEL\x1b[2J\x1b]0;owned\x07\nerror: all is well [ok]\r\u202e"
    stick.rename(odd)
    assert run(committed.reboot().sideload(odd))[-1].outcome == "committed"
    event = run(committed.reboot().sideload(odd / "absent"))[-1]
    assert event.reason is Reason.SOURCE_UNREACHABLE


@pytest.mark.fault("F60")
@pytest.mark.parametrize("zipped", [False, True], ids=["directory", "zip"])
def test_a_read_error_at_any_call_is_told_and_the_next_try_completes(
    committed: Device, stick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    """Every third of all system calls that touch the stick, from the first look to the last block."""
    place = pack(stick, tmp_path / "stick.zip") if zipped else stick
    genuine = {name: getattr(os, name) for name in ("stat", "open", "fstat", "read", "pread", "close")}
    kept = tmp_path / "kept"
    shutil.copytree(committed.disk, kept)  # type: ignore[arg-type]
    calls = at = 0

    def failing(name: str) -> Callable[..., object]:
        def call(first: object, *args: object, dir_fd: int | None = None, **named: object) -> object:
            nonlocal calls
            named |= {} if dir_fd is None else {"dir_fd": dir_fd}
            held = dir_fd if dir_fd is not None else first if isinstance(first, int) else None
            touches = str(first if held is None else os.readlink(f"/proc/self/fd/{held}")).startswith(str(place))
            calls += touches
            if touches and calls == at:
                if name == "close":
                    genuine["close"](first)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return genuine[name](first, *args, **named)

        return call

    descriptors = len(os.listdir("/proc/self/fd"))
    while calls >= at:
        at, calls = at + 3, 0
        shutil.rmtree(committed.disk)  # type: ignore[arg-type]
        shutil.copytree(kept, committed.disk)  # type: ignore[arg-type]
        updater = committed.reboot()
        with monkeypatch.context() as patch:
            for name in genuine:
                patch.setattr(os, name, failing(name))
            event = run(updater.sideload(place))[-1]
        if event.outcome != "committed":
            assert (event.reason, committed.serving) == (Reason.SOURCE_UNREACHABLE, "1.0.0"), f"call {at}"
            assert event.hint
        assert run(updater.sideload(place))[-1].outcome in ("committed", "up_to_date"), f"after call {at}"
    assert at > 40
    assert len(os.listdir("/proc/self/fd")) == descriptors


# -- changes between verification and use ------------------------------------------------------------------------------


@contextmanager
def flickering(place: Path, good: bytes, bad: bytes) -> Iterator[None]:
    """A file whose content changes back and forth as fast as it can be written, in place and by rename."""
    stop = threading.Event()

    def flicker() -> None:
        other = place.with_name("other")
        while not stop.is_set():
            place.write_bytes(bad)
            other.write_bytes(good)
            other.replace(place)

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.fault("F60")
@pytest.mark.parametrize("what", [0, 2, 3, 4], ids=["timestamp", "desired", "release", "payload"])
def test_a_file_that_changes_all_the_time_is_taken_whole_or_not_at_all(
    committed: Device, stick: Path, what: int
) -> None:
    place = places(committed, stick)[what]
    good = place.read_bytes()
    bad = bytes([good[0] ^ 1]) + good[1 : len(good) // 2] + bytes(len(good) - len(good) // 2)
    plain = committed.repository.built[LINE, "1.1.0"].plain["int8"]
    updater = committed.reboot()
    with flickering(place, good, bad):
        for _ in range(5):
            event = run(updater.sideload(stick))[-1]
            version, served = committed.host.serving[LINE]
            assert served == (plain if version == "1.1.0" else committed.repository.built[LINE, "1.0.0"].plain["int8"])
            assert (version == "1.1.0") == (event.outcome in ("committed", "up_to_date")) or event.reason
    place.write_bytes(good)
    assert run(updater.sideload(stick))[-1].outcome in ("committed", "up_to_date")
    assert committed.host.serving[LINE] == ("1.1.0", plain)


@pytest.mark.fault("F60")
@pytest.mark.parametrize("zipped", [False, True], ids=["directory", "zip"])
def test_a_stick_that_is_pulled_after_it_was_copied_is_not_missed(
    committed: Device, stick: Path, tmp_path: Path, zipped: bool
) -> None:
    """What is tried and served is the verified copy: nothing is read from the stick any more."""
    place = pack(stick, tmp_path / "stick.zip") if zipped else stick
    gate = committed.host.hold["self_test", "1.1.0"] = asyncio.Event()
    updater = committed.reboot()

    async def scenario() -> None:
        update = asyncio.create_task(updater.sideload(place))
        while not any(call[0] == "self_test" and call[2] == "1.1.0" for call in committed.host.calls):
            await asyncio.sleep(0.005)
        place.unlink() if zipped else shutil.rmtree(place)
        gate.set()
        assert (await update)[-1].outcome == "committed"

    run(scenario())
    assert committed.serving == "1.1.0"


@pytest.mark.fault("F60")
@pytest.mark.parametrize("blocks", [0, 1, 3, 5])
def test_a_stick_that_is_pulled_half_way_is_gone_on_with_when_it_comes_back(
    committed: Device, stick: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    genuine, away = DirectoryTransport.block, stick.with_name("away")
    left = iter(range(blocks))

    async def block(self: DirectoryTransport, sha256: str, offset: int, length: int) -> bytes:
        if next(left, None) is None and stick.exists():
            stick.rename(away)
        return await genuine(self, sha256, offset, length)

    monkeypatch.setattr(DirectoryTransport, "block", block)
    event = run(committed.reboot().sideload(stick))[-1]
    assert (event.outcome, event.reason, committed.serving) == ("failed", Reason.SOURCE_UNREACHABLE, "1.0.0")
    monkeypatch.setattr(DirectoryTransport, "block", genuine)
    away.rename(stick)
    event = run(committed.reboot().sideload(stick))[-1]
    assert (event.outcome, committed.serving) == ("committed", "1.1.0")
    # what had arrived was not read again
    assert event.traffic.fetched_bytes <= event.traffic.full_bytes - 65536 * max(0, blocks - 4)
