"""A stick as people have them: a real FAT32 file system, read by another implementation than wrote it, and pulled out.

The image is made by dosfstools, filled by mtools and mounted by fusefat, whose process can be killed at any moment: the
mount then answers every access with an error, as a pulled stick does. (The kernel's own vfat reads one in tests/vm.)
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ota.client.limits import Limits
from ota.client.ports import UpdateEvent
from ota.errors import Reason
from tests.ota.client.stickfleet import Device, Fleet

REAL = Limits(reserve_bytes=1 << 16, retry_base_s=0.02, retry_cap_s=0.2)
IMAGE_BYTES = 64 << 20
MODEL_BYTES = 3_000_000
PROGRAMS = {"mkfs.vfat": "dosfstools", "mcopy": "mtools", "fusefat": "fusefat", "fusermount": "fuse3"}


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    """Under CI=true a missing program is a failure, elsewhere a named skip."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None]
    reason = f"not installed: {', '.join(absent)}" if absent else ""
    if not reason and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        reason = "no /dev/fuse here"
    if reason and os.environ.get("CI") == "true" and absent:
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@dataclass
class Mounted:
    """A mounted image. `pull` makes every further access fail."""

    place: Path
    process: subprocess.Popen[bytes]

    def pull(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def fat_image(content: Path, to: Path) -> Path:
    """A FAT32 image with a copy of `content` (a file, or what is in a directory)."""
    with to.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "MTOOLS_SKIP_CHECK": "1"}
    made = ["mkfs.vfat", "-F", "32", "-n", "STICK", str(to)]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL, env=environment)
    sources = sorted(content.iterdir()) if content.is_dir() else [content]
    subprocess.run(["mcopy", "-s", "-i", str(to), *map(str, sources), "::/"], check=True, env=environment)
    return to


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Mounted]:
    """The image, read-only at `place`."""
    place.mkdir(exist_ok=True)
    process = subprocess.Popen(
        ["fusefat", "-f", "-o", "ro", str(image), str(place)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not os.path.ismount(place):
            assert process.poll() is None, "fusefat ended"
            assert time.monotonic() < deadline, "fusefat did not mount"
            time.sleep(0.02)
        yield Mounted(place, process)
    finally:
        process.kill()
        process.wait()
        subprocess.run(["fusermount", "-uqz", str(place)], check=False)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """A device without a network whose next release is large."""
    fleet = Fleet(tmp_path)
    made = Device(fleet, limits=REAL)
    fleet.release("1.0.0", grant_to=("cam-1",), size=MODEL_BYTES)
    return made


@pytest.mark.fault("F61")
@pytest.mark.parametrize("suffix", ["", ".zip"], ids=["directory", "zip"])
def test_a_release_is_installed_from_a_real_fat_file_system(device: Device, tmp_path: Path, suffix: str) -> None:
    stick = device.fleet.stick("cam-1", suffix)
    with mounted(fat_image(stick, tmp_path / "stick.img"), tmp_path / "media") as media:
        event = device.plug(media.place / stick.name if suffix else media.place)
        assert (event.outcome, device.serving) == ("committed", "1.0.0")
        assert device.plug(media.place / stick.name if suffix else media.place).outcome == "up_to_date"


@pytest.mark.fault("F60")
@pytest.mark.parametrize("suffix", ["", ".zip"], ids=["directory", "zip"])
def test_a_stick_that_is_pulled_half_way_is_gone_on_with_when_it_is_back(
    device: Device, tmp_path: Path, suffix: str
) -> None:
    """The file system dies under the reader while the payload is copied; nothing hangs, nothing is read twice."""
    stick = device.fleet.stick("cam-1", suffix)
    image, place = fat_image(stick, tmp_path / "stick.img"), tmp_path / "media"
    named = place / stick.name if suffix else place
    with mounted(image, place) as media:
        puller = threading.Thread(target=_pull_when_half, args=(media, device.state))
        puller.start()
        event = _bounded(device, named)
        puller.join()
    assert (event.outcome, event.reason, device.serving) == ("failed", Reason.SOURCE_UNREACHABLE, "")
    arrived = sum(path.stat().st_blocks * 512 for path in (device.state / "inbox").glob("*.part"))
    assert arrived > 0
    with mounted(image, place):
        event = _bounded(device, named)
    assert (event.outcome, device.serving) == ("committed", "1.0.0")
    # a process of its own counts only what it read itself
    assert event.traffic.fetched_bytes < event.traffic.full_bytes * 3 // 4


def _pull_when_half(media: Mounted, state: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if sum(path.stat().st_blocks * 512 for path in (state / "inbox").glob("*.part")) > MODEL_BYTES // 3:
            break
        time.sleep(0.001)
    media.pull()


def _bounded(device: Device, place: Path) -> UpdateEvent:
    """As `device.plug`, within a minute."""

    async def plug() -> UpdateEvent:
        async with asyncio.timeout(60):
            return (await device.updater().sideload(place, device.stick_root))[-1]

    return asyncio.run(plug())


@pytest.mark.fault("F60")
def test_an_image_that_is_cut_short_is_refused(device: Device, tmp_path: Path) -> None:
    """The end of the file system is missing, as on a stick that lies about its size: reads fail or give zeros."""
    stick = device.fleet.stick("cam-1")
    image = fat_image(stick, tmp_path / "stick.img")
    with image.open("r+b") as file:
        file.truncate(MODEL_BYTES // 2)
        file.truncate(IMAGE_BYTES)
    with mounted(image, tmp_path / "media") as media:
        event = _bounded(device, media.place)
    assert event.outcome in ("failed", "rejected")
    assert event.reason in (
        Reason.TRANSFER_CORRUPT, Reason.NOT_FOUND, Reason.SOURCE_UNREACHABLE, Reason.BAD_JSON, Reason.UNSAFE_FILE,
    )  # fmt: skip
    assert device.serving == ""
