"""Coordinates come back to where they were, within half a source pixel: for any sizes, resizes and interpolations.

The picture is its own ruler: channels of several pictures together hold each pixel's column (or row) number, so what
lies at a place of the tensor says itself where it came from. A synthetic model looks a known box up on that ruler, at
fractions of a tensor's pixel, and its answer has to be the box.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.worker.graph import Preprocess, parse_graph
from agent.worker.postprocess import compile_postprocess
from agent.worker.preprocess import Plan
from agent.worker.tensor import TensorSpec

HALF = 0.5
STEPS = 8
"""Grey levels a source pixel: OpenCV's whole numbers are off by up to one level."""


def rulers(height: int, width: int, *, rows: bool) -> list[np.ndarray]:
    """Pictures whose pixels hold `STEPS` times their column or row number, the sum of all channels."""
    numbers = STEPS * (np.arange(height)[:, None] if rows else np.arange(width)[None])
    channels = [np.clip(numbers - start, 0, 255) for start in range(0, int(numbers.max()) + 1, 255)]
    channels += [np.zeros_like(numbers)] * (-len(channels) % 3)
    wide = [np.broadcast_to(channel, (height, width)).astype(np.uint8) for channel in channels]
    return [np.stack(wide[i : i + 3], axis=2) for i in range(0, len(wide), 3)]


def look_up(line: np.ndarray, value: float, part: slice) -> float | None:
    """Where along a line of tensor pixels the ruler shows `value`, in edges; None where it is not on it."""
    seen = line[part]
    steps = np.flatnonzero((seen[:-1] <= value) & (value < seen[1:]))
    if not steps.size:
        return None
    low = int(steps[0])
    return part.start + low + HALF + (value - seen[low]) / (seen[low + 1] - seen[low])


def lines(declared: Preprocess, size: tuple[int, int], target: tuple[int, int]):
    """The plan, and the source's column numbers, then its row numbers, that the tensor shows along its middle."""
    spec = TensorSpec("x", "float32", (1, *target, 3))
    tensor = spec.empty()
    plan = Plan(declared, spec, tensor, *size)
    columns, rows_of = inside(plan, target, 0), inside(plan, target, 1)
    column, row = (columns.start + columns.stop) // 2, (rows_of.start + rows_of.stop) // 2
    found = []
    for rows in (False, True):
        seen = 0
        for picture in rulers(*size, rows=rows):
            plan.run(picture)
            seen = seen + (tensor[0, :, column] if rows else tensor[0, row]).sum(axis=1)
        found.append(seen / STEPS)
    return plan, found


def inside(plan: Plan, target: tuple[int, int], axis: int) -> slice:
    """The tensor pixels that hold picture, not bars."""
    inverse = plan.inverse
    scale, shift, low, high = (
        (inverse.scale_x, inverse.shift_x, inverse.left, inverse.right),
        (inverse.scale_y, inverse.shift_y, inverse.top, inverse.bottom),
    )[axis]
    first, last = (low - shift) / scale, (high - shift) / scale
    return slice(max(0, round(first)), min(target[1 - axis], round(last)))


SIZES = st.tuples(st.integers(2, 240), st.integers(2, 320)).map(lambda size: (2 * size[0] + 1, 2 * size[1] + 1))
TARGETS = st.tuples(st.integers(8, 160), st.integers(8, 160))
RESIZES = st.sampled_from(["stretch", "letterbox", "crop"])
ROIS = st.sampled_from([(0.0, 0.0, 1.0, 1.0), (0.25, 0.1, 0.9, 0.77), (0.5, 0.0, 1.0, 0.5)])


@settings(max_examples=300, deadline=None)
@given(
    size=SIZES, target=TARGETS, resize=RESIZES, roi=ROIS,
    align=st.sampled_from(["center", "top_left"]), interpolation=st.sampled_from(["nearest", "linear", "area"]),
)  # fmt: skip
def test_every_pixel_of_a_tensor_comes_back_to_the_source_pixel_it_shows(
    size, target, resize, roi, align, interpolation
):
    declared = Preprocess(resize, interpolation, "bgr", roi=roi, align=align, pad=0)
    plan, shown = lines(declared, size, target)
    for axis, seen in enumerate(shown):
        part = inside(plan, target, axis)
        places = np.zeros((len(seen), 2))
        places[:, axis] = np.arange(len(seen)) + HALF
        back = plan.inverse.points(places)[part, axis]
        scale = (plan.inverse.scale_x, plan.inverse.scale_y)[axis]
        error = np.abs(back - (seen[part] + HALF))
        if scale < 1:
            edge = int(np.ceil(1 / scale))  # beyond the last middle there is nothing to mix with
            error = error[edge:-edge]
        assert error.max(initial=0.0) <= HALF + 1e-6, (axis, error.max(), scale)


@settings(max_examples=200, deadline=None)
@given(
    size=SIZES, target=st.tuples(st.integers(24, 160), st.integers(24, 160)), resize=RESIZES, roi=ROIS,
    align=st.sampled_from(["center", "top_left"]), where=st.lists(st.floats(0.15, 0.85), min_size=4, max_size=4),
)  # fmt: skip
def test_a_box_that_a_model_marks_comes_back_within_half_a_source_pixel(size, target, resize, roi, align, where):
    declared = Preprocess(resize, "linear", "bgr", roi=roi, align=align, pad=0)
    plan, (columns, rows) = lines(declared, size, target)
    inverse = plan.inverse
    x = sorted(inverse.left + (inverse.right - inverse.left) * share for share in where[:2])
    y = sorted(inverse.top + (inverse.bottom - inverse.top) * share for share in where[2:])
    # the ruler shows a pixel's number at its middle
    across, down = inside(plan, target, 0), inside(plan, target, 1)
    marked = [
        look_up(line, place - HALF, part)
        for line, place, part in (
            (columns, x[0], across),
            (rows, y[0], down),
            (columns, x[1], across),
            (rows, y[1], down),
        )
    ]
    if None in marked or x[1] - x[0] < 1 or y[1] - y[0] < 1:
        return  # cropped away, or no box
    x0, y0, x1, y1 = marked
    graph = parse_graph({"task": "detection", "labels": ["box"], "postprocess": {"kind": "yolov8"}})
    answer = np.asarray([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, 0.9], np.float32)[None, :, None]
    read = compile_postprocess(
        graph, (TensorSpec("y", "float32", (1, 5, 1)),), (TensorSpec("x", "float32", (1, *target, 3)),)
    )
    (item,) = read((answer,), inverse)
    np.testing.assert_allclose(item.box, [x[0], y[0], x[1], y[1]], atol=HALF)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(20, 200).map(lambda n: 2 * n + 1), bars=st.sampled_from([1, 2, 3]))
def test_a_letterbox_with_bars_of_one_pixel_is_exact(height, bars):
    """The picture is as wide as the tensor and `bars` pixels lower: nothing is scaled, only moved."""
    for align in ("center", "top_left"):
        declared = Preprocess("letterbox", "linear", "bgr", align=align, pad=7)
        spec = TensorSpec("x", "uint8", (1, height + bars, height, 3))
        tensor = spec.empty()
        frame = np.random.default_rng(height).integers(0, 256, (height, height, 3), dtype=np.uint8)
        plan = Plan(declared, spec, tensor, height, height)
        plan.run(frame)
        top = bars // 2 if align == "center" else 0
        np.testing.assert_array_equal(tensor[0, top : top + height], frame)
        assert (np.delete(tensor[0], np.s_[top : top + height], axis=0) == 7).all()
        assert plan.inverse.points(np.asarray([[3.0, top + 5.0]]))[0].tolist() == [3.0, 5.0]


def test_nothing_outside_the_region_of_interest_reaches_the_model():
    frame = np.full((101, 203, 3), 255, np.uint8)
    frame[20:70, 51:152] = 9
    spec = TensorSpec("x", "uint8", (1, 50, 101, 3))
    for resize in ("stretch", "letterbox", "crop"):
        tensor = spec.empty()
        plan = Plan(
            Preprocess(resize, "linear", "bgr", roi=(51 / 203, 20 / 101, 152 / 203, 70 / 101)), spec, tensor, 101, 203
        )
        plan.run(frame)
        assert (tensor == 9).all()
        assert plan.inverse.boxes(np.asarray([[-5.0, -5.0, 500.0, 500.0]]))[0].tolist() == [51, 20, 152, 70]


def test_a_region_of_a_frame_of_one_pixel_is_that_pixel():
    spec = TensorSpec("x", "uint8", (1, 8, 8, 3))
    tensor = spec.empty()
    Plan(Preprocess(color="bgr", roi=(0.9, 0.9, 0.95, 0.95)), spec, tensor, 1, 1).run(np.full((1, 1, 3), 42, np.uint8))
    assert (tensor == 42).all()
