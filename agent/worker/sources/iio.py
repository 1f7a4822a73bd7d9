"""Linux Industrial I/O: a sensor's channels read from sysfs at a rate.

A channel is `(raw + offset) * scale`, in the unit of the kernel's ABI (m/s^2, rad/s, degrees …), after
Documentation/ABI/testing/sysfs-bus-iio of the kernel; where a channel has a scale or offset of its own, that counts,
else the one of its kind. It is polled: good for a few hundred samples a second, and it neither sets a sampling
frequency nor uses the kernel's buffers.
Invariants: a reading that comes a whole period late means a missed sample, which begins the
window anew; nothing outside the device's own folder is read.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agent.errors import Reason, SourceError
from agent.worker.sources import Pace
from agent.worker.sources.samples import LARGEST, Alarm, Windows, losses, patience_s

if TYPE_CHECKING:
    from agent.worker.sources import Frame

ROOT = Path("/sys/bus/iio/devices")
_ATTRIBUTE_BYTES = 64
_NUMBERED = re.compile(r"iio:device\d{1,4}", re.ASCII)
_OWN = re.compile(r"(?P<kind>[a-z]+)(\d+)?(_[a-z0-9]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Channel:
    fd: int
    scale: float
    offset: float


class Iio:
    """An open IIO device.

    Args:
        options: as `agent.sensorconfig` parses them.
        root: the folder of IIO devices.
        clock: CLOCK_MONOTONIC in nanoseconds.

    Raises:
        SourceError: `source_missing` or `source_unreadable`.
    """

    blocks: Literal[True] = True
    dtype = "float32"
    feed: Callable[[int, Sequence[Any]], None] | None = None

    def __init__(
        self, options: Mapping[str, Any], *, root: Path = ROOT, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._device, self._names = str(options["device"]), tuple(options["inputs"])
        self._root, self._clock = root, clock
        self._period_ns = round(1e9 / options["rate_hz"])
        self._windows = Windows(options["window"], options["hop"], len(self._names), options["rate_hz"])
        self.shape: tuple[int, ...] = (options["window"], len(self._names))
        self.pace = Pace("live", options["rate_hz"] / options["hop"], True, options["queue_frames"])
        self.stale_s = patience_s(options)
        self.hung_s = self.stale_s + options["timeout_s"]
        self._row = [0.0] * len(self._names)
        self._due_ns: int | None = None
        self.detail = ""
        self._alarm = Alarm()
        self._channels: list[_Channel] = []
        self._open()

    def wait_into(self, slot: Frame | None) -> int | None:
        """See `LiveSource.wait_into`."""
        windows, row = self._windows, self._row
        while not windows.complete:
            now_ns = self._clock()
            if self._due_ns is None:
                self._due_ns = now_ns
            elif now_ns >= self._due_ns + self._period_ns:
                windows.restart()
                self.detail = losses(windows)
                self._due_ns = now_ns
            elif now_ns < self._due_ns:
                if not self._alarm.wait((self._due_ns - now_ns) / 1e9):
                    return None
                continue
            for index, channel in enumerate(self._channels):
                row[index] = value = (self._number(channel.fd) + channel.offset) * channel.scale
                if not -LARGEST < value < LARGEST:
                    raise self._unreadable(f"{self._device} answers {value}")
            windows.add(row, self._due_ns)
            self._due_ns += self._period_ns
        return windows.take(slot)

    def reopen(self) -> None:
        """See `LiveSource.reopen`."""
        self._shut()
        self._windows.clear()
        self._due_ns = None
        self._open()

    def interrupt(self) -> None:
        """See `LiveSource.interrupt`."""
        self._alarm.ring()

    def close(self) -> None:
        """See `LiveSource.close`."""
        self._shut()
        self._alarm.close()

    def _open(self) -> None:
        folder = find_device(self._device, self._root)
        try:
            for name in self._names:
                self._channels.append(self._channel(folder, name))
        except SourceError:
            self._shut()
            raise

    def _channel(self, folder: Path, name: str) -> _Channel:
        for attribute, processed in ((f"in_{name}_raw", False), (f"in_{name}_input", True)):
            try:
                fd = os.open(folder / attribute, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as e:
                raise self._unreadable(f"{folder / attribute}: {e.strerror}") from e
            # what the driver has converted already has no scale any more
            if processed:
                return _Channel(fd, 1.0, 0.0)
            return _Channel(fd, self._factor(folder, name, "scale", 1.0), self._factor(folder, name, "offset", 0.0))
        known = sorted(p.name[3:-4] for p in folder.glob("in_*_raw"))
        raise SourceError(
            Reason.SOURCE_MISSING,
            f"{self._device} has no channel {name}",
            hint=f"its channels: {', '.join(known)[:200]}" if known else "see in_*_raw in its folder",
        )

    def _factor(self, folder: Path, name: str, what: str, default: float) -> float:
        kind = _OWN.fullmatch(name)
        for stem in (name, kind["kind"] if kind else name):
            try:
                fd = os.open(folder / f"in_{stem}_{what}", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as e:
                raise self._unreadable(f"{folder}/in_{stem}_{what}: {e.strerror}") from e
            try:
                return self._number(fd)
            finally:
                os.close(fd)
        return default

    def _number(self, fd: int) -> float:
        # each read at the beginning makes the driver measure anew
        try:
            text = os.pread(fd, _ATTRIBUTE_BYTES, 0)
            value = float(text)
        except OSError as e:
            raise self._unreadable(f"{self._device}: {e.strerror}") from e
        except ValueError as e:
            raise self._unreadable(f"{self._device} answers {text[:20]!r}, no number") from e
        if not math.isfinite(value):
            raise self._unreadable(f"{self._device} answers {value}")
        return value

    def _unreadable(self, message: str) -> SourceError:
        return SourceError(
            Reason.SOURCE_UNREADABLE, message, hint="check the sensor's wiring, and who may read its folder in /sys"
        )

    def _shut(self) -> None:
        for channel in self._channels:
            os.close(channel.fd)
        self._channels.clear()


def find_device(device: str, root: Path) -> Path:
    """The folder of a device: by its number (`iio:device0`), or by what its `name` says (`adxl345`).

    Raises:
        SourceError: `source_missing`, listing those that are there.
    """
    found: dict[str, str] = {}
    for folder in sorted(root.glob("iio:device*")) if root.is_dir() else ():
        try:
            found[folder.name] = (folder / "name").read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            found[folder.name] = ""
    if _NUMBERED.fullmatch(device) and device in found:
        return root / device
    named = [number for number, name in found.items() if name == device]
    if len(named) == 1:
        return root / named[0]
    there = ", ".join(f"{number} ({name})" for number, name in found.items())[:200]
    why = f"{len(named)} devices are called {device}" if named else f"there is no IIO device {device}"
    raise SourceError(
        Reason.SOURCE_MISSING, why, hint=f"there are: {there}" if there else f"{root} is empty: load the driver"
    )
