"""Where frames come from: the table of kinds, and what each of them promises.

Importing this loads no implementation, numpy or OpenCV.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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
    """An open source. `dtype`, `shape` and `pace` never change while it is open.

    A frame is uint8 [height, width, 3] BGR from a camera, float32 [samples, channels] from a sensor.
    """

    dtype: str
    shape: tuple[int, ...]
    pace: Pace

    def read_into(self, slot: Frame) -> bool:
        """Write the next frame into `slot` (of `dtype` and `shape`); False when the source has ended.

        Raises:
            SourceError: `source_unreadable` when it broke in the middle.
        """

    def close(self) -> None:
        """Release files and devices."""


SourceOpener = Callable[[Mapping[str, Any]], Source]
"""Opens a source from its options. Raises `SourceError` or `ConfigError`."""


def _video(options: Mapping[str, Any]) -> Source:
    from agent.worker.sources.video import open_video

    return open_video(options)


SOURCES: Mapping[str, SourceOpener] = {"video": _video}
