"""Frames that a command writes to its standard output: MJPEG, or raw pixels.

The way to cameras and decoders that OpenCV cannot open: `rpicam-vid`, `gst-launch-1.0`, `ffmpeg`. The command is the
device engineer's own and runs as the worker does, in its sandbox. Invariants: bytes are bounded before anything is
decoded; a command that ends, stalls or writes nonsense is ended with its children and started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from agent.configtable import Table
from agent.errors import AgentError, Reason, SourceError
from agent.sourceconfig import parse_options, parse_size
from agent.worker.images import decode_image
from agent.worker.sources import EVERY, Pace
from agent.worker.sources.command import Command
from agent.worker.sources.jpegstream import JpegStream

if TYPE_CHECKING:
    from agent.worker.sources import Frame

MAX_JPEG_BYTES = 8 << 20
HUNG_SLACK_S = 15.0
_CONVERSIONS = {"yuv420p": cv2.COLOR_YUV2BGR_I420, "nv12": cv2.COLOR_YUV2BGR_NV12}


class Pipe:
    """A running command that writes frames; see `LiveSource`.

    Args:
        words: program and arguments.
        size: (width, height); of raw frames required, of MJPEG what its pictures have to be.
        pixels: None for MJPEG, else `bgr24`, `yuv420p` or `nv12`.
        pace: `every`: a command that ends with exit code 0 ends the source, and writes no faster than frames are read.

    Raises:
        SourceError: `source_missing`, `source_lost`, `source_unreadable`: it does not start, or gives no first frame.
    """

    blocks: Literal[True] = True
    dtype = "uint8"

    def __init__(
        self,
        words: Sequence[str],
        *,
        size: tuple[int, int] | None,
        pixels: str | None,
        pace: Pace,
        stale_s: float,
        timeout_s: float,
    ) -> None:
        self._words, self._pixels, self._timeout_s = list(words), pixels, timeout_s
        self.pace, self.stale_s, self.hung_s = pace, stale_s, 2 * timeout_s + HUNG_SLACK_S
        self.feed: Callable[[int, Sequence[Any]], None] | None = None
        self.detail = ""
        self._bad = 0
        self._raw: Frame | None = None
        self._jpeg: JpegStream
        self._first: tuple[Frame, int] | None = None
        self.shape: tuple[int, ...] = (size[1], size[0], 3) if size is not None else ()
        if pixels is not None and size is not None:
            rows = size[1] if pixels == "bgr24" else size[1] * 3 // 2
            self._raw = np.zeros((rows, size[0], 3) if pixels == "bgr24" else (rows, size[0]), np.uint8)
        self._command = self._start()
        try:
            self._first = first = self._first_frame()
        except SourceError:
            self._command.close()
            raise
        self.shape = first[0].shape

    def wait_into(self, slot: Frame | None) -> int | None:
        """See `LiveSource.wait_into`."""
        if self._first is not None:
            (frame, t_ns), self._first = self._first, None
            if slot is not None:
                slot[...] = frame
            return t_ns
        return self._wait_raw(self._raw, slot) if self._raw is not None else self._wait_jpeg(slot)

    def reopen(self) -> None:
        """See `LiveSource.reopen`."""
        self._first = None
        self._command.close()
        self._command = self._start()

    def interrupt(self) -> None:
        """End the command, whose output then ends."""
        self._command.kill()

    def close(self) -> None:
        """End the command and its children."""
        self._command.close()

    def _start(self) -> Command:
        self._jpeg = JpegStream(MAX_JPEG_BYTES)
        return Command(self._words)

    def _first_frame(self) -> tuple[Frame, int]:
        """The first frame, which proves that the command works, and its time."""
        if self._raw is not None:
            frame = np.empty(self.shape, np.uint8)
            t_ns = self._wait_raw(self._raw, frame)
            if t_ns is None:
                raise self._ended()
            return frame, t_ns
        picture = self._next_jpeg()
        if picture is None:
            raise self._ended()
        frame, t_ns = self._decoded(picture), time.monotonic_ns()
        if self.shape and frame.shape != self.shape:
            raise SourceError(
                Reason.SOURCE_UNREADABLE,
                f"{self._command.name} writes pictures of {frame.shape[1]}x{frame.shape[0]}",
                hint="correct size, or leave it out",
            )
        return frame, t_ns

    def _wait_raw(self, buffer: Frame, slot: Frame | None) -> int | None:
        """One raw frame: straight into the slot where its pixels are the ring's own."""
        straight = slot is not None and self._pixels == "bgr24"
        view = memoryview(slot if straight else buffer).cast("B")  # type: ignore[arg-type]
        have, deadline = 0, time.monotonic() + self._timeout_s
        while have < len(view):
            count = self._command.read_into(view[have:], deadline)
            if count == 0:
                self._at_end()
                return None
            have += count
        t_ns = time.monotonic_ns()
        if slot is not None and not straight:
            cv2.cvtColor(buffer, _CONVERSIONS[str(self._pixels)], dst=slot)
        return t_ns

    def _wait_jpeg(self, slot: Frame | None) -> int | None:
        """One picture; those that are none are skipped and counted."""
        while True:
            picture = self._next_jpeg()
            if picture is None:
                self._at_end()
                return None
            t_ns = time.monotonic_ns()
            if slot is None:
                return t_ns
            try:
                frame = self._decoded(picture)
            except SourceError as e:
                self._bad += 1
                self.detail = f"{self._bad} pictures skipped, the last: {e.message}"
                continue
            if frame.shape != self.shape:
                raise SourceError(
                    Reason.SOURCE_CHANGED,
                    f"{self._command.name} changed from {self.shape[1]}x{self.shape[0]}"
                    f" to {frame.shape[1]}x{frame.shape[0]} pixels",
                )
            slot[...] = frame
            return t_ns

    def _next_jpeg(self) -> memoryview | None:
        """The next picture's bytes; None at the end of the output."""
        deadline = time.monotonic() + self._timeout_s
        skipped = self._jpeg.skipped
        while (picture := self._jpeg.next()) is None:
            if self._jpeg.skipped - skipped > MAX_JPEG_BYTES:
                raise SourceError(
                    Reason.SOURCE_UNREADABLE,
                    f"{self._command.name} writes no JPEG pictures",
                    hint="let it write MJPEG: JPEG pictures without a container",
                )
            count = self._command.read_into(self._jpeg.space(), deadline)
            if count == 0:
                return None
            self._jpeg.filled(count)
        return picture

    def _decoded(self, picture: memoryview) -> Frame:
        try:
            return decode_image(picture)
        except AgentError as e:
            raise SourceError(Reason.SOURCE_UNREADABLE, f"{self._command.name}: {e.message}") from e

    def _at_end(self) -> None:
        """The command's output ended. Raises SourceError where that is not the end of the source."""
        status, text = self._command.ended()
        if status != 0 or self.pace.policy != EVERY:
            raise SourceError(Reason.SOURCE_LOST, text)

    def _ended(self) -> SourceError:
        _, text = self._command.ended()
        return SourceError(Reason.SOURCE_LOST, f"{text}, without a frame", hint="try the command by hand")


def open_pipe(options: Mapping[str, Any]) -> Pipe:
    """Start the command that `options` describe, as `agent.sourceconfig` has them.

    Raises:
        ConfigError: `bad_config`.
        SourceError: as `Pipe`.
    """
    checked = parse_options("pipe", Table(options, "pipe source", Path("/")))
    return Pipe(
        [str(word) for word in checked["command"]],
        size=parse_size(checked["size"]) if checked["size"] else None,
        pixels=str(checked["pixels"]) if checked["format"] == "raw" else None,
        pace=Pace(str(checked["policy"]), 0.0, paced=False, queue_frames=int(checked["queue_frames"])),
        stale_s=float(checked["stale_s"]),
        timeout_s=float(checked["timeout_s"]),
    )
