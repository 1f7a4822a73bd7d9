"""Cameras that speak V4L2 (USB, and what a board's driver shows as one), through OpenCV.

CSI cameras of Raspberry Pi OS and Jetson do not: see `pipe`. Invariant: what is wrong with a device is asked from the
kernel and named, because OpenCV says of every failure only that it failed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2

from agent.configtable import Table
from agent.errors import Reason, SourceError
from agent.sourceconfig import parse_options, parse_size
from agent.worker.sources.capture import Capture, Terms

# linux/videodev2.h
_QUERYCAP, _CAPABILITY = 0x80685600, struct.Struct("16s32s32s6I")
_REQBUFS, _REQUEST = 0xC0145608, struct.Struct("5I")
_VIDEO_CAPTURE, _VIDEO_CAPTURE_MPLANE, _DEVICE_CAPS = 0x1, 0x1000, 0x80000000
_TYPE_CAPTURE, _MEMORY_MMAP = 1, 1


def open_camera(options: Mapping[str, Any]) -> Capture:
    """Open the camera that `options` describe, as `agent.sourceconfig` has them.

    Raises:
        ConfigError: `bad_config`.
        SourceError: `source_missing`, `source_unreadable` (no permission, no camera), `source_busy`.
    """
    checked = parse_options("camera", Table(options, "camera source", Path("/")))
    device, timeout_s = str(checked["device"]), float(checked["timeout_s"])
    wanted = parse_size(checked["size"]) if checked["size"] else None
    # OpenCV reads this once, when its first camera is opened, in whole seconds
    os.environ["OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT"] = str(max(1, math.ceil(timeout_s)))
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

    def opener() -> cv2.VideoCapture:
        return _open(device, wanted, float(checked["fps"]), str(checked["fourcc"]))

    terms = Terms(device, int(checked["queue_frames"]), float(checked["stale_s"]), timeout_s)
    camera = Capture(terms, opener)
    height, width = camera.shape[:2]
    if wanted is not None and wanted != (width, height):
        camera.detail = f"{device} has no {wanted[0]}x{wanted[1]} and gives {width}x{height}"
    return camera


def _open(device: str, size: tuple[int, int] | None, fps: float, fourcc: str) -> cv2.VideoCapture:
    check_device(device)
    parameters = [cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*fourcc)] if fourcc else []
    if size is not None:
        parameters += [cv2.CAP_PROP_FRAME_WIDTH, size[0], cv2.CAP_PROP_FRAME_HEIGHT, size[1]]
    if fps:
        parameters += [cv2.CAP_PROP_FPS, round(fps)]
    capture = cv2.VideoCapture()
    if not capture.open(device, cv2.CAP_V4L2, parameters):
        check_idle(device)
        raise SourceError(
            Reason.SOURCE_UNREADABLE,
            f"{device} refuses size, rate or format",
            hint=f"v4l2-ctl -d {device} --list-formats-ext shows what it can",
        )
    return capture


def check_device(device: str) -> None:
    """Whether this is a camera that this user may open.

    Raises:
        SourceError: `source_missing`, `source_unreadable`, `source_busy`.
    """
    with _opened(device) as fd:
        about = bytearray(_CAPABILITY.size)
        try:
            fcntl.ioctl(fd, _QUERYCAP, about)
        except OSError as e:
            raise SourceError(
                Reason.SOURCE_UNREADABLE, f"{device} is no V4L2 device", hint="ls -l /dev/v4l/by-id shows the cameras"
            ) from e
    *_, capabilities, own, _, _, _ = _CAPABILITY.unpack(about)
    if capabilities & _DEVICE_CAPS:
        capabilities = own
    if not capabilities & (_VIDEO_CAPTURE | _VIDEO_CAPTURE_MPLANE):
        raise SourceError(
            Reason.SOURCE_UNREADABLE,
            f"{device} delivers no pictures",
            hint="a USB camera has a second device for metadata: use its first one, see ls -l /dev/v4l/by-id",
        )


def check_idle(device: str) -> None:
    """Whether another program has the camera's stream.

    Raises:
        SourceError: `source_busy`.
    """
    with _opened(device) as fd:
        request = bytearray(_REQUEST.pack(1, _TYPE_CAPTURE, _MEMORY_MMAP, 0, 0))
        try:
            fcntl.ioctl(fd, _REQBUFS, request)
        except OSError as e:
            if e.errno == errno.EBUSY:
                raise _busy(device) from e


@contextlib.contextmanager
def _opened(device: str) -> Any:
    try:
        if not stat.S_ISCHR(os.stat(device).st_mode):
            raise SourceError(Reason.SOURCE_UNREADABLE, f"{device} is no device", hint="use kind video for a file")
        fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as e:
        raise SourceError(
            Reason.SOURCE_UNREADABLE,
            f"no permission to open {device}",
            hint="usermod -aG video edge-worker, or the group that ls -l shows; in a unit also DeviceAllow=",
        ) from e
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise _busy(device) from e
        raise SourceError(
            Reason.SOURCE_MISSING, f"{device}: {e.strerror}", hint="check the plug; ls -l /dev/v4l/by-id shows cameras"
        ) from e
    try:
        yield fd
    finally:
        os.close(fd)


def _busy(device: str) -> SourceError:
    return SourceError(Reason.SOURCE_BUSY, f"{device} is in use by another program", hint=f"fuser -v {device} names it")
