"""From a source's frame to the input tensor: the release's declaration compiled into a few OpenCV and NumPy calls.

A `Plan` is made once for a frame size and an input tensor, and then run per frame without allocating.
Integer inputs: mean, std and quantization become one table of 256 entries; a table that is the identity costs nothing
and one that is `pixel - 128` is one XOR. Float inputs: one widening copy and in-place arithmetic over whole rows.
Invariants: a plan writes every element of its tensor on every run; it never writes to the frame; its inverse maps the
tensor's pixel edges onto the source's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason
from agent.worker.graph import Preprocess
from agent.worker.tensor import Array, TensorSpec, require_scale

if TYPE_CHECKING:
    from agent.worker.sources import Frame

LETTERBOX_GREY = 114
_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}
_INTEGERS = {"int8": (-128, 127), "uint8": (0, 255)}
_FLOATS = ("float32", "float16")

_Step = Callable[["Frame"], "Frame"]
_Writer = Callable[["Frame"], None]


@dataclass(frozen=True, slots=True)
class Layout:
    """How an image lies in a tensor."""

    height: int
    width: int
    channels: int
    planar: bool


@dataclass(frozen=True, slots=True)
class Inverse:
    """From the tensor's pixels to the source's: x * scale_x + shift_x, clipped to the source."""

    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float
    width: int
    height: int

    def boxes(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map [n, 4] boxes (x0, y0, x1, y1)."""
        mapped = boxes * (self.scale_x, self.scale_y, self.scale_x, self.scale_y)
        mapped += (self.shift_x, self.shift_y, self.shift_x, self.shift_y)
        return np.clip(mapped, 0, (self.width, self.height, self.width, self.height))


def image_layout(spec: TensorSpec) -> Layout:
    """Where height, width and channels are in an input tensor.

    Raises:
        ModelError: `model_shape` when no image of 1 or 3 channels fits it.
    """
    shape = spec.shape
    if len(shape) == 4 and shape[0] == 1:
        if shape[3] in (1, 3):
            return Layout(shape[1], shape[2], shape[3], planar=False)
        if shape[1] in (1, 3):
            return Layout(shape[2], shape[3], shape[1], planar=True)
    raise ModelError(
        Reason.MODEL_SHAPE,
        f"input {spec.name[:60]!r} of shape {list(shape)} takes no image",
        hint="an image input is [1, height, width, 1 or 3] or [1, 1 or 3, height, width]",
    )


class Plan:
    """Preprocessing of frames of one size into one tensor.

    Args:
        declared: what the release asks for.
        spec: of the input tensor.
        tensor: the buffer to fill: `spec.shape`, `spec.dtype`, C-contiguous.
        height, width: of the frames, uint8 BGR.

    Raises:
        ModelError: `model_shape` when the declaration does not fit the tensor.
    """

    def __init__(self, declared: Preprocess, spec: TensorSpec, tensor: Array, height: int, width: int) -> None:
        layout = image_layout(spec)
        _check(spec)
        declared = _for_channels(declared, layout)
        self.tensor = tensor
        resize, self.inverse = _resize(declared, layout, height, width)
        self._steps: list[_Step] = [] if resize is None else [resize]
        planes_color = layout.planar and layout.channels == 3 and declared.color != "gray"
        if not planes_color:
            self._steps += _color(declared.color, layout)
        reverse = planes_color and declared.color == "rgb"
        if spec.dtype in _INTEGERS:
            table = quantization_table(declared, spec, layout.channels)
            self._write = _integer_writer(tensor, layout, table, reverse)
        else:
            self._write = _float_writer(tensor, layout, declared, reverse)

    def run(self, frame: Frame) -> None:
        """Fill the tensor from a frame."""
        image = frame
        for step in self._steps:
            image = step(image)
        self._write(image)


def _check(spec: TensorSpec) -> None:
    if spec.dtype not in _INTEGERS and spec.dtype not in _FLOATS:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"input {spec.name[:60]!r} is {spec.dtype}, which takes no image",
            hint="an image input is int8, uint8, float16 or float32",
        )
    require_scale(spec)


def _for_channels(declared: Preprocess, layout: Layout) -> Preprocess:
    """The declaration as it applies to the tensor's channels: equal values become one, one channel becomes grey."""
    numbers: dict[str, tuple[float, ...]] = {"mean": declared.mean, "std": declared.std}
    for name, values in numbers.items():
        if len(set(values)) == 1:
            numbers[name] = values[:1]
        elif len(values) != layout.channels:
            raise ModelError(
                Reason.MODEL_SHAPE,
                f"preprocess.{name} has {len(values)} values, the input {layout.channels} channels",
                hint="give one value, or one per channel",
            )
    color = "gray" if layout.channels == 1 else declared.color
    return replace(declared, color=color, mean=numbers["mean"], std=numbers["std"])


def quantization_table(declared: Preprocess, spec: TensorSpec, channels: int) -> NDArray[np.uint8]:
    """The tensor's byte for each pixel value: uint8 [256, n], n = 1 when all channels agree, else `channels`.

    Without a scale the value itself is rounded. The bytes of int8 are its two's complement.
    """
    count = channels if max(len(declared.mean), len(declared.std)) > 1 else 1
    mean = np.broadcast_to(np.asarray(declared.mean, np.float64), (count,))
    std = np.broadcast_to(np.asarray(declared.std, np.float64), (count,))
    values = (np.arange(256, dtype=np.float64)[:, None] - mean) / std
    steps = values if spec.scale is None else values / spec.scale + (spec.zero_point or 0)
    low, high = _INTEGERS[spec.dtype]
    table = np.clip(np.rint(steps), low, high).astype(np.int16).astype(np.uint8)
    return table[:, :1] if (table == table[:, :1]).all() else table


def _resize(declared: Preprocess, layout: Layout, height: int, width: int) -> tuple[_Step | None, Inverse]:
    """The geometric step (None when sizes agree already) and its inverse."""
    to_h, to_w = layout.height, layout.width
    flag = _INTERPOLATION[declared.interpolation]
    canvas = np.full((to_h, to_w, 3), LETTERBOX_GREY, np.uint8)
    if declared.resize == "letterbox":
        ratio = min(to_w / width, to_h / height)
        in_w, in_h = max(1, round(width * ratio)), max(1, round(height * ratio))
        left, top = (to_w - in_w) // 2, (to_h - in_h) // 2
        inside = canvas[top : top + in_h, left : left + in_w]

        def letterbox(frame: Frame) -> Frame:
            cv2.resize(frame, (in_w, in_h), dst=inside, interpolation=flag)
            return canvas

        return letterbox, Inverse(
            width / in_w, height / in_h, -left * width / in_w, -top * height / in_h, width, height
        )
    x0 = y0 = 0
    from_w, from_h = width, height
    if declared.resize == "crop":
        ratio = min(width / to_w, height / to_h)
        from_w, from_h = min(width, max(1, round(to_w * ratio))), min(height, max(1, round(to_h * ratio)))
        x0, y0 = (width - from_w) // 2, (height - from_h) // 2
    inverse = Inverse(from_w / to_w, from_h / to_h, x0, y0, width, height)
    whole = (from_w, from_h) == (width, height)
    if (from_w, from_h) == (to_w, to_h):
        return (None if whole else lambda frame: frame[y0 : y0 + from_h, x0 : x0 + from_w]), inverse

    def scale(frame: Frame) -> Frame:
        part = frame if whole else frame[y0 : y0 + from_h, x0 : x0 + from_w]
        cv2.resize(part, (to_w, to_h), dst=canvas, interpolation=flag)
        return canvas

    return scale, inverse


def _color(color: str, layout: Layout) -> list[_Step]:
    """Steps from BGR to the declared colour and the tensor's channels, all interleaved."""
    if color == "bgr":
        return []
    if color == "rgb":
        return [_converter(cv2.COLOR_BGR2RGB, (layout.height, layout.width, 3))]
    grey = _converter(cv2.COLOR_BGR2GRAY, (layout.height, layout.width))
    if layout.channels == 1:
        return [grey]
    return [grey, _converter(cv2.COLOR_GRAY2BGR, (layout.height, layout.width, 3))]


def _converter(code: int, shape: tuple[int, ...]) -> _Step:
    buffer = np.empty(shape, np.uint8)

    def convert(image: Frame) -> Frame:
        cv2.cvtColor(image, code, dst=buffer)
        return buffer

    return convert


def _integer_writer(tensor: Array, layout: Layout, table: NDArray[np.uint8], reverse: bool) -> _Writer:
    raw = tensor.view(np.uint8)
    pixels = np.arange(256, dtype=np.uint8)[:, None]
    identity = bool(table.shape[1] == 1 and (table == pixels).all())
    flips = bool(table.shape[1] == 1 and (table == pixels ^ 0x80).all())
    if not layout.planar:
        target = raw.reshape((layout.height, layout.width, layout.channels)[: 2 if layout.channels == 1 else 3])
        if identity:
            return lambda image: np.copyto(target, image)
        if flips:
            return lambda image: void(np.bitwise_xor(image, 0x80, out=target))
        lut = np.ascontiguousarray(table[:, 0] if table.shape[1] == 1 else table[None])
        return lambda image: void(cv2.LUT(image, lut, dst=target))

    planes = [raw.reshape(layout.channels, layout.height, layout.width)[c] for c in range(layout.channels)]
    split = _splitter(planes, reverse)
    tables = [np.ascontiguousarray(table[:, c % table.shape[1]]) for c in range(layout.channels)]

    def write(image: Frame) -> None:
        split(image)
        if flips:
            np.bitwise_xor(raw, 0x80, out=raw)
        elif not identity:
            for plane, lut in zip(planes, tables, strict=True):
                cv2.LUT(plane, lut, dst=plane)

    return write


def _float_writer(tensor: Array, layout: Layout, declared: Preprocess, reverse: bool) -> _Writer:
    """value = pixel * gain + offset, computed in float32 whatever the tensor's width."""
    gain = np.float32(1) / np.asarray(declared.std, np.float32)
    offset = np.asarray(-np.asarray(declared.mean) / np.asarray(declared.std), np.float32)
    single = tensor.dtype == np.float32
    work: Array = tensor if single else np.empty(tensor.shape, np.float32)
    target: Array

    if layout.planar:
        small = np.empty((layout.channels, layout.height, layout.width), np.uint8)
        split = _splitter(list(small), reverse)
        target = work.reshape(small.shape)
        gain, offset = gain.reshape(-1, 1, 1), offset.reshape(-1, 1, 1)

        def fill(image: Frame) -> None:
            split(image)
            np.copyto(target, small)

    else:
        target = work.reshape(layout.height, layout.width * layout.channels)
        # Three numbers broadcast over pixels cost ten times as much as one long row does.
        if gain.size > 1:
            gain = np.tile(gain, layout.width)
        if offset.size > 1:
            offset = np.tile(offset, layout.width)

        def fill(image: Frame) -> None:
            np.copyto(target, image.reshape(target.shape))

    scaled, shifted = bool((gain != 1).any()), bool((offset != 0).any())

    def write(image: Frame) -> None:
        fill(image)
        if scaled:
            np.multiply(target, gain, out=target)
        if shifted:
            np.add(target, offset, out=target)
        if not single:
            np.copyto(tensor, work)

    return write


def _splitter(planes: list[Any], reverse: bool) -> _Writer:
    """Write an interleaved image into `planes`, last channel first if `reverse`."""
    if len(planes) == 1:
        return lambda image: np.copyto(planes[0], image)
    order = planes[::-1] if reverse else planes
    return lambda image: void(cv2.split(image, order))


def void(_: object) -> None:
    """Drop a value that was written in place."""
