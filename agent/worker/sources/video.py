"""Frames of a video file, through OpenCV.

It is not a camera or a stream: the path must be a regular file, so a URL or an image pattern is never opened.
Invariant: a frame is decoded straight into the caller's slot; nothing is copied but the very first one.
"""

from __future__ import annotations

import difflib
import math
import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from agent.errors import ConfigError, Reason, SourceError
from agent.worker.sources import EVERY, LIVE, Pace

if TYPE_CHECKING:
    from agent.worker.sources import Frame

DEFAULT_QUEUE_FRAMES = 4
MAX_QUEUE_FRAMES = 64
MAX_FPS = 1000.0
_OPTIONS = ("path", "policy", "loop", "queue_frames", "fps")


class Video:
    """An open video file.

    Args:
        path: of a regular file.
        loop: start again from the first frame after the last.
        pace: how its frames are handed out; `fps` 0 takes the file's own.

    Raises:
        SourceError: `source_unreadable` when OpenCV cannot decode a first frame of it.
    """

    blocks: Literal[False] = False
    detail = ""

    def __init__(self, path: str, *, loop: bool, pace: Pace) -> None:
        self._path = path
        self._loop = loop
        self._frames = 0
        self._capture = self._open()
        ok, first = self._capture.read()
        if not ok or first.ndim != 3 or first.dtype != np.uint8:
            self._capture.release()
            raise _undecodable(path)
        self._first: Frame | None = np.asarray(first, np.uint8)
        self.dtype, self.shape = "uint8", first.shape
        fps = pace.fps or self._own_fps(pace)
        self.pace = Pace(pace.policy, fps, pace.paced, pace.queue_frames)

    def read_into(self, slot: Frame) -> bool:
        """See `Source.read_into`."""
        if self._first is not None:
            np.copyto(slot, self._first)
            self._first = None
            return True
        if self._decode(slot):
            return True
        if not self._loop:
            return False
        self._capture.release()
        self._capture = self._open()
        if not self._decode(slot):
            raise _undecodable(self._path)
        return True

    def close(self) -> None:
        """Release the file."""
        self._capture.release()

    def _decode(self, slot: Frame) -> bool:
        ok, frame = self._capture.read(slot)
        if not ok:
            return False
        if frame is not slot and frame.ctypes.data != slot.ctypes.data:  # OpenCV could not use it: another size
            raise SourceError(
                Reason.SOURCE_UNREADABLE,
                f"{self._path} changes from {self.shape[1]}x{self.shape[0]}"
                f" to {frame.shape[1]}x{frame.shape[0]} pixels",
                hint="re-encode it with one frame size",
            )
        return True

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture()
        for backend in (cv2.CAP_FFMPEG, cv2.CAP_OPENCV_MJPEG):
            # More decoding threads cost memory and latency, and steal cores from the model.
            if capture.open(self._path, backend, [cv2.CAP_PROP_N_THREADS, 1]) or capture.open(self._path, backend):
                return capture
        raise _undecodable(self._path)

    def _own_fps(self, pace: Pace) -> float:
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        if math.isfinite(fps) and 0 < fps <= MAX_FPS:
            return fps
        if not pace.paced:
            return 0.0
        self._capture.release()
        raise SourceError(
            Reason.SOURCE_UNREADABLE, f"{self._path} does not say its frame rate", hint="set fps in its [source] table"
        )


def open_video(options: Mapping[str, Any]) -> Video:
    """Open the source that `options` describe.

    Args:
        options: `path` (required, absolute), `policy` (`live` or `every`, default `live`), `loop` (default false),
            `queue_frames` (1 to 64, default 4), `fps` (default the file's own; with `every` none means unpaced).

    Raises:
        ConfigError: `bad_config`, naming the option.
        SourceError: `source_missing` or `source_unreadable`.
    """
    for key in options:
        if key not in _OPTIONS:
            near = difflib.get_close_matches(key, _OPTIONS, 1)
            raise _bad(f"option {key!r} of a video is unknown", f"did you mean {near[0]}?" if near else "remove it")
    path = options.get("path")
    policy = options.get("policy", LIVE)
    loop = options.get("loop", False)
    queue = options.get("queue_frames", DEFAULT_QUEUE_FRAMES)
    fps = options.get("fps") or 0.0
    if not isinstance(path, str) or not path or "\0" in path:
        raise _bad("a video needs a path", "set path to the file")
    if policy not in (LIVE, EVERY):
        raise _bad(f"policy {policy!r} of a video is unknown", "use live or every")
    if not isinstance(loop, bool):
        raise _bad("loop of a video is not true or false", "use true or false")
    if type(queue) is not int or not 1 <= queue <= MAX_QUEUE_FRAMES:
        raise _bad(f"queue_frames of a video is not 1 to {MAX_QUEUE_FRAMES}", f"use {DEFAULT_QUEUE_FRAMES}")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 <= fps <= MAX_FPS:
        raise _bad(f"fps of a video is not a number up to {MAX_FPS:g}", "leave it out to use the file's own")
    _check_file(path)
    return Video(path, loop=loop, pace=Pace(policy, float(fps), policy == LIVE or fps > 0, queue))


def _check_file(path: str) -> None:
    if not os.path.isabs(path):
        raise SourceError(
            Reason.SOURCE_MISSING, f"{path!r} is no absolute path", hint="a source's process has a folder of its own"
        )
    try:
        mode = os.stat(path).st_mode
    except PermissionError as e:
        raise _unreadable(path) from e
    except OSError as e:
        raise SourceError(
            Reason.SOURCE_MISSING, f"{path} does not exist", hint="check path in the [source] table"
        ) from e
    if not stat.S_ISREG(mode):
        raise SourceError(Reason.SOURCE_MISSING, f"{path} is not a file", hint="give the path of a video file")
    if not os.access(path, os.R_OK):
        raise _unreadable(path)


def _unreadable(path: str) -> SourceError:
    return SourceError(
        Reason.SOURCE_UNREADABLE, f"no permission to read {path}", hint="let the worker's user read it: chmod o+r"
    )


def _undecodable(path: str) -> SourceError:
    return SourceError(
        Reason.SOURCE_UNREADABLE,
        f"OpenCV finds no frame in {path}",
        hint="check it with ffprobe; an MJPEG .avi or an H.264 .mp4 works",
    )


def _bad(message: str, hint: str) -> ConfigError:
    return ConfigError(Reason.BAD_CONFIG, message, hint=hint)
