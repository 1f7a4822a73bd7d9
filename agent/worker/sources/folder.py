"""The pictures of a folder, in the order of their names.

It is not watched: names are read once, at the start. Invariants: names, bytes and pixels are bounded before anything is
decoded; what is no picture is skipped and counted, and a folder in which nothing is one ends the source.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2

from agent.configtable import Table
from agent.errors import AgentError, Reason, SourceError
from agent.sourceconfig import parse_options, parse_size
from agent.worker.images import MAX_IMAGE_BYTES, decode_image
from agent.worker.sources import LIVE, Pace

if TYPE_CHECKING:
    from agent.worker.sources import Frame

MAX_NAMES = 200_000
_BORDER = (114, 114, 114)


class Folder:
    """An open folder of pictures; see `Source`.

    Args:
        path: absolute.
        size: (width, height) of every frame, into which pictures are fitted with a grey border; None takes the first
            picture's and skips those of another size.
        loop: begin again after the last name.

    Raises:
        SourceError: `source_missing`, `source_unreadable`: no folder, or no picture in it.
    """

    blocks: Literal[False] = False
    dtype = "uint8"

    def __init__(self, path: str, *, size: tuple[int, int] | None, loop: bool, pace: Pace) -> None:
        self._folder, self._loop, self.pace = path, loop, pace
        self._fit = size is not None
        self._names = _names(path)
        self._next = 0
        self._skipped, self._last_bad = 0, ""
        self.detail = ""
        first = self._read()
        if first is None:
            raise SourceError(
                Reason.SOURCE_UNREADABLE,
                f"{path} holds no picture ({self.detail or 'it is empty'})",
                hint="PNG or JPEG",
            )
        self.shape = first.shape if size is None else (size[1], size[0], 3)
        self._next, self._skipped = 0, 0

    def read_into(self, slot: Frame) -> bool:
        """See `Source.read_into`."""
        begun = self._next
        while True:
            image = self._read()
            if image is None:
                if not self._loop or begun == 0:
                    return False
                begun = self._next = 0
                continue
            if self._fit:
                _fit(image, slot)
                return True
            if image.shape == self.shape:
                slot[...] = image
                return True
            self._skip(f"{image.shape[1]}x{image.shape[0]} pixels")

    def close(self) -> None:
        """Nothing is open between two pictures."""

    def _read(self) -> Frame | None:
        """The next picture that is one; None after the last name."""
        while self._next < len(self._names):
            name = self._names[self._next]
            self._next += 1
            try:
                return decode_image(_bytes(os.path.join(self._folder, name)))
            except OSError as e:
                self._skip(e.strerror or "unreadable", name)
            except AgentError as e:
                self._skip(e.message, name)
        return None

    def _skip(self, why: str, name: str = "") -> None:
        self._skipped += 1
        self.detail = f"{self._skipped} skipped, the last {name or self._names[self._next - 1]}: {why}"


def open_folder(options: Mapping[str, Any]) -> Folder:
    """Open the folder that `options` describe, as `agent.sourceconfig` has them.

    Raises:
        ConfigError: `bad_config`.
        SourceError: `source_missing`, `source_unreadable`.
    """
    checked = parse_options("folder", Table(options, "folder source", Path("/")))
    policy, fps = str(checked["policy"]), float(checked["fps"]) or (1.0 if checked["policy"] == LIVE else 0.0)
    pace = Pace(policy, fps, paced=fps > 0, queue_frames=int(checked["queue_frames"]))
    size = parse_size(checked["size"]) if checked["size"] else None
    return Folder(str(checked["path"]), size=size, loop=bool(checked["loop"]), pace=pace)


def _names(path: str) -> list[str]:
    names: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.is_file():
                    continue
                names.append(entry.name)
                if len(names) > MAX_NAMES:
                    raise SourceError(
                        Reason.SOURCE_UNREADABLE,
                        f"{path} holds more than {MAX_NAMES} files",
                        hint="use several folders",
                    )
    except PermissionError as e:
        raise SourceError(
            Reason.SOURCE_UNREADABLE, f"no permission to read {path}", hint="chmod o+rx the folder"
        ) from e
    except OSError as e:
        raise SourceError(Reason.SOURCE_MISSING, f"{path}: {e.strerror}", hint="give the path of a folder") from e
    return sorted(names)


def _bytes(path: str) -> bytes:
    # the name may have become a FIFO or a device since it was listed
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "no file any more")
        return file.read(MAX_IMAGE_BYTES + 1)


def _fit(image: Frame, slot: Frame) -> None:
    """Scale `image` into `slot` without distorting it, in the middle, with a border."""
    height, width = slot.shape[:2]
    scale = min(width / image.shape[1], height / image.shape[0])
    inner = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    if inner != (width, height):
        slot[...] = _BORDER
    cv2.resize(image, inner, dst=slot[top : top + inner[1], left : left + inner[0]], interpolation=cv2.INTER_AREA)
