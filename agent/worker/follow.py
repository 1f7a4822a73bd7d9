"""A model on what another found: the boxes a detector gives back with a frame, and the model run on each of them.

The frame travels on through the ring: when the detector's line gives it back, the source lends it to the line that
follows, with the boxes as JSON behind the notice. Neither end trusts the other: what is no list of boxes is none.
Invariants: at most `MAX_BOXES` boxes and `MAX_FOUND_BYTES` travel with a frame, the first ones; every frame that came
is answered once, also when no box of it is wanted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.errors import AgentError, Reason
from agent.protocol import MAX_FOUND_BYTES
from agent.worker.graph import MAX_ITEMS, MAX_LABEL_CHARS
from agent.worker.pipeline import Answer, Pipeline
from agent.worker.results import MAX_ANSWER_BYTES, Followed, Item

if TYPE_CHECKING:
    from agent.worker.sources import Frame

MAX_BOXES = 64


@dataclass(frozen=True, slots=True)
class Found:
    """One thing another line found: its number there, its label and score, its box in source pixels."""

    index: int
    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Crops:
    """Which boxes are looked at: those of `labels` (any when empty) with both sides of at least `least_px`, the first
    `most`, each grown by `margin` of its sides on every side."""

    labels: tuple[str, ...]
    margin: float
    least_px: float
    most: int


def parse_crops(value: Mapping[str, Any]) -> Crops:
    """The crops of a `SetCrops`.

    Raises:
        AgentError: `bad_message`.
    """
    labels, margin, least, most = (value.get(key) for key in ("labels", "margin", "least_px", "most"))
    good = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not (good and _is_number(margin) and _is_number(least) and type(most) is int and 1 <= most <= MAX_BOXES):
        raise AgentError(Reason.BAD_MESSAGE, "SetCrops without labels, margin, least_px and most")
    return Crops(tuple(labels or ()), float(margin or 0), float(least or 0), most)


def written(items: Sequence[Mapping[str, Any]]) -> bytes:
    """What a detector's line found, for the line that follows; empty where that is no box."""
    lines: list[str] = []
    size = 2
    for index, item in enumerate(items):
        box = item.get("box")
        if box is None:
            continue
        line = json.dumps([index, item.get("label", ""), item.get("score", 0.0), box], separators=(",", ":"))
        size += len(line) + 1
        if len(lines) == MAX_BOXES or size > MAX_FOUND_BYTES:
            break
        lines.append(line)
    return f"[{','.join(lines)}]".encode() if lines else b""


def read(data: bytes) -> list[Found]:
    """What came with a frame; what does not say a box is left out."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return []
    found = []
    for row in rows[:MAX_BOXES] if isinstance(rows, list) else []:
        if not isinstance(row, list) or len(row) != 4:
            continue
        index, label, score, box = row
        numbers = [score, *box] if isinstance(box, list) and len(box) == 4 else []
        if type(index) is int and isinstance(label, str) and numbers and all(map(_is_number, numbers)):
            x0, y0, x1, y1 = (float(edge) for edge in box)
            found.append(Found(index, label[:MAX_LABEL_CHARS], float(score), (x0, y0, x1, y1)))
    return found


def answer(pipeline: Pipeline, crops: Crops, frame: Frame, found: Sequence[Found]) -> Answer:
    """Run the model on each box that is wanted; what it says of them, in their order, each with what it is said of."""
    parts = [(one, region) for one in found if (region := _region(one, crops, frame.shape)) is not None][: crops.most]
    answers = pipeline.run_parts(frame, [region for _, region in parts])
    items: list[Item] = []
    size = 2
    for (one, _), said in zip(parts, answers, strict=True):
        for item in said.items:
            made = Followed(item, one.index, one.label, one.box)
            size += len(json.dumps(made.to_json(), separators=(",", ":"))) + 1
            if len(items) < MAX_ITEMS and size <= MAX_ANSWER_BYTES:
                items.append(made)
    return Answer(
        items,
        sum(said.preprocess_ns for said in answers),
        sum(said.inference_ns for said in answers),
        sum(said.postprocess_ns for said in answers),
    )


def _region(one: Found, crops: Crops, shape: Sequence[int]) -> tuple[int, int, int, int] | None:
    """Whole pixels of the frame around a box; None for one that is not wanted or not in it."""
    x0, y0, x1, y1 = one.box
    width, height = x1 - x0, y1 - y0
    if (crops.labels and one.label not in crops.labels) or min(width, height) < max(crops.least_px, 1):
        return None
    left, top = max(0.0, x0 - crops.margin * width), max(0.0, y0 - crops.margin * height)
    right, bottom = min(float(shape[1]), x1 + crops.margin * width), min(float(shape[0]), y1 + crops.margin * height)
    if right - left < 1 or bottom - top < 1:
        return None
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 53
