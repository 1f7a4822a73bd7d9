"""What a model says of one frame, one frozen class for each kind of answer, and how each is written down.

`to_json` gives the object that travels in `agent.protocol.Result.items`; docs/reference/results.md describes them for
those who read them. Invariant: what is written is bounded and finite, whatever the model answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

MAX_ANSWER_BYTES = 40_000
"""Most bytes of JSON that the answers of one frame may take: below what one telemetry batch holds."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in source pixels, edges: a box that covers the whole of a 640x480 frame is 0, 0, 640, 480."""


class Item(Protocol):
    """One thing that was said."""

    def to_json(self) -> dict[str, Any]:
        """As it is written down."""


@dataclass(frozen=True, slots=True)
class Detection:
    """A thing and where it is. `score` is 0 to 1."""

    label: str
    score: float
    box: Box

    def to_json(self) -> dict[str, Any]:
        """See the class."""
        return {"label": self.label, "score": self.score, "box": list(self.box)}


@dataclass(frozen=True, slots=True)
class Classification:
    """What the whole picture shows, and how sure the model is."""

    label: str
    score: float

    def to_json(self) -> dict[str, Any]:
        """See the class."""
        return {"label": self.label, "score": self.score}


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of the picture that one label covers: its share of what the model saw, the box around it, and outlines
    (x0, y0, x1, y1, …) in source pixels, the largest first; small ones may be left out."""

    label: str
    share: float
    box: Box
    polygons: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """See the class."""
        return {
            "label": self.label,
            "score": self.share,
            "box": list(self.box),
            "polygons": [list(polygon) for polygon in self.polygons],
        }


@dataclass(frozen=True, slots=True)
class KeyPoints:
    """Points (x, y, score) in source pixels, in the model's order; one that was not found has the score 0. `box` where
    the model gives one."""

    label: str
    score: float
    box: Box | None
    points: tuple[tuple[float, float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """See the class."""
        box = None if self.box is None else list(self.box)
        return {"label": self.label, "score": self.score, "box": box, "points": [list(point) for point in self.points]}


@dataclass(frozen=True, slots=True)
class Embedding:
    """A vector of `size` numbers: base64 of little-endian float16, or a list of numbers."""

    size: int
    values: str | tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """See the class."""
        if isinstance(self.values, str):
            return {"size": self.size, "float16": self.values}
        return {"size": self.size, "values": list(self.values)}


@dataclass(frozen=True, slots=True)
class Anomaly:
    """How unlike what the model was trained on the input is. `score` is None where it cannot be said: the model
    answered numbers that are none; that is anomalous too."""

    score: float | None
    threshold: float
    anomalous: bool

    def to_json(self) -> dict[str, Any]:
        """See the class; with a label, so that rules can name it."""
        label = "anomalous" if self.anomalous else "normal"
        return {"label": label, "score": self.score, "threshold": self.threshold}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """An output's own statistics, real values; None where they are not finite."""

    name: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None
    mean: float | None

    def to_json(self) -> dict[str, Any]:
        """See the class."""
        return {"name": self.name, "shape": list(self.shape), "min": self.low, "max": self.high, "mean": self.mean}


@dataclass(frozen=True, slots=True)
class Followed:
    """What a model says of one thing that another line found: number and label it has there, and its box."""

    item: Item
    index: int
    label: str
    box: Box

    def to_json(self) -> dict[str, Any]:
        """See the class: the item, with the other's box where it has none of its own."""
        written = self.item.to_json()
        if written.get("box") is None:
            written["box"] = list(self.box)
        return {**written, "of": {"index": self.index, "label": self.label}}
