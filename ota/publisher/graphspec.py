"""`task`, `labels`, [preprocess] and [postprocess] of a `spec.toml`: the `graph` of a release, every default filled in.

This module knows types and ranges alone; what they mean to a running model is the business of the package that runs
models, and FORMAT.md §2 says it to people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ota.publisher.spectable import (
    Table,
    boolean,
    choice,
    integer,
    list_of,
    mapping,
    number,
    numbers,
    text,
)

MAX_LABELS = 20_000
MAX_LABEL_CHARS = 80
# What one answer of a device may hold.
MAX_ITEMS = 200
MAX_POINTS = 1500
MAX_KEY_POINTS = 133
MAX_CONSTANTS = 16
MAX_CONSTANT_VALUES = 64

TASKS: Mapping[str, tuple[str, ...]] = {
    "detection": ("centernet", "ssd", "ssd_in_graph", "yolov5", "yolov8"),
    "classification": ("classification",),
    "segmentation": ("segmentation",),
    "keypoints": ("heatmap", "yolo_pose"),
    "embedding": ("embedding",),
    "anomaly": ("anomaly",),
    "raw": ("raw",),
}
"""The kinds that answer each task; the first is the one meant where a spec names none. Raw answers any."""
_UNLABELLED = ("embedding", "anomaly", "raw")
_PREPROCESS_KEYS = (
    *("kind", "resize", "interpolation", "color", "mean", "std"),
    *("pad", "align", "roi", "input", "constants"),
)
_ANCHOR_KEYS = ("grids", "min_scale", "max_scale", "aspects", "interpolated", "reduced")
_WITHOUT_KIND = ("detection", "keypoints")

Fields = dict[str, Any]


def graph(top: Table) -> Fields:
    """The checked graph of the spec `top`.

    Raises:
        PublishError: `bad_spec`, naming the key.
    """
    task = top.take("task", choice(*TASKS))
    labels = top.take("labels", list_of(text(MAX_LABEL_CHARS), 0, MAX_LABELS), [])
    if task not in _UNLABELLED and not labels:
        raise top.bad("labels", f"task {task!r} needs at least one label")
    return {
        "task": task,
        "labels": labels,
        "preprocess": _preprocess(top, task),
        "postprocess": _postprocess(top, task),
    }


def _preprocess(top: Table, task: str) -> Fields:
    raw = top.take("preprocess", mapping, {})
    where = f"{top.where}: [preprocess]"
    if raw.get("kind") == "signal":
        from ota.publisher.signalspec import signal_preprocess

        return signal_preprocess(raw, where)
    return _picture(Table(raw, where, _PREPROCESS_KEYS), task)


def _picture(fields: Table, task: str) -> Fields:
    """`value = (pixel - mean) / std`, pixels 0..255, before the model's own quantization. No default is right for most
    models, so both have to be written where pictures are meant."""
    kind = fields.take("kind", choice("image", "signal"), "image")
    color = fields.take("color", choice("rgb", "bgr", "gray"), "rgb")
    count = (1,) if color == "gray" else (1, 3)
    identity = ([0.0], [1.0]) if task == "raw" else ()
    roi = fields.take("roi", numbers((4,), 0.0, 1.0), [0.0, 0.0, 1.0, 1.0])
    if roi[0] >= roi[2] or roi[1] >= roi[3]:
        raise fields.bad("roi", "not x0, y0, x1, y1 that grow from 0 to 1")
    return {
        "kind": kind,
        "resize": fields.take("resize", choice("stretch", "letterbox", "crop"), "stretch"),
        "interpolation": fields.take("interpolation", choice("nearest", "linear", "area"), "linear"),
        "color": color,
        "mean": fields.take("mean", numbers(count, -1e6, 1e6), *identity[:1]),
        "std": fields.take("std", numbers(count, 1e-6, 1e6), *identity[1:]),
        "pad": fields.take("pad", integer(0, 255), 114),
        "align": fields.take("align", choice("center", "top_left"), "center"),
        "roi": roi,
        "input": fields.take("input", lambda value: "" if value == "" else text(200)(value), ""),
        "constants": _constants(fields),
    }


def _constants(fields: Table) -> Fields:
    """Values of inputs that no frame fills, under the inputs' names."""
    named = fields.take("constants", mapping, {})
    if len(named) > MAX_CONSTANTS:
        raise fields.bad("constants", f"more than {MAX_CONSTANTS} inputs")
    one = number(-1e12, 1e12)
    several = list_of(one, 1, MAX_CONSTANT_VALUES)
    constants = Table(named, f"{fields.where}: constants", named)
    return {key: constants.take(key, lambda v: several(v) if isinstance(v, list) else [one(v)]) for key in named}


def _postprocess(top: Table, task: str) -> Fields:
    kinds = (*TASKS[task], "raw")
    given = top.take("postprocess", mapping, {}).get("kind", kinds[0])
    # an unknown kind is refused as such, not by the first of its keys
    known = isinstance(given, str) and given in _KINDS
    keys = _KINDS[given][0] if known else tuple(key for keys, _ in _KINDS.values() for key in keys)
    fields = top.table("postprocess", "kind", *keys)
    kind = fields.take("kind", choice(*_KINDS), kinds[0])
    if kind not in kinds:
        raise fields.bad("kind", f"{kind!r} does not answer the task {task!r}", f"known for it: {', '.join(kinds)}")
    return {"kind": kind, **_KINDS[kind][1](fields)}


def _classification(fields: Table) -> Fields:
    softmax, sigmoid = fields.take("softmax", boolean, False), fields.take("sigmoid", boolean, False)
    if softmax and sigmoid:
        raise fields.bad("sigmoid", "excludes softmax")
    return {
        "softmax": softmax,
        "sigmoid": sigmoid,
        "top_k": fields.take("top_k", integer(1, MAX_ITEMS), 1),
        "threshold": fields.take("threshold", number(0.0, 1.0), 0.0),
    }


def _boxes(fields: Table, threshold: float = 0.5) -> Fields:
    return {
        "threshold": fields.take("threshold", number(0.0, 1.0), threshold),
        "max_detections": fields.take("max_detections", integer(1, MAX_ITEMS), 100),
        "nms_iou": fields.take("nms_iou", number(0.0, 1.0), 0.5),
    }


def _centernet(fields: Table) -> Fields:
    return {"stride": fields.take("stride", integer(1, 256)), **_boxes(fields)}


def _ssd(fields: Table) -> Fields:
    anchors = fields.table("anchors", *_ANCHOR_KEYS)
    grids = anchors.take("grids", list_of(integer(1, 512), 2, 24))
    if len(grids) % 2:
        raise anchors.bad("grids", "not rows and columns of each grid in turn")
    return {
        "anchors": {
            "grids": grids,
            "min_scale": anchors.take("min_scale", number(0.0, 4.0), 0.2),
            "max_scale": anchors.take("max_scale", number(0.0, 4.0), 0.95),
            "aspects": anchors.take("aspects", numbers(tuple(range(1, 9)), 0.01, 100.0), [1.0, 2.0, 0.5, 3.0, 1 / 3]),
            "interpolated": anchors.take("interpolated", number(0.0, 100.0), 1.0),
            "reduced": anchors.take("reduced", boolean, True),
        },
        "scales": fields.take("scales", numbers((4,), 1e-3, 1e3), [10.0, 10.0, 5.0, 5.0]),
        "scores": fields.take("scores", choice("sigmoid", "softmax", "none"), "sigmoid"),
        "background": fields.take("background", boolean, True),
        **_boxes(fields),
    }


def _ssd_in_graph(fields: Table) -> Fields:
    boxes = _boxes(fields)
    return {"threshold": boxes["threshold"], "max_detections": boxes["max_detections"]}


def _yolo(fields: Table) -> Fields:
    return {"normalized": fields.take("normalized", boolean, False), **_boxes(fields, 0.25)}


def _pose(fields: Table) -> Fields:
    return {
        **_yolo(fields),
        "key_points": fields.take("key_points", integer(1, MAX_KEY_POINTS)),
        "visibility": fields.take("visibility", boolean, True),
    }


def _segmentation(fields: Table) -> Fields:
    return {
        "channels": fields.take("channels", choice("last", "first"), "last"),
        "background": fields.take("background", list_of(integer(0, 255), 0, 199), []),
        "threshold": fields.take("threshold", number(0.0, 1.0), 0.5),
        "sigmoid": fields.take("sigmoid", boolean, False),
        "min_share": fields.take("min_share", number(0.0, 1.0), 0.001),
        "max_points": fields.take("max_points", integer(0, MAX_POINTS), 500),
    }


def _heatmap(fields: Table) -> Fields:
    return {
        "channels": fields.take("channels", choice("last", "first"), "last"),
        "threshold": fields.take("threshold", number(0.0, 1.0), 0.3),
        "sigmoid": fields.take("sigmoid", boolean, False),
        "offset": fields.take("offset", number(0.0, 1.0), 0.5),
    }


def _embedding(fields: Table) -> Fields:
    return {
        "normalize": fields.take("normalize", boolean, True),
        "encoding": fields.take("encoding", choice("base64", "list"), "base64"),
    }


def _anomaly(fields: Table) -> Fields:
    """No default: what is unusual follows from the model's own training data."""
    return {"threshold": fields.take("threshold", number(0.0, 1e12))}


_BOX_KEYS = ("threshold", "max_detections", "nms_iou")
_KINDS: Mapping[str, tuple[tuple[str, ...], Callable[[Table], Fields]]] = {
    "classification": (("softmax", "sigmoid", "top_k", "threshold"), _classification),
    "centernet": (("stride", *_BOX_KEYS), _centernet),
    "ssd": (("anchors", "scales", "scores", "background", *_BOX_KEYS), _ssd),
    "ssd_in_graph": (("threshold", "max_detections"), _ssd_in_graph),
    "yolov5": (("normalized", *_BOX_KEYS), _yolo),
    "yolov8": (("normalized", *_BOX_KEYS), _yolo),
    "yolo_pose": (("normalized", "key_points", "visibility", *_BOX_KEYS), _pose),
    "segmentation": (("channels", "background", "threshold", "sigmoid", "min_share", "max_points"), _segmentation),
    "heatmap": (("channels", "threshold", "sigmoid", "offset"), _heatmap),
    "embedding": (("normalize", "encoding"), _embedding),
    "anomaly": (("threshold",), _anomaly),
    "raw": ((), lambda _: {}),
}
"""Keys and reader of each kind of postprocess."""
