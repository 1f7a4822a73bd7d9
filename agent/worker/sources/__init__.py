"""Where frames come from: the table of kinds, and what each of them promises.

Importing this loads no implementation, numpy or OpenCV.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Frame = NDArray[Any]

LIVE = "live"
EVERY = "every"


@dataclass(frozen=True)
class Pace:
    """How a source's frames are handed out.

    `policy` is `live` (the wall clock decides, overload drops) or `every` (the readers decide, nothing drops).
    `fps` is what the source says of itself, or what was asked for; `paced` whether frames wait for their time;
    `queue_frames` how many undelivered frames each line may have.
    """

    policy: str
    fps: float
    paced: bool
    queue_frames: int


class Source(Protocol):
    """An open source whose next frame is there to be fetched: a file. `dtype`, `shape` and `pace` never change.

    A frame is uint8 [height, width, 3] BGR from a camera, float32 [samples, channels] from a sensor.
    `detail` is what a person should know of it, one line or empty; it may change with each frame.
    """

    blocks: Literal[False]
    dtype: str
    shape: tuple[int, ...]
    pace: Pace
    detail: str

    def read_into(self, slot: Frame) -> bool:
        """Write the next frame into `slot` (of `dtype` and `shape`); False when the source has ended.

        Raises:
            SourceError: `source_unreadable` when it broke in the middle.
        """

    def close(self) -> None:
        """Release files and devices."""


class LiveSource(Protocol):
    """An open source that has to be waited for: a camera, a stream, a serial line. Its calls come from one thread, one
    at a time; only `feed` and `interrupt` are called from another one.

    `stale_s`: so long without a frame is a fault, whatever the source says of itself.
    `hung_s`: a call that takes longer than this never returns; the process is given up then.
    `feed`: takes what the daemon itself hears for this source; None for one that hears for itself.
    """

    blocks: Literal[True]
    dtype: str
    shape: tuple[int, ...]
    pace: Pace
    detail: str
    stale_s: float
    hung_s: float
    feed: Callable[[int, Sequence[Any]], None] | None

    def wait_into(self, slot: Frame | None) -> int | None:
        """Wait for the next frame and write it into `slot`, or throw it away as cheaply as possible for None.

        Returns the frame's time (CLOCK_MONOTONIC ns at which it arrived); None when the source has ended for good.

        Raises:
            SourceError: it is lost or delivers what cannot be used; `reopen` comes next. With `source_changed` its
                frames have another shape from now on, and nothing but a new ring helps.
        """

    def reopen(self) -> None:
        """Release what was open and open it again, from the beginning where it has one.

        Raises:
            SourceError: it is not there (yet); `reopen` is called again a little later.
        """

    def interrupt(self) -> None:
        """Make a call in progress return soon where that can be done, because the process is about to end."""

    def close(self) -> None:
        """Release files, devices and children; no call is in progress."""


SourceOpener = Callable[[Mapping[str, Any]], Source | LiveSource]
"""Opens a source from its options. Raises `SourceError` or `ConfigError`."""


def _video(options: Mapping[str, Any]) -> Source:
    from agent.worker.sources.video import open_video

    return open_video(options)


def _folder(options: Mapping[str, Any]) -> Source:
    from agent.worker.sources.folder import open_folder

    return open_folder(options)


def _camera(options: Mapping[str, Any]) -> LiveSource:
    from agent.worker.sources.camera import open_camera

    return open_camera(options)


def _rtsp(options: Mapping[str, Any]) -> LiveSource:
    from agent.worker.sources.network import open_network

    return open_network("rtsp", options)


def _http(options: Mapping[str, Any]) -> LiveSource:
    from agent.worker.sources.network import open_network

    return open_network("http", options)


def _pipe(options: Mapping[str, Any]) -> LiveSource:
    from agent.worker.sources.pipe import open_pipe

    return open_pipe(options)


def _sensor(kind: str) -> SourceOpener:
    def open_it(options: Mapping[str, Any]) -> Source | LiveSource:
        from agent.worker.sources.sensors import open_sensor

        return open_sensor(kind, options)

    return open_it


SOURCES: Mapping[str, SourceOpener] = {
    "video": _video,
    "folder": _folder,
    "camera": _camera,
    "rtsp": _rtsp,
    "http": _http,
    "pipe": _pipe,
    **{kind: _sensor(kind) for kind in ("iio", "serial", "csv", "wav", "topic")},
}
