"""A sensor on a serial line that writes one sample a line: numbers, or JSON.

A line is `1.5,-2,3e1`, with commas, semicolons, blanks or tabs between the numbers, a JSON list of numbers, or a JSON
object whose members `keys` names. It speaks no protocol back. Invariants: a line is at most `MAX_LINE_BYTES` long,
however long it is in coming; what is no sample is counted, never guessed at, and begins the window anew, because a
sample is missing there; what was in flight when the line was opened is no line.
"""

from __future__ import annotations

import os
import re
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from agent.errors import Reason, SourceError
from agent.sensorconfig import BAUDS
from agent.worker.sources import Pace
from agent.worker.sources.samples import LARGEST, Alarm, Windows, losses, patience_s
from ota import strictjson
from ota.errors import OtaError

if TYPE_CHECKING:
    from agent.worker.sources import Frame

MAX_LINE_BYTES = 4096
NEVER_S = 1e8
"""Nothing here can hang in a driver: waiting is a `select`."""
_READ_BYTES = 4096
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BETWEEN = re.compile(r"\s*[,;]\s*|\s+", re.ASCII)


class Serial:
    """An open serial line.

    Args:
        options: as `agent.sensorconfig` parses them.

    Raises:
        SourceError: `source_missing` or `source_unreadable`.
    """

    blocks: Literal[True] = True
    dtype = "float32"
    hung_s = NEVER_S
    feed: Callable[[int, Sequence[Any]], None] | None = None

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._path, self._baud = str(options["path"]), int(options["baud"])
        self._keys = tuple(options["keys"])
        self._windows = Windows(
            options["window"], options["hop"], options["channels"], options["rate_hz"], options["gap_s"]
        )
        self.shape: tuple[int, ...] = (options["window"], options["channels"])
        # a sensor sends when it likes: it cannot be asked to wait
        self.pace = Pace("live", options["rate_hz"] / options["hop"], True, options["queue_frames"])
        self.stale_s = patience_s(options)
        self.bad_lines = 0
        self.detail = ""
        self._told = 0
        self._alarm = Alarm()
        self._lines = _Lines()
        self._waiting: list[tuple[bytes | None, int]] = []
        self._fd = self._open()

    def wait_into(self, slot: Frame | None) -> int | None:
        """See `LiveSource.wait_into`."""
        windows = self._windows
        while True:
            while self._waiting:
                self._heard(*self._waiting.pop())
                if windows.complete:
                    return windows.take(slot)
            if not self._alarm.wait(None, self._fd):
                return None
            t_ns = time.monotonic_ns()
            self._waiting = [(line, t_ns) for line in reversed(self._lines.take(self._read()))]

    def reopen(self) -> None:
        """See `LiveSource.reopen`."""
        self._shut()
        self._lines, self._waiting = _Lines(), []
        self._windows.clear()
        self._fd = self._open()

    def interrupt(self) -> None:
        """See `LiveSource.interrupt`."""
        self._alarm.ring()

    def close(self) -> None:
        """See `LiveSource.close`."""
        self._shut()
        self._alarm.close()

    def _heard(self, line: bytes | None, t_ns: int) -> None:
        sample = None if line is None else parse_line(line, self._windows.channels, self._keys)
        if sample is None:
            self.bad_lines += 1
            self._windows.restart()
        elif sample:
            self._windows.add(sample, t_ns)
        if self._windows.gaps != self._told:
            self._told = self._windows.gaps
            self.detail = losses(self._windows, unreadable_lines=self.bad_lines)

    def _read(self) -> bytes:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return b""
        except OSError as e:
            raise self._lost(e.strerror) from e
        if not data:
            raise self._lost("hung up")
        return data

    def _lost(self, why: str | None) -> SourceError:
        return SourceError(Reason.SOURCE_UNREADABLE, f"{self._path}: {why}", hint="plug the sensor in again")

    def _open(self) -> int:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as e:
            raise SourceError(
                Reason.SOURCE_MISSING, f"{self._path} does not exist", hint="plug the sensor in, or correct path"
            ) from e
        except OSError as e:
            raise SourceError(
                Reason.SOURCE_UNREADABLE,
                f"{self._path}: {e.strerror}",
                hint="let the worker's user read it: groups dialout or tty",
            ) from e
        try:
            set_raw(fd, self._baud)
        except (termios.error, OSError) as e:
            os.close(fd)
            raise SourceError(
                Reason.SOURCE_UNREADABLE,
                f"{self._path} is no serial line of {self._baud} baud",
                hint="give the path of a tty, such as /dev/ttyUSB0 or /dev/serial/by-id/…",
            ) from e
        return fd

    def _shut(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Lines:
    """Bytes into lines: one that is too long is None, once, and what came before the first line break is nothing."""

    def __init__(self) -> None:
        self._rest = b""
        self._cut = False
        self._begun = False

    def take(self, data: bytes) -> list[bytes | None]:
        *ended, self._rest = (self._rest + data).split(b"\n")
        lines: list[bytes | None] = []
        for line in ended:
            if not self._begun or self._cut:
                self._begun, self._cut = True, False
            else:
                lines.append(line if len(line) <= MAX_LINE_BYTES else None)
        if len(self._rest) > MAX_LINE_BYTES:
            if self._begun and not self._cut:
                lines.append(None)
            self._rest, self._cut = b"", True
        return lines


def parse_line(line: bytes, channels: int, keys: Sequence[str]) -> list[float] | None:
    """The sample in a line, an empty list for an empty line, None for anything else. `keys` name the members of a JSON
    object, in the channels' order."""
    try:
        text = line.decode("ascii").strip()
    except UnicodeDecodeError:
        return None
    if not text:
        return []
    if text[0] in "[{":
        values = _from_json(text, keys)
    else:
        words = _BETWEEN.split(text)
        values = [float(word) for word in words] if all(map(_NUMBER.fullmatch, words)) else None
    if values is None or len(values) != channels or not all(-LARGEST < value < LARGEST for value in values):
        return None
    return values


def _from_json(text: str, keys: Sequence[str]) -> list[float] | None:
    try:
        found = strictjson.loads(text.encode(), max_bytes=MAX_LINE_BYTES, what="a line")
    except OtaError:
        return None
    if isinstance(found, dict):
        found = [found.get(key) for key in keys]
    if not isinstance(found, list) or not all(type(value) in (int, float) for value in found):
        return None
    return [float(value) for value in found]


def set_raw(fd: int, baud: int) -> None:
    """Eight bits, no parity, one stop bit, nothing translated, nothing echoed, what waits from before thrown away.

    Raises:
        termios.error: it is no serial line.
    """
    settings = termios.tcgetattr(fd)
    speed = BAUDS[baud]
    controls: list[Any] = list(settings[6])
    controls[termios.VMIN], controls[termios.VTIME] = 1, 0
    flags = termios.CS8 | termios.CREAD | termios.CLOCAL
    wanted: list[Any] = [0, 0, flags, 0, speed, speed, controls]
    termios.tcsetattr(fd, termios.TCSANOW, wanted)
    termios.tcflush(fd, termios.TCIFLUSH)
    if termios.tcgetattr(fd)[5] != speed:
        raise termios.error(f"{baud} baud refused")
