"""A disk that is full, fails or turns read-only at each single call of an update: the step is given up, nothing of it
stays, the old release serves on, the cause is reported, and a later check completes."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ota.client.fsops import TEMPORARY_SUFFIX, Disk, Fs
from ota.errors import Reason
from tests.crash import scenes
from tests.crash.memory import MemoryDisk, Possibilities
from tests.crash.scene import CrashDevice, Scene, exactly, fresh, like, one_thread, told
from tests.ota.client.conftest import LINE, model, run

REASONS = {
    errno.ENOSPC: Reason.NO_SPACE,
    errno.EDQUOT: Reason.NO_SPACE,
    errno.EIO: Reason.IO_ERROR,
    errno.EROFS: Reason.IO_ERROR,
    errno.ENAMETOOLONG: Reason.IO_ERROR,
}
# a full disk still removes files and makes what is there durable
NEEDS_SPACE = ("mkdir", "write", "fsync", "rename")
CHANGES = (*NEEDS_SPACE, "truncate", "fsync_dir", "unlink")


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """No threads, so that a disk's n-th call is the same call every time."""
    with one_thread():
        yield


class FailingDisk(MemoryDisk):
    """Refuses its `at`-th call of `kinds` with an error, and every later one if it fails `forever`."""

    def __init__(self, root: MemoryDisk, error: int, at: int, kinds: tuple[str, ...], *, forever: bool) -> None:
        super().__init__()
        self.root = root.root
        self.error, self.at, self.kinds, self.forever = error, at, kinds, forever
        self.calls = 0

    @property
    def failed(self) -> bool:
        """Whether it came to that."""
        return self.calls >= self.at

    def _call(self, kind: str) -> None:
        if kind in self.kinds:
            self.calls += 1
            if self.calls == self.at or (self.forever and self.calls > self.at):
                raise OSError(self.error, "injected")

    def mkdir(self, path: str) -> None:
        try:
            self._at_path(path)
        except FileNotFoundError:
            self._call("mkdir")
        super().mkdir(path)  # Linux says "exists" first, also of a read-only disk

    def write(self, path: str, offset: int, data: bytes) -> None:
        self._call("write")
        super().write(path, offset, data)

    def truncate(self, path: str, length: int) -> None:
        self._call("truncate")
        super().truncate(path, length)

    def fsync(self, path: str) -> None:
        self._call("fsync")
        super().fsync(path)

    def fsync_dir(self, path: str) -> None:
        self._call("fsync_dir")
        super().fsync_dir(path)

    def rename(self, source: str, destination: str) -> None:
        self._call("rename")
        super().rename(source, destination)

    def unlink(self, path: str) -> None:
        self._file(path)
        self._call("unlink")
        super().unlink(path)


def prepared(tmp_path: Path) -> Scene:
    """A device that runs 1.0.0, with 1.1.0 waiting for it."""
    scene = scenes.update(tmp_path)
    scene.device.reboot()
    scene.disk.settle()
    return scene


def fails_at(scene: Scene, error: int, at: int, kinds: tuple[str, ...], *, forever: bool) -> bool:
    """Let the disk fail in an update of a fresh copy of the device; False when the update made fewer calls."""
    where = f"{errno.errorcode[error]} at call {at}{' and from then on' if forever else ''}"
    device = scene.booted(scene.disk.snapshot())
    updater = device.reboot()
    failing = FailingDisk(device.disk, error, at, kinds, forever=forever)  # type: ignore[arg-type]
    updater._fs._disk = failing  # type: ignore[attr-defined] # the disk fails beneath a running process
    events = run(updater.check())
    if not failing.failed:
        return False
    active = updater.record.line(LINE).active
    assert active is not None
    assert device.serving == active.version, f"{where}: {device.serving} serves, {active.version} is recorded"
    reported = [event for event in device.events if event.reason is REASONS[error]]
    assert reported, f"{where}: not reported"
    assert all(event.hint for event in reported), where
    assert not [e for e in device.events if e.reason not in (None, REASONS[error])], f"{where}: {device.reasons}"
    if events[-1].outcome != "committed" and active.version == "1.1.0":
        assert events[-1].reason is REASONS[error], f"{where}: {events[-1]}"
    if "unlink" not in kinds:
        left = [path for path, _ in failing.files() if path.endswith(TEMPORARY_SUFFIX)]
        assert not left, f"{where}: {left}"
    failing.at, failing.forever = 1 << 30, False  # there is space again, and the same process goes on
    event = device.check(updater)
    assert event.outcome in ("committed", "up_to_date"), f"{where}: the next check ends with {told(event)}"
    after_restart(device, failing, where)
    return True


def after_restart(device: CrashDevice, disk: MemoryDisk, where: str) -> None:
    """Boot once more: the new release serves, and nothing is left over."""
    again = replace(device, disk=disk, events=[])
    assert again.check().outcome == "up_to_date", where
    assert again.serving == "1.1.0", where
    assert not again.boot().record.line(LINE).quarantine, where
    exactly(disk)


@pytest.mark.fault("F8")
@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
def test_a_disk_that_is_full_at_any_call_of_an_update_stops_that_update_alone(forever: bool, tmp_path: Path) -> None:
    scene, at = prepared(tmp_path), 1
    while fails_at(scene, errno.ENOSPC, at, NEEDS_SPACE, forever=forever):
        at += 1
    print(f"\nfull at each of {at - 1} calls")
    assert at > 80


@pytest.mark.fault("F10")
@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS], ids=errno.errorcode.__getitem__)
def test_a_disk_that_fails_at_any_call_of_an_update_stops_that_update_alone(
    error: int, forever: bool, tmp_path: Path
) -> None:
    scene, at = prepared(tmp_path), 1
    while fails_at(scene, error, at, CHANGES, forever=forever):
        at += 2 if error == errno.EIO else 5
    assert at > 120


def test_a_hole_takes_no_space(tmp_path: Path) -> None:
    fs = Fs(tmp_path)
    fs.write_at("part", 1 << 22, b"the last block came first")
    assert fs.size("part") == (1 << 22) + 25
    assert 0 < fs.allocated("part") < 1 << 20
    assert fs.allocated("absent") == 0


@pytest.mark.fault("F10")
def test_a_device_that_starts_on_a_read_only_disk_serves_whatever_a_cut_left_there(tmp_path: Path) -> None:
    """ext4 is mounted read-only after an error, often at the very start that follows a cut."""
    scene = scenes.update(tmp_path).record()
    served, reported = set(), 0
    for number, moment in enumerate(scene.moments):
        possible = Possibilities(moment.disk)
        for picks in possible.picks(4, number):
            device = scene.booted(possible.disk(picks))
            disk = FailingDisk(device.disk, errno.EROFS, 1, CHANGES, forever=True)  # type: ignore[arg-type]
            device = replace(device, disk=disk)
            updater = device.reboot()
            assert device.serving in ("1.0.0", "1.1.0")
            served.add(device.serving)
            event = device.check(updater)
            assert event.outcome in ("failed", "up_to_date"), told(event)
            assert event.outcome == "up_to_date" or event.reason is Reason.IO_ERROR, told(event)
            reported += event.reason is Reason.IO_ERROR
            assert device.serving in served
    assert served == {"1.0.0", "1.1.0"}
    assert reported > 50


@pytest.mark.fault("F14")
@pytest.mark.parametrize("error", [errno.EDQUOT, errno.ENAMETOOLONG], ids=errno.errorcode.__getitem__)
def test_a_quota_or_a_limit_of_names_is_reported_as_what_it_is(error: int, tmp_path: Path) -> None:
    scene, at = prepared(tmp_path), 1
    while fails_at(scene, error, at, NEEDS_SPACE, forever=True):
        at += 7
    assert at > 80


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for bytes and for hardly any files."""
    if os.geteuid() != 0:
        assert not os.environ.get("CI"), "not root"
        pytest.skip("mounting a file system needs root")
    mount = tmp_path / "few"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=14,size=64m", "tmpfs", mount], check=True)
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.mark.fault("F14")
def test_a_file_system_without_free_inodes_is_reported_as_full_and_the_update_completes_later(
    few_inodes: Path,
) -> None:
    device = fresh()
    device.disk = Disk(few_inodes)
    device.release("1.0.0", data=like("1.0.0"))
    event = device.check()
    assert (event.outcome, event.reason) == ("failed", Reason.NO_SPACE)
    assert event.hint
    assert not list(few_inodes.rglob("*" + TEMPORARY_SUFFIX))
    subprocess.run(["mount", "-o", "remount,nr_inodes=0", few_inodes], check=True)
    assert device.check().outcome == "committed"
    assert device.serving == "1.0.0"


@pytest.mark.fault("F9")
def test_what_was_fetched_of_a_release_that_is_not_wanted_any_more_makes_room_for_the_next() -> None:
    """The same process goes on for months: nothing else would free the disk."""
    device = fresh()
    disk = device.disk
    assert isinstance(disk, MemoryDisk)
    device.release("1.0.0", data=like("1.0.0"))
    assert device.check().outcome == "committed"
    updater = device.reboot()
    device.release("1.1.0", data=model(110, 500_000))
    device.transport.cut_after = 6
    assert device.check(updater).outcome == "failed"
    left = sum(len(file.content) for path, file in disk.files() if path.endswith(".part"))
    assert left > 200_000
    device.transport.cut_after = None
    # room for one more release, not for what is left of another beside it
    disk.capacity_bytes = disk.used_bytes() - left + 2 * 500_000 + device.limits.reserve_bytes + 150_000
    device.release("1.2.0", data=model(120, 500_000))
    event = device.check(updater)
    assert (event.outcome, device.serving) == ("committed", "1.2.0"), told(event)
    exactly(disk)
