"""Plans against a slow, plain reference, and their inverse against known points."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import ModelError, Reason
from agent.worker.graph import Preprocess
from agent.worker.preprocess import Plan, image_layout, quantization_table
from agent.worker.tensor import TensorSpec

FLAGS = {"nearest": cv2.INTER_NEAREST_EXACT, "linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}


def spec_of(dtype: str, *, planar: bool, channels: int, size=(24, 32), scale=None, zero=None) -> TensorSpec:
    shape = (1, channels, *size) if planar else (1, *size, channels)
    return TensorSpec("x", dtype, shape, scale, zero)


def reference(declared: Preprocess, spec: TensorSpec, frame: np.ndarray) -> np.ndarray:
    """Step by step in float64, without a thought for speed."""
    layout = image_layout(spec)
    height, width = frame.shape[:2]
    flag = FLAGS[declared.interpolation]
    target = (layout.width, layout.height)
    if declared.resize == "letterbox":
        ratio = min(layout.width / width, layout.height / height)
        size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
        image = np.full((layout.height, layout.width, 3), declared.pad, np.uint8)
        left, top = (layout.width - size[0]) // 2, (layout.height - size[1]) // 2
        image[top : top + size[1], left : left + size[0]] = cv2.resize(frame, size, interpolation=flag)
    elif declared.resize == "crop":
        ratio = min(width / layout.width, height / layout.height)
        w, h = round(layout.width * ratio), round(layout.height * ratio)
        left, top = (width - w) // 2, (height - h) // 2
        image = cv2.resize(frame[top : top + h, left : left + w], target, interpolation=flag)
    else:
        image = cv2.resize(frame, target, interpolation=flag)
    if declared.color == "gray" or layout.channels == 1:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[:, :, None].repeat(layout.channels, 2)
    elif declared.color == "rgb":
        image = image[:, :, ::-1]
    values = (image.astype(np.float64) - np.asarray(declared.mean)) / np.asarray(declared.std)
    if spec.dtype in ("int8", "uint8", "int16"):
        steps = values if spec.scale is None else values / spec.scale + spec.zero_point
        limits = np.iinfo(spec.dtype)
        values = np.clip(np.rint(steps), limits.min, limits.max)
    if layout.planar:
        values = values.transpose(2, 0, 1)
    return values.reshape(spec.shape).astype(spec.dtype)


def run(declared: Preprocess, spec: TensorSpec, frame: np.ndarray) -> tuple[np.ndarray, Plan]:
    tensor = np.full(spec.shape, 99, np.dtype(spec.dtype))
    plan = Plan(declared, spec, tensor, *frame.shape[:2])
    plan.run(frame)
    return tensor, plan


@pytest.fixture(scope="module")
def frame() -> np.ndarray:
    rng = np.random.default_rng(5)
    image = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)
    image.flags.writeable = False  # as a ring's slot is
    return image


QUANTIZED = {
    "identity": ("uint8", 1 / 255, 0, (0.0,), (255.0,)),
    "flipped sign": ("int8", 1 / 255, -128, (0.0,), (255.0,)),
    "table": ("int8", 0.0078, -1, (127.0,), (127.5,)),
    "table per channel": ("int8", 0.02, 3, (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)),
    "sixteen bits": ("int16", 1 / 32768, 0, (0.0,), (255.0,)),
    "sixteen bits per channel": ("int16", 0.001, 0, (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)),
    "unquantized": ("uint8", None, None, (0.0,), (2.0,)),
}


@pytest.mark.parametrize(
    ("name", "resize", "color", "planar", "channels"),
    [
        combination
        for combination in itertools.product(
            QUANTIZED, ("stretch", "letterbox", "crop"), ("rgb", "bgr", "gray"), (False, True), (1, 3)
        )
        if combination[4] == 3 or (combination[2] == "gray" and "per channel" not in combination[0])
    ],
)
def test_integer_tensors_are_exactly_what_the_declaration_says(frame, name, resize, color, planar, channels):
    dtype, scale, zero, mean, std = QUANTIZED[name]
    declared = Preprocess(resize, "linear", color, mean, std)
    spec = spec_of(dtype, planar=planar, channels=channels, scale=scale, zero=zero)
    tensor, _ = run(declared, spec, frame)
    np.testing.assert_array_equal(tensor, reference(declared, spec, frame))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0,), (255.0,)), ((0.0,), (1.0,)), ((127.5,), (127.5,)), ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))],
)
def test_float_tensors_are_what_the_declaration_says(frame, dtype, planar, color, mean, std):
    declared = Preprocess("stretch", "area", color, mean, std)
    spec = spec_of(dtype, planar=planar, channels=3)
    tensor, _ = run(declared, spec, frame)
    np.testing.assert_allclose(tensor, reference(declared, spec, frame), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("interpolation", FLAGS)
def test_the_declared_interpolation_is_used(frame, interpolation):
    declared = Preprocess("stretch", interpolation, "bgr", (0.0,), (1.0,))
    spec = spec_of("uint8", planar=False, channels=3)
    np.testing.assert_array_equal(run(declared, spec, frame)[0], reference(declared, spec, frame))


def test_a_plan_leaves_nothing_of_the_frame_before(frame):
    declared = Preprocess("letterbox", "linear", "rgb", (0.0,), (255.0,))
    spec = spec_of("int8", planar=True, channels=3, scale=1 / 255, zero=-128)
    tensor = spec.empty()
    plan = Plan(declared, spec, tensor, *frame.shape[:2])
    plan.run(np.full_like(frame, 200))
    plan.run(frame)
    np.testing.assert_array_equal(tensor, reference(declared, spec, frame))


def test_a_frame_of_the_tensors_size_is_not_scaled(frame):
    declared = Preprocess("stretch", "linear", "bgr", (0.0,), (1.0,))
    spec = spec_of("uint8", planar=False, channels=3, size=frame.shape[:2])
    tensor, _ = run(declared, spec, frame)
    np.testing.assert_array_equal(tensor[0], frame)


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(16, 400), st.integers(16, 400)),
    target=st.tuples(st.integers(8, 96), st.integers(8, 96)),
)
def test_a_marked_spot_comes_back_to_where_it_was(resize, source, target):
    height, width = source
    image = np.zeros((height, width, 3), np.uint8)
    y, x = height // 2 - 3, width // 2 - 3
    image[y : y + 6, x : x + 6] = 255
    declared = Preprocess(resize, "area", "gray", (0.0,), (1.0,))
    spec = spec_of("float32", planar=False, channels=1, size=target)
    tensor, plan = run(declared, spec, image)
    weights = tensor[0, :, :, 0].astype(np.float64)
    weights[weights < 128] = 0  # the bars of a letterbox are grey
    if not weights.any():
        return
    rows, columns = np.indices(weights.shape)
    centre = [float((axis + 0.5).ravel() @ weights.ravel() / weights.sum()) for axis in (columns, rows)]
    box = plan.inverse.boxes(np.asarray([[*centre, *centre]]))[0]
    pixel = max(width / target[1], height / target[0], 1.0)
    assert abs(box[0] - (x + 3)) <= pixel
    assert abs(box[1] - (y + 3)) <= pixel


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
def test_boxes_come_back_clipped_to_the_source(resize, frame):
    declared = Preprocess(resize, "linear", "bgr", (0.0,), (1.0,))
    _, plan = run(declared, spec_of("uint8", planar=False, channels=3), frame)
    (box,) = plan.inverse.boxes(np.asarray([[-50.0, -50.0, 500.0, 500.0]]))
    assert box.tolist() == [0, 0, 80, 60]


def test_one_table_serves_all_channels_when_they_agree():
    spec = spec_of("int8", planar=False, channels=3, scale=1 / 255, zero=-128)
    table = quantization_table(Preprocess(mean=(0.0,), std=(255.0,)), spec, 3)
    assert table.shape == (256, 1)
    assert (table[:, 0].view(np.uint8) == np.arange(256, dtype=np.uint8) ^ 0x80).all()


@pytest.mark.parametrize("shape", [(1, 640), (1, 96, 96), (1, 96, 96, 5), (2, 96, 96, 3), (1, 8, 8, 3, 1)])
def test_a_tensor_that_takes_no_image_is_a_model_shape_error_of_one_line(shape):
    with pytest.raises(ModelError) as caught:
        image_layout(TensorSpec("x", "float32", shape))
    assert caught.value.reason is Reason.MODEL_SHAPE
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("declared", "dtype", "channels"),
    [(Preprocess(mean=(1.0, 2.0, 3.0)), "int8", 1), (Preprocess(std=(1.0, 2.0, 3.0)), "float32", 1),
     (Preprocess(), "int32", 3)],
)  # fmt: skip
def test_a_declaration_that_does_not_fit_the_tensor_is_refused(declared, dtype, channels):
    spec = spec_of(dtype, planar=False, channels=channels)
    with pytest.raises(ModelError) as caught:
        Plan(declared, spec, spec.empty(), 60, 80)
    assert caught.value.reason is Reason.MODEL_SHAPE


def test_an_input_of_one_channel_gets_grey_whatever_order_is_declared(frame):
    spec = spec_of("uint8", planar=False, channels=1)
    grey = run(Preprocess(color="gray"), spec, frame)[0]
    np.testing.assert_array_equal(run(Preprocess(color="rgb", mean=(0.0,) * 3), spec, frame)[0], grey)


@pytest.mark.parametrize(("align", "top"), [("center", 2), ("top_left", 0)])
def test_bars_have_the_declared_grey_and_lie_where_it_says(frame, align, top):
    spec = spec_of("uint8", planar=False, channels=3, size=(28, 32))
    tensor, _ = run(Preprocess("letterbox", "linear", "bgr", pad=7, align=align), spec, frame)
    rows = (tensor[0] == 7).all(axis=(1, 2))
    assert np.flatnonzero(~rows).tolist() == list(range(top, top + 24))


def test_an_int8_input_without_a_scale_is_refused_instead_of_guessed():
    spec = spec_of("int8", planar=False, channels=3)
    with pytest.raises(ModelError) as caught:
        Plan(Preprocess(), spec, spec.empty(), 60, 80)
    assert caught.value.reason is Reason.MODEL_SHAPE
    assert "scale" in caught.value.message
