"""How a model is fed and read: the `graph` of a release, parsed once into frozen values.

It is signed metadata: unknown keys are ignored, known ones are checked strictly. Nothing here touches a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.errors import ModelError, Reason

MAX_LABELS = 20_000
MAX_LABEL_CHARS = 80
MAX_ITEMS = 200
"""Most items one frame's answer may have, so that it always fits into one message."""


@dataclass(frozen=True, slots=True)
class Preprocess:
    """From a source's frame to the input tensor.

    `resize`: stretch, letterbox (grey bars, centred) or crop (centre of the source). `interpolation`: nearest, linear
    or area. `color`: rgb, bgr or gray; an input of one channel always gets grey. The value of a pixel is
    (pixel - mean) / std, per channel where there are several.
    """

    resize: str = "stretch"
    interpolation: str = "linear"
    color: str = "rgb"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True)
class Classification:
    """One vector of scores; `softmax` when the model ends in logits."""

    softmax: bool = False
    top_k: int = 5


@dataclass(frozen=True, slots=True)
class Centernet:
    """A heat map [1, h, w, classes] of 0..1 and a box map [1, h, w, 4] of (dx, dy, width, height) in cells of
    `stride` input pixels, the centre measured from the cell's index (Zhou et al., 'Objects as Points', 2019)."""

    stride: int
    threshold: float
    max_detections: int
    nms_iou: float


@dataclass(frozen=True, slots=True)
class Raw:
    """The outputs' own statistics, nothing decoded."""


Postprocess = Classification | Centernet | Raw


@dataclass(frozen=True, slots=True)
class Graph:
    """What a release says of its model beside the tensors."""

    task: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    postprocess: Postprocess

    def label(self, index: int) -> str:
        """Name of a class; its number where the release has none."""
        return self.labels[index] if index < len(self.labels) else f"class {index}"


def parse_graph(graph: Mapping[str, Any]) -> Graph:
    """Parse the `graph` object of a release.

    Raises:
        ModelError: `model_unloadable`, naming the key.
    """
    top = _Keys(graph, "graph")
    task = top.choice("task", ("detection", "classification", "raw"), "raw")
    labels = graph.get("labels", [])
    if not isinstance(labels, list) or len(labels) > MAX_LABELS or not all(isinstance(v, str) for v in labels):
        raise top.bad("labels", f"not a list of at most {MAX_LABELS} texts")
    return Graph(
        task,
        tuple(label[:MAX_LABEL_CHARS] for label in labels),
        _preprocess(top.inner("preprocess")),
        _postprocess(top.inner("postprocess"), task),
    )


def _preprocess(keys: _Keys) -> Preprocess:
    return Preprocess(
        keys.choice("resize", ("stretch", "letterbox", "crop"), "stretch"),
        keys.choice("interpolation", ("nearest", "linear", "area"), "linear"),
        keys.choice("color", ("rgb", "bgr", "gray"), "rgb"),
        keys.numbers("mean", (0.0,), positive=False),
        keys.numbers("std", (1.0,), positive=True),
    )


def _postprocess(keys: _Keys, task: str) -> Postprocess:
    default = {"classification": "classification", "raw": "raw"}.get(task, "")
    kind = keys.choice("kind", ("classification", "centernet", "raw"), default)
    if kind == "classification":
        return Classification(keys.flag("softmax", False), keys.integer("top_k", 1, MAX_ITEMS, 5))
    if kind == "centernet":
        return Centernet(
            keys.integer("stride", 1, 256, 8),
            keys.share("threshold", 0.3),
            keys.integer("max_detections", 1, MAX_ITEMS, 50),
            keys.share("nms_iou", 0.5),
        )
    return Raw()


class _Keys:
    """Typed access to one object of the graph; every miss names the key."""

    def __init__(self, value: Any, where: str) -> None:
        self._where = where
        if not isinstance(value, Mapping):
            raise ModelError(Reason.MODEL_UNLOADABLE, f"{where} is not an object", hint="build the release again")
        self._value = value

    def bad(self, key: str, why: str) -> ModelError:
        return ModelError(Reason.MODEL_UNLOADABLE, f"{self._where}.{key}: {why}", hint="build the release again")

    def inner(self, key: str) -> _Keys:
        return _Keys(self._value.get(key, {}), f"{self._where}.{key}")

    def choice(self, key: str, known: tuple[str, ...], default: str) -> str:
        value = self._value.get(key, default)
        if value not in known:
            raise self.bad(key, f"{str(value)[:40]!r} is not one of {', '.join(known)}")
        return str(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "not true or false")
        return value

    def integer(self, key: str, low: int, high: int, default: int) -> int:
        value = self._value.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.bad(key, f"not an integer from {low} to {high}")
        return value

    def share(self, key: str, default: float) -> float:
        value = self._value.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise self.bad(key, "not a number from 0 to 1")
        return float(value)

    def numbers(self, key: str, default: tuple[float, ...], *, positive: bool) -> tuple[float, ...]:
        value = self._value.get(key, list(default))
        if not isinstance(value, list) or len(value) not in (1, 3):
            raise self.bad(key, "not a list of one or three numbers")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, (int, float)) or not math.isfinite(item):
                raise self.bad(key, "not a list of one or three numbers")
            if positive and item <= 0:
                raise self.bad(key, "not positive")
        return tuple(float(item) for item in value)
