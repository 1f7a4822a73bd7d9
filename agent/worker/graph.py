"""How a model is fed and read: the `graph` of a release, parsed once into frozen values.

It is signed metadata: unknown keys are ignored, known ones are checked strictly. Nothing here touches a pixel.
ota/FORMAT.md §2 says what a publisher writes for each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.worker.graphkeys import Keys
from agent.worker.signalgraph import KIND as SIGNAL
from agent.worker.signalgraph import Signal, parse_signal

IMAGE = "image"
MAX_LABELS = 20_000
MAX_LABEL_CHARS = 80
MAX_ITEMS = 200
"""Most items one frame's answer may have, so that it always fits into one message."""
MAX_CONSTANTS = 16
MAX_CONSTANT_VALUES = 64
MAX_GRIDS = 12
MAX_GRID_CELLS = 512
MAX_ASPECTS = 8
MAX_KEY_POINTS = 133
MAX_POINTS = 1500
MAX_EMBEDDING = 4096
MAX_LISTED = 2048
MAX_SEGMENTED = 256

TASKS: Mapping[str, tuple[str, ...]] = {
    "detection": ("centernet", "ssd", "ssd_in_graph", "yolov5", "yolov8"),
    "classification": ("classification",),
    "segmentation": ("segmentation",),
    "keypoints": ("heatmap", "yolo_pose"),
    "embedding": ("embedding",),
    "anomaly": ("anomaly",),
    "raw": ("raw",),
}
"""The kinds of postprocess that answer each task, beside `raw`, which is allowed for any."""


# --- the way in ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preprocess:
    """From a camera's frame to the input tensor.

    `resize`: stretch, letterbox (bars of `pad`, the picture in the middle or, by `align`, at the top left) or crop
    (centre of the source). `interpolation`: nearest, linear or area. `color`: rgb, bgr or gray; an input of one channel
    always gets grey. The value of a pixel is (pixel - mean) / std, per channel where there are several. `roi` is the
    part of the frame that is looked at: x0, y0, x1, y1 as shares of its sides. `input` names the tensor that takes the
    picture where it is not the first; `constants` are the values of the others.
    """

    resize: str = "stretch"
    interpolation: str = "linear"
    color: str = "rgb"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pad: int = 114
    align: str = "center"
    roi: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)
    input: str = ""
    constants: tuple[tuple[str, tuple[float, ...]], ...] = ()


# --- the way out -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Classification:
    """One vector of scores; `softmax` or `sigmoid` when the model ends in logits. The best `top_k` that reach
    `threshold` are told: with sigmoid several labels may hold at once."""

    softmax: bool = False
    top_k: int = 5
    sigmoid: bool = False
    threshold: float = 0.0


@dataclass(frozen=True, slots=True)
class Centernet:
    """A heat map [1, h, w, classes] of 0..1 and a box map [1, h, w, 4] of (dx, dy, width, height) in cells of
    `stride` input pixels, the centre measured from the cell's index (Zhou et al., 'Objects as Points', 2019)."""

    stride: int
    threshold: float
    max_detections: int
    nms_iou: float


@dataclass(frozen=True, slots=True)
class Anchors:
    """The prior boxes of Liu et al., 'SSD', 2016: for each grid (rows, columns) one of each aspect ratio and, if
    `interpolated` > 0, one more of that ratio at the geometric mean with the next scale. Scales run evenly from
    `min_scale` to `max_scale`; `reduced` gives the first grid three boxes alone."""

    grids: tuple[tuple[int, int], ...]
    min_scale: float
    max_scale: float
    aspects: tuple[float, ...]
    interpolated: float
    reduced: bool


@dataclass(frozen=True, slots=True)
class Ssd:
    """Boxes [1, n, 4] as (y, x, h, w) relative to n anchors, divided by `scales`, and scores [1, n, classes], with
    `background` class 0 being nothing. `scores`: sigmoid or softmax where they are logits, or none."""

    anchors: Anchors
    scales: tuple[float, ...]
    scores: str
    background: bool
    threshold: float
    max_detections: int
    nms_iou: float


@dataclass(frozen=True, slots=True)
class SsdInGraph:
    """What TFLite's own detection operator leaves: boxes [1, n, 4] as (y0, x0, y1, x1) of 0..1, classes [1, n],
    scores [1, n], and how many of them count, [1]."""

    threshold: float
    max_detections: int


@dataclass(frozen=True, slots=True)
class Yolo:
    """Rows of (centre x, centre y, width, height, …) in input pixels or, `normalized`, in shares of the input.

    `version` 5: [1, n, 5 + classes], the fifth value multiplying every class. 8 (also of 9, 11, 12): [1, 4 + classes,
    n]. `key_points` > 0: behind the classes x, y and, if `visibility`, a score of each point.
    """

    version: int
    normalized: bool
    threshold: float
    max_detections: int
    nms_iou: float
    key_points: int = 0
    visibility: bool = True


@dataclass(frozen=True, slots=True)
class Segmentation:
    """A map of scores [1, h, w, classes], `channels` first: [1, classes, h, w], or one of class numbers [1, h, w].
    With one channel what reaches `threshold` is the one label; `sigmoid` where that is a logit. Labels in `background`
    and those below `min_share` of the picture are not told; all polygons together have at most `max_points` points."""

    channels: str
    background: tuple[int, ...]
    threshold: float
    sigmoid: bool
    min_share: float
    max_points: int


@dataclass(frozen=True, slots=True)
class Heatmap:
    """One map for each key point, [1, h, w, points] or, `channels` first, [1, points, h, w]. A peak lies `offset` cells
    from its cell's edge; what is below `threshold` was not found."""

    channels: str
    threshold: float
    sigmoid: bool
    offset: float


@dataclass(frozen=True, slots=True)
class Embedding:
    """One vector that says what something looks like: [1, n]; `normalize` makes its length 1. `encoding`: `base64` of
    little-endian float16, or `list`."""

    normalize: bool
    encoding: str


@dataclass(frozen=True, slots=True)
class Anomaly:
    """The model repeats its input; how badly, as the mean of the squared differences, is the score. At `threshold` it
    is anomalous."""

    threshold: float


@dataclass(frozen=True, slots=True)
class Raw:
    """The outputs' own statistics, nothing decoded."""


Postprocess = (
    Classification | Centernet | Ssd | SsdInGraph | Yolo | Segmentation | Heatmap | Embedding | Anomaly | Raw
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Graph:
    """What a release says of its model beside the tensors."""

    task: str
    labels: tuple[str, ...]
    preprocess: Preprocess | Signal
    postprocess: Postprocess

    def label(self, index: int) -> str:
        """Name of a class; its number where the release has none."""
        return self.labels[index] if 0 <= index < len(self.labels) else f"class {index}"


def parse_graph(graph: Mapping[str, Any]) -> Graph:
    """Parse the `graph` object of a release.

    Raises:
        ModelError: `model_unloadable`, naming the key.
    """
    top = Keys(graph, "graph")
    task = top.choice("task", tuple(TASKS), "raw")
    labels = top.texts("labels", MAX_LABELS, MAX_LABEL_CHARS)
    return Graph(task, labels, _preprocess(top.inner("preprocess")), _postprocess(top.inner("postprocess"), task))


def _preprocess(keys: Keys) -> Preprocess | Signal:
    if keys.choice("kind", (IMAGE, SIGNAL), IMAGE) == SIGNAL:
        return parse_signal(keys.value)
    roi = keys.numbers("roi", (0.0, 0.0, 1.0, 1.0), counts=(4,))
    if not (0 <= roi[0] < roi[2] <= 1 and 0 <= roi[1] < roi[3] <= 1):
        raise keys.bad("roi", "not x0, y0, x1, y1 as growing shares from 0 to 1")
    constants = keys.inner("constants")
    if len(constants.names()) > MAX_CONSTANTS:
        raise keys.bad("constants", f"more than {MAX_CONSTANTS} inputs")
    return Preprocess(
        keys.choice("resize", ("stretch", "letterbox", "crop"), "stretch"),
        keys.choice("interpolation", ("nearest", "linear", "area"), "linear"),
        keys.choice("color", ("rgb", "bgr", "gray"), "rgb"),
        keys.numbers("mean", (0.0,)),
        keys.numbers("std", (1.0,), positive=True),
        keys.integer("pad", 0, 255, 114),
        keys.choice("align", ("center", "top_left"), "center"),
        roi,
        keys.text("input", 200, ""),
        tuple((name, constants.some_numbers(name, MAX_CONSTANT_VALUES)) for name in constants.names()),
    )


def _postprocess(keys: Keys, task: str) -> Postprocess:
    kinds = TASKS[task]
    # an object without a kind says what the task alone says; where there is a choice it has to be made
    kind = keys.choice("kind", tuple(_PARSERS), kinds[0] if len(kinds) == 1 else "")
    return _PARSERS[kind](keys)


def _classification(keys: Keys) -> Postprocess:
    softmax, sigmoid = keys.flag("softmax", False), keys.flag("sigmoid", False)
    if softmax and sigmoid:
        raise keys.bad("sigmoid", "excludes softmax")
    return Classification(softmax, keys.integer("top_k", 1, MAX_ITEMS, 5), sigmoid, keys.share("threshold", 0.0))


def _centernet(keys: Keys) -> Postprocess:
    return Centernet(keys.integer("stride", 1, 256, 8), *_boxes(keys, 0.3))


def _ssd(keys: Keys) -> Postprocess:
    return Ssd(
        _anchors(keys.inner("anchors")),
        keys.numbers("scales", (10.0, 10.0, 5.0, 5.0), positive=True, counts=(4,)),
        keys.choice("scores", ("sigmoid", "softmax", "none"), "sigmoid"),
        keys.flag("background", True),
        *_boxes(keys, 0.3),
    )


def _anchors(keys: Keys) -> Anchors:
    grids = keys.numbers("grids", (), positive=True, counts=tuple(range(2, 2 * MAX_GRIDS + 1, 2)))
    if any(size != int(size) or size > MAX_GRID_CELLS for size in grids):
        raise keys.bad("grids", f"not rows and columns up to {MAX_GRID_CELLS} of each grid in turn")
    sizes = [int(size) for size in grids]
    return Anchors(
        tuple(zip(sizes[::2], sizes[1::2], strict=True)),
        keys.number("min_scale", 0, 4, 0.2),
        keys.number("max_scale", 0, 4, 0.95),
        keys.numbers("aspects", (1.0, 2.0, 0.5, 3.0, 1 / 3), positive=True, counts=tuple(range(1, MAX_ASPECTS + 1))),
        keys.number("interpolated", 0, 100, 1.0),
        keys.flag("reduced", True),
    )


def _yolo(version: int, *, pose: bool = False) -> Callable[[Keys], Postprocess]:
    def parse(keys: Keys) -> Postprocess:
        threshold, most, iou = _boxes(keys, 0.25)
        points = keys.integer("key_points", 1, MAX_KEY_POINTS) if pose else 0
        return Yolo(
            version, keys.flag("normalized", False), threshold, min(most, MAX_POINTS // max(points, 1)), iou,
            points, keys.flag("visibility", True),
        )  # fmt: skip

    return parse


def _boxes(keys: Keys, threshold: float) -> tuple[float, int, float]:
    return (
        keys.share("threshold", threshold),
        keys.integer("max_detections", 1, MAX_ITEMS, 50),
        keys.share("nms_iou", 0.5),
    )


def _segmentation(keys: Keys) -> Postprocess:
    background = keys.numbers("background", (), counts=tuple(range(MAX_ITEMS)))
    if any(index not in range(MAX_SEGMENTED) for index in background):
        raise keys.bad("background", f"not class numbers from 0 to {MAX_SEGMENTED - 1}")
    return Segmentation(
        keys.choice("channels", ("last", "first"), "last"),
        tuple(int(index) for index in background),
        keys.share("threshold", 0.5),
        keys.flag("sigmoid", False),
        keys.share("min_share", 0.001),
        keys.integer("max_points", 0, MAX_POINTS, 500),
    )


def _heatmap(keys: Keys) -> Postprocess:
    return Heatmap(
        keys.choice("channels", ("last", "first"), "last"),
        keys.share("threshold", 0.3),
        keys.flag("sigmoid", False),
        keys.share("offset", 0.5),
    )


_PARSERS: Mapping[str, Callable[[Keys], Postprocess]] = {
    "classification": _classification,
    "centernet": _centernet,
    "ssd": _ssd,
    "ssd_in_graph": lambda keys: SsdInGraph(*_boxes(keys, 0.3)[:2]),
    "yolov5": _yolo(5),
    "yolov8": _yolo(8),
    "yolo_pose": _yolo(8, pose=True),
    "segmentation": _segmentation,
    "heatmap": _heatmap,
    "embedding": lambda keys: Embedding(
        keys.flag("normalize", True), keys.choice("encoding", ("base64", "list"), "base64")
    ),
    "anomaly": lambda keys: Anomaly(keys.number("threshold", 0, 1e12)),
    "raw": lambda _: Raw(),
}
