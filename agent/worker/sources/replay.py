"""Recorded samples played back: columns of a CSV file, or the channels of a WAV file.

For tests, demonstrations and the reproduction of what a sensor once said; with `policy` every a whole recording is gone
through as fast as the model. Invariants: a file is read as it goes, never as a whole; a row that is no sample ends the
replay and is named, because a recording with holes is no recording.
"""

from __future__ import annotations

import os
import stat
import wave
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from agent.errors import Reason, SourceError
from agent.sensorconfig import MAX_CHANNELS, MAX_WINDOW_NUMBERS
from agent.worker.sources import LIVE, Pace
from agent.worker.sources.samples import LARGEST, Windows

if TYPE_CHECKING:
    from agent.worker.sources import Frame

MAX_LINE_BYTES = 1 << 16
_ROWS = 256
_DELIMITERS = ",;\t "


class Recording(Protocol):
    """A file of samples. `channels` numbers a sample, `rate_hz` samples a second."""

    channels: int
    rate_hz: float

    def read(self) -> Frame:
        """The next samples, float32 [n, channels]; none at the end.

        Raises:
            SourceError: `source_unreadable`.
        """

    def rewind(self) -> None:
        """Begin again."""

    def close(self) -> None:
        """Release the file."""


class Replay:
    """A recording as a source of windows.

    Args:
        recording: open; becomes the replay's.
        options: `window`, `hop`, `policy`, `loop`, `queue_frames`.
    """

    blocks: Literal[False] = False
    dtype = "float32"
    detail = ""

    def __init__(self, recording: Recording, options: Mapping[str, Any]) -> None:
        check_size(recording, int(options["window"]))
        self._recording = recording
        self._loop = bool(options["loop"])
        self._windows = Windows(options["window"], options["hop"], recording.channels, recording.rate_hz)
        self._rest: Frame = np.empty((0, recording.channels), np.float32)
        self.shape: tuple[int, ...] = (options["window"], recording.channels)
        policy = str(options["policy"])
        self.pace = Pace(policy, recording.rate_hz / options["hop"], policy == LIVE, options["queue_frames"])

    def read_into(self, slot: Frame) -> bool:
        """See `Source.read_into`."""
        windows, rewound = self._windows, False
        while not windows.complete:
            if not len(self._rest):
                self._rest = self._recording.read()
            if len(self._rest):
                self._rest = self._rest[windows.extend(self._rest, 0) :]
            elif not self._loop or rewound:
                return False  # also for a recording that is shorter than one window
            else:
                rewound = True
                self._recording.rewind()
                windows.clear()
        windows.take(slot)
        return True

    def close(self) -> None:
        """See `Source.close`."""
        self._recording.close()


class Csv:
    """Columns of a text file, one sample a row. The first row may name the columns.

    Args:
        columns: names or numbers (from 1) of columns, in the channels' order; empty for all of them.
    """

    def __init__(self, path: str, columns: Sequence[str], rate_hz: float) -> None:
        self.rate_hz = rate_hz
        self._path = path
        self._file: IO[bytes] = open(open_regular(path), "rb")  # noqa: SIM115 - closed by `close`
        self._line = 0
        try:
            first = self._next()
            if first is None:
                raise self._bad("holds no row")
            text = first.decode("utf-8", "replace").strip()
            self._delimiter = next((d for d in _DELIMITERS if d in text), ",")
            cells = self._cells(first)
            self._header = not all(map(_is_number, cells))
            self._columns = self._chosen(columns, cells)
        except SourceError:
            self.close()
            raise
        self.channels = len(self._columns)
        self.rewind()

    def read(self) -> Frame:
        """See `Recording.read`."""
        rows = np.empty((_ROWS, self.channels), np.float32)
        count = 0
        for row in self._rows():
            rows[count] = row
            count += 1
            if count == _ROWS:
                break
        return rows[:count]

    def rewind(self) -> None:
        """See `Recording.rewind`."""
        self._file.seek(0)
        self._line = 0
        if self._header:
            self._next()

    def close(self) -> None:
        """See `Recording.close`."""
        self._file.close()

    def _rows(self) -> Iterator[list[float]]:
        while (line := self._next()) is not None:
            if not line.strip():
                continue
            cells = self._cells(line)
            if len(cells) <= max(self._columns):
                raise self._bad(f"line {self._line} has {len(cells)} columns")
            try:
                row = [float(cells[index]) for index in self._columns]
            except ValueError as e:
                raise self._bad(f"line {self._line} is no row of numbers") from e
            if not all(-LARGEST < value < LARGEST for value in row):
                raise self._bad(f"line {self._line} holds a number that is none")
            yield row

    def _next(self) -> bytes | None:
        line = self._file.readline(MAX_LINE_BYTES + 1)
        self._line += 1
        if len(line) > MAX_LINE_BYTES:
            raise self._bad(f"line {self._line} is longer than {MAX_LINE_BYTES} bytes")
        return line or None

    def _cells(self, line: bytes) -> list[str]:
        text = line.decode("utf-8", "replace").strip().lstrip("\ufeff")
        cells = text.split() if self._delimiter == " " else text.split(self._delimiter)
        return [cell.strip().strip('"') for cell in cells]

    def _chosen(self, columns: Sequence[str], cells: Sequence[str]) -> list[int]:
        if not columns:
            return list(range(len(cells)))
        chosen = []
        for column in columns:
            if self._header and column in cells:
                chosen.append(cells.index(column))
            elif column.isascii() and column.isdigit() and 1 <= int(column) <= len(cells):
                chosen.append(int(column) - 1)
            else:
                raise self._bad(f"has no column {column!r}, but {', '.join(cells)[:200]}")
        return chosen

    def _bad(self, why: str) -> SourceError:
        return SourceError(Reason.SOURCE_UNREADABLE, f"{self._path} {why}", hint="give one sample a row, numbers alone")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


class Wav:
    """PCM of 8, 16, 24 or 32 bits, as numbers from -1 to 1."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: IO[bytes] = open(open_regular(path), "rb")  # noqa: SIM115 - closed by `close`
        try:
            self._wave = wave.open(self._file)  # noqa: SIM115 - closed by `close`
        except (wave.Error, EOFError, RuntimeError) as e:  # the last where a chunk ends outside its file
            self._file.close()
            raise SourceError(
                Reason.SOURCE_UNREADABLE,
                f"{path} is no WAV file of PCM samples: {str(e) or 'it ends too early'}",
                hint="convert it: ffmpeg -i IN -c:a pcm_s16le OUT.wav",
            ) from e
        self.channels = self._wave.getnchannels()
        self.rate_hz = float(self._wave.getframerate())
        self._bytes = self._wave.getsampwidth()
        if not 1 <= self._bytes <= 4 or self.rate_hz <= 0:
            self.close()
            raise SourceError(
                Reason.SOURCE_UNREADABLE, f"{path} has samples of {self._bytes} bytes", hint="use 8, 16, 24 or 32 bits"
            )

    def read(self) -> Frame:
        """See `Recording.read`."""
        data = self._wave.readframes(_ROWS)
        size = self._bytes * self.channels
        raw = np.frombuffer(data, np.uint8, len(data) // size * size)
        if self._bytes == 1:  # the only width without a sign
            values: Frame = (raw.astype(np.float32) - 128) / 128
        else:
            # into the upper bytes of 32 bits, so that the sign comes by itself
            wide = np.zeros((len(raw) // self._bytes, 4), np.uint8)
            wide[:, 4 - self._bytes :] = raw.reshape(-1, self._bytes)
            values = wide.view("<i4").reshape(-1).astype(np.float32) / np.float32(1 << 31)
        return values.reshape(-1, self.channels)

    def rewind(self) -> None:
        """See `Recording.rewind`."""
        self._wave.rewind()

    def close(self) -> None:
        """See `Recording.close`."""
        self._wave.close()
        self._file.close()


def check_size(recording: Recording, window: int) -> None:
    """Pass a recording whose windows of so many samples can be held; it is closed else.

    Raises:
        SourceError: `source_unreadable`.
    """
    channels = recording.channels
    if 0 < channels <= MAX_CHANNELS and window * channels <= MAX_WINDOW_NUMBERS:
        return
    recording.close()
    raise SourceError(
        Reason.SOURCE_UNREADABLE,
        f"the recording has {channels} channels: too many for windows of {window} samples",
        hint=f"choose columns, at most {MAX_CHANNELS}, or a shorter window",
    )


def open_regular(path: str) -> int:
    """A descriptor of a regular file for reading.

    Raises:
        SourceError: `source_missing` or `source_unreadable`.
    """
    try:
        # a FIFO without a writer would never open
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as e:
        raise SourceError(
            Reason.SOURCE_MISSING, f"{path} does not exist", hint="check path in the [[source]] table"
        ) from e
    except OSError as e:
        raise SourceError(
            Reason.SOURCE_UNREADABLE, f"{path}: {e.strerror}", hint="let the worker's user read it: chmod o+r"
        ) from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SourceError(Reason.SOURCE_MISSING, f"{path} is not a file", hint="give the path of a recording")
    return fd
