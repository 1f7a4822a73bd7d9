"""A stick or a folder as the source: the same trust, and nothing on it can be anything but a regular file."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ota.client.limits import Limits
from ota.client.transports import stick as stick_transport
from ota.client.transports.directory import DirectoryTransport
from ota.client.transports.zip import ZipTransport
from ota.errors import OtaError, Reason
from tests.contract.test_transports import pack
from tests.ota.client.conftest import DEVICE, LINE, Device, run
from tests.ota.client.simulator import LATER, PAST, Simulator, sha256


@pytest.fixture
def stick(committed: Device, tmp_path: Path) -> Path:
    """A stick with 1.1.0 for a device that runs 1.0.0 and has no network."""
    committed.release("1.1.0")
    folder = tmp_path / "stick"
    committed.repository.write(folder, DEVICE)
    committed.transport.unreachable = True
    return folder


def _payload(device: Device, stick: Path) -> Path:
    import json

    document = json.loads(device.repository.built[LINE, "1.1.0"].data)
    return stick / "payloads" / document["components"][0]["full"]["sha256"]


def test_an_update_from_a_stick_ends_in_the_same_bytes_as_over_the_network(committed: Device, stick: Path) -> None:
    event = run(committed.reboot().sideload(stick))[-1]
    assert event.outcome == "committed"
    plain = committed.repository.built[LINE, "1.1.0"].plain["int8"]
    assert committed.host.serving[LINE] == ("1.1.0", plain)
    assert (committed.disk / "store" / f"{sha256(plain)}.cbs").exists()


@pytest.mark.fault("F64")
def test_the_same_stick_twice_is_already_installed(committed: Device, stick: Path) -> None:
    updater = committed.reboot()
    assert run(updater.sideload(stick))[-1].outcome == "committed"
    assert run(updater.sideload(stick))[-1].outcome == "up_to_date"


def test_metadata_floors_of_a_stick_are_its_own_and_the_release_counter_is_shared(
    committed: Device, stick: Path
) -> None:
    for _ in range(5):
        committed.repository.publish()
    committed.transport.unreachable = False
    committed.repository.desired[DEVICE] = (stick / "devices" / DEVICE / "desired.json").read_bytes()
    newest = committed.release("1.2.0")
    assert committed.check().outcome == "committed"
    event = run(committed.reboot().sideload(stick))[-1]
    assert (event.reason, committed.serving) == (Reason.COUNTER_ROLLBACK, newest.version)


@pytest.mark.fault("F63")
@pytest.mark.parametrize("kind", ["expired", "wrong_root"])
def test_an_expired_stick_or_one_of_another_publisher_is_refused(committed: Device, tmp_path: Path, kind: str) -> None:
    repository = committed.repository if kind == "expired" else Simulator()
    if kind == "expired":
        repository.timestamp.signed.expires = PAST
    built = repository.build(LINE, "1.1.0", {"int8": b"model"}, b"golden", counter=9)
    repository.grant(DEVICE, committed.key, built, expires=LATER)
    repository.write(tmp_path / "stick", DEVICE)
    event = run(committed.reboot().sideload(tmp_path / "stick"))[-1]
    assert event.reason is (Reason.TIMESTAMP_EXPIRED if kind == "expired" else Reason.BAD_SIGNATURE)
    assert committed.serving == "1.0.0"


def _link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target.name)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _socket(path: Path) -> None:
    path.unlink()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.fault("F57")
@pytest.mark.parametrize("replace", [_link, _pipe, _folder, _socket, _device])
@pytest.mark.parametrize("what", ["timestamp", "payload"])
def test_anything_but_a_regular_file_is_refused(
    committed: Device, stick: Path, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Path], None], what: str
) -> None:
    monkeypatch.chdir(stick)
    replace(stick / "metadata" / "timestamp.json" if what == "timestamp" else _payload(committed, stick))
    event = run(committed.reboot().sideload(stick))[-1]
    assert (event.outcome, event.reason) == ("failed", Reason.UNSAFE_FILE)
    assert committed.serving == "1.0.0"


@pytest.mark.parametrize("folder", ["metadata", "payloads", f"targets/{LINE}", "devices"])
def test_a_folder_that_is_a_link_is_refused(committed: Device, stick: Path, folder: str) -> None:
    _link(stick / folder)
    event = run(committed.reboot().sideload(stick))[-1]
    assert (event.outcome, event.reason) == ("failed", Reason.UNSAFE_FILE)


@pytest.mark.fault("F60")
def test_a_stick_that_changes_or_vanishes_while_it_is_read_changes_nothing(committed: Device, stick: Path) -> None:
    path = _payload(committed, stick)
    data = bytearray(path.read_bytes())
    data[70_000] ^= 1
    path.write_bytes(data)
    updater = committed.reboot()
    assert run(updater.sideload(stick))[-1].reason is Reason.TRANSFER_CORRUPT
    shutil.rmtree(stick)
    assert run(updater.sideload(stick))[-1].reason is Reason.SOURCE_UNREACHABLE
    assert committed.serving == "1.0.0"


def test_a_payload_cut_short_on_the_stick_is_refused(committed: Device, stick: Path) -> None:
    path = _payload(committed, stick)
    path.write_bytes(path.read_bytes()[:-10])
    assert run(committed.reboot().sideload(stick))[-1].reason is Reason.TRANSFER_CORRUPT
    assert committed.serving == "1.0.0"


@pytest.mark.fault("F62")
def test_no_folder_is_ever_listed(committed: Device, stick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updater = committed.reboot()
    genuine = os.listdir

    def listdir(path: object) -> list[str]:
        assert not str(path).startswith(str(stick)), f"{path} was listed"
        return genuine(path)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "listdir", listdir)
    monkeypatch.setattr(os, "scandir", listdir)
    assert run(updater.sideload(stick))[-1].outcome == "committed"


@pytest.mark.fault("F65")
def test_a_stick_during_an_update_of_the_same_line_is_told_to_wait(committed: Device, stick: Path) -> None:
    committed.transport.unreachable = False
    gate = committed.host.hold["self_test", "1.1.0"] = asyncio.Event()
    updater = committed.reboot()

    async def scenario() -> None:
        round_ = asyncio.create_task(updater.check())
        while not any(call[0] == "self_test" and call[2] == "1.1.0" for call in committed.host.calls):
            await asyncio.sleep(0.001)
        assert (await updater.sideload(stick))[-1].reason is Reason.BUSY
        gate.set()
        assert (await round_)[-1].outcome == "committed"

    run(scenario())


def test_a_file_system_that_ends_behind_an_opened_file_is_unreachable_and_costs_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "timestamp.json").write_bytes(b"x")

    def fstat(fd: int) -> os.stat_result:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    async def ask() -> None:
        transport = DirectoryTransport(tmp_path, DEVICE)
        assert await transport.metadata("timestamp", None, 10) == b"x"
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", fstat)
            with pytest.raises(OtaError) as refusal:
                await transport.metadata("timestamp", None, 10)
        assert refusal.value.reason is Reason.SOURCE_UNREACHABLE
        assert len(os.listdir("/proc/self/fd")) == before

    run(ask())


@pytest.mark.fault("F60")
def test_a_stick_that_hangs_keeps_no_thread_from_the_rest_of_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "payloads").mkdir()
    (tmp_path / "payloads" / ("00" * 32)).write_bytes(bytes(10))
    goes_on = threading.Event()
    genuine = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        goes_on.wait()
        return genuine(fd, length, offset)

    async def scenario() -> None:
        transport = DirectoryTransport(tmp_path, DEVICE)
        monkeypatch.setattr(os, "pread", pread)
        reads = [asyncio.create_task(transport.block("00" * 32, 0, 10)) for _ in range(64)]
        await asyncio.sleep(0.05)
        try:
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 5) == "done"
        finally:
            goes_on.set()
        assert await asyncio.gather(*reads) == [bytes(10)] * 64

    run(scenario())


@pytest.mark.fault("F60")
@pytest.mark.parametrize("zipped", [False, True], ids=["directory", "zip"])
def test_a_bad_sector_in_the_middle_of_a_block_is_told_at_once_as_what_it_is(
    committed: Device, stick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    """The kernel gives what lies before the sector, as if the file ended there, and the error at the next read."""
    genuine, place = os.pread, pack(stick, tmp_path / "stick.zip") if zipped else stick
    bad, failed = 100_000, 0
    if zipped:
        with zipfile.ZipFile(place) as archive:
            bad += archive.getinfo(f"payloads/{_payload(committed, stick).name}").header_offset

    def pread(fd: int, length: int, offset: int) -> bytes:
        nonlocal failed
        large = os.fstat(fd).st_size > 150_000 and str(tmp_path) in os.readlink(f"/proc/self/fd/{fd}")
        if not large or "state" in os.readlink(f"/proc/self/fd/{fd}") or not offset <= bad < offset + length:
            return genuine(fd, length, offset)
        if offset == bad:
            failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return genuine(fd, bad - offset, offset)

    updater = committed.reboot()
    monkeypatch.setattr(os, "pread", pread)
    event = run(updater.sideload(place))[-1]
    assert (event.outcome, event.reason, committed.serving) == ("failed", Reason.SOURCE_UNREACHABLE, "1.0.0")
    assert "another stick" in event.hint
    assert failed < 4
    monkeypatch.undo()
    assert run(updater.sideload(place))[-1].outcome == "committed"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errno.EACCES, "readable for everybody"),
        (errno.EPERM, "readable for everybody"),
        (errno.ENOENT, "below /media or /mnt"),
        (errno.EIO, "another stick"),
        (errno.ENOTCONN, "still plugged in"),
    ],
    ids=["EACCES", "EPERM", "ENOENT", "EIO", "ENOTCONN"],
)
def test_what_to_do_about_a_stick_that_cannot_be_read_depends_on_why(
    stick: Path, monkeypatch: pytest.MonkeyPatch, error: int, advice: str
) -> None:
    def fails(*_: object, **__: object) -> int:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fails)
        with pytest.raises(OtaError) as refusal:
            stick_transport.open_stick(stick, DEVICE)
    assert (refusal.value.reason, advice in refusal.value.hint) == (Reason.SOURCE_UNREACHABLE, True)
    for transport in (DirectoryTransport(stick, DEVICE), ZipTransport(stick, DEVICE)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fails)
            with pytest.raises(OtaError) as refusal:
                run(transport.desired(1000))
        assert (refusal.value.reason, advice in refusal.value.hint) == (Reason.SOURCE_UNREACHABLE, True)


def test_a_folder_around_the_bundle_is_told_from_a_stick_for_another_device(stick: Path) -> None:
    for place, device, advice in (
        (stick.parent, DEVICE, "name the folder or the .zip itself"),
        (stick, "cam-2", "edge-ota bundle REPO cam-2 OUT writes a stick for it"),
    ):
        with pytest.raises(OtaError) as refusal:
            run(stick_transport.check_names(DirectoryTransport(place, device), device))
        assert refusal.value.reason is Reason.NOT_FOR_THIS_DEVICE
        assert advice in refusal.value.hint


@pytest.mark.fault("F60")
def test_a_stick_that_hangs_keeps_no_process_from_ending() -> None:
    """The technician has his error and wants his prompt back."""
    program = """
import asyncio, time
from ota.client.transports.reading import aside
try:
    asyncio.run(asyncio.wait_for(aside(time.sleep, 600), 0.1))
except TimeoutError:
    print("the stick does not answer")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "the stick does not answer\n"


def test_a_stick_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(DirectoryTransport):
        async def desired(self, max_bytes: int) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr(stick_transport, "Limits", lambda: Limits(metadata_timeout_s=0.05))
    with pytest.raises(OtaError) as refusal:
        run(stick_transport.check_names(Hanging(tmp_path, DEVICE), DEVICE))
    assert refusal.value.reason is Reason.TRANSFER_TIMEOUT


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_cannot_be_a_name_is_refused_like_what_is_absent(tmp_path: Path, name: str) -> None:
    with pytest.raises(OtaError) as refusal:
        stick_transport.open_stick(tmp_path / name, DEVICE)
    assert refusal.value.reason is Reason.SOURCE_UNREACHABLE


@pytest.mark.parametrize("role", ["../root", "release-../x", "mirror", "release-", "timestamp\0"])
def test_names_out_of_the_grammar_never_reach_the_disk(tmp_path: Path, role: str) -> None:
    with pytest.raises(OtaError) as refusal:
        run(DirectoryTransport(tmp_path, DEVICE).metadata(role, 1, 10))
    assert refusal.value.reason is Reason.BAD_TARGET_NAME


def test_a_document_larger_than_asked_for_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    with (tmp_path / "metadata" / "timestamp.json").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(OtaError) as refusal:
        run(DirectoryTransport(tmp_path, DEVICE).metadata("timestamp", None, 1000))
    assert refusal.value.reason is Reason.METADATA_TOO_LARGE
