"""From a source's frame to the input tensor: the release's declaration compiled into a few OpenCV and NumPy calls.

A `Plan` is made once for a frame size and an input tensor, and then run per frame without allocating.
Integer inputs: mean, std and quantization become one table of 256 entries; a table that is the identity costs nothing
and one that is `pixel - 128` is one XOR. Float inputs: one widening copy and in-place arithmetic over whole rows.
Invariants: a plan writes every element of its tensor on every run; it never writes to the frame; its inverse maps the
tensor's pixel edges onto the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason
from agent.worker.graph import Preprocess
from agent.worker.tensor import DTYPES, Array, TensorSpec, require_scale

if TYPE_CHECKING:
    from agent.worker.sources import Frame

# INTER_NEAREST takes the pixel at the corner of the source's area, _EXACT the one in its middle, as its inverse does
_INTERPOLATION = {"nearest": cv2.INTER_NEAREST_EXACT, "linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}
_INTEGERS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}
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
    """From the tensor's pixels to the source's: x * scale_x + shift_x, clipped to the part that was looked at.

    Coordinates are of edges: the first pixel reaches from 0 to 1, its middle is at 0.5, on either side.
    """

    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float
    right: int
    bottom: int
    left: int = 0
    top: int = 0

    def boxes(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map [n, 4] boxes (x0, y0, x1, y1)."""
        return self.points(boxes.reshape(-1, 2)).reshape(-1, 4)

    def points(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map [n, 2] points (x, y)."""
        mapped = points * (self.scale_x, self.scale_y)
        mapped += (self.shift_x, self.shift_y)
        np.maximum(mapped, (self.left, self.top), out=mapped)
        return np.minimum(mapped, (self.right, self.bottom), out=mapped)


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
        self._declared, self._layout, self._size = declared, layout, (height, width)
        self._canvas = np.full((layout.height, layout.width, 3), declared.pad, np.uint8)
        self.aim((0, 0, width, height))
        self._steps: list[_Step] = []
        planes_color = layout.planar and layout.channels == 3 and declared.color != "gray"
        if not planes_color:
            self._steps += _color(declared.color, layout)
        reverse = planes_color and declared.color == "rgb"
        if spec.dtype in _INTEGERS:
            table = quantization_table(declared, spec, layout.channels)
            self._write = _integer_writer(tensor, layout, table, reverse)
        else:
            self._write = _float_writer(tensor, layout, declared, reverse)

    def aim(self, region: tuple[int, int, int, int]) -> None:
        """Look at the pixels x0, y0, x1, y1 of the frames alone from now on, or rather at the declared part of them."""
        if self._declared.resize == "letterbox":
            self._canvas[:] = self._declared.pad  # another region has other bars
        within = _region(self._declared, region)
        self._resize, inverse = _resize(self._declared, self._layout, self._canvas, self._size, within)
        self.inverse: Inverse | None = inverse

    def run(self, frame: Frame) -> None:
        """Fill the tensor from a frame."""
        image = frame if self._resize is None else self._resize(frame)
        for step in self._steps:
            image = step(image)
        self._write(image)


def _check(spec: TensorSpec) -> None:
    if spec.dtype not in _INTEGERS and spec.dtype not in _FLOATS:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"input {spec.name[:60]!r} is {spec.dtype}, which takes no image",
            hint="an image input is int8, uint8, int16, float16 or float32",
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


def quantization_table(declared: Preprocess, spec: TensorSpec, channels: int) -> NDArray[Any]:
    """The tensor's number for each pixel value: [256, n] of its dtype, n = 1 when all channels agree, else `channels`.

    Without a scale the value itself is rounded.
    """
    count = channels if max(len(declared.mean), len(declared.std)) > 1 else 1
    mean = np.broadcast_to(np.asarray(declared.mean, np.float64), (count,))
    std = np.broadcast_to(np.asarray(declared.std, np.float64), (count,))
    values = (np.arange(256, dtype=np.float64)[:, None] - mean) / std
    steps = values if spec.scale is None else values / spec.scale + (spec.zero_point or 0)
    low, high = _INTEGERS[spec.dtype]
    table = np.clip(np.rint(steps), low, high).astype(DTYPES[spec.dtype])
    return table[:, :1] if (table == table[:, :1]).all() else table


def fill_constant(spec: TensorSpec, tensor: Array, values: Sequence[float]) -> None:
    """Write an input that every frame has alike: one number for all elements, or one for each, in real values.

    Raises:
        ModelError: `model_shape` when the numbers are not as many as the elements, or beyond what the tensor holds.
    """
    if len(values) not in (1, tensor.size):
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"input {spec.name[:60]!r} of shape {list(spec.shape)} takes {tensor.size} numbers, not {len(values)}",
            hint="correct constants in [preprocess]",
        )
    numbers = np.asarray(values, np.float64)
    if spec.scale is not None:
        numbers = numbers / spec.scale + (spec.zero_point or 0)
    if tensor.dtype.kind in "iu":
        limits = np.iinfo(tensor.dtype)
        numbers = np.rint(numbers)
        if numbers.min() < limits.min or numbers.max() > limits.max:
            raise ModelError(
                Reason.MODEL_SHAPE,
                f"input {spec.name[:60]!r} is {spec.dtype}, which does not hold its constants",
                hint="correct constants in [preprocess]",
            )
    tensor[...] = numbers.astype(tensor.dtype).reshape(tensor.shape if len(values) > 1 else ())


def _resize(
    declared: Preprocess, layout: Layout, canvas: Frame, size: tuple[int, int], region: tuple[int, int, int, int]
) -> tuple[_Step | None, Inverse]:
    """The geometric step from frames of `size` to the canvas (None when sizes agree already), and its inverse."""
    to_h, to_w = layout.height, layout.width
    x0, y0, x1, y1 = region
    clip = (x1, y1, x0, y0)
    from_w, from_h = x1 - x0, y1 - y0
    if declared.resize == "letterbox":
        ratio = min(to_w / from_w, to_h / from_h)
        in_w, in_h = max(1, round(from_w * ratio)), max(1, round(from_h * ratio))
        centred = declared.align == "center"
        left, top = ((to_w - in_w) // 2, (to_h - in_h) // 2) if centred else (0, 0)
        flag = _flag(declared, (from_h, from_w), (in_h, in_w))
        inside = canvas[top : top + in_h, left : left + in_w]

        def letterbox(frame: Frame) -> Frame:
            cv2.resize(frame[y0:y1, x0:x1], (in_w, in_h), dst=inside, interpolation=flag)
            return canvas

        scale_x, scale_y = from_w / in_w, from_h / in_h
        return letterbox, Inverse(scale_x, scale_y, x0 - left * scale_x, y0 - top * scale_y, *clip)
    if declared.resize == "crop":
        ratio = min(from_w / to_w, from_h / to_h)
        used_w, used_h = (min(n, max(1, round(to * ratio))) for n, to in ((from_w, to_w), (from_h, to_h)))
        x0, y0 = x0 + (from_w - used_w) // 2, y0 + (from_h - used_h) // 2
        from_w, from_h = used_w, used_h
    inverse = Inverse(from_w / to_w, from_h / to_h, x0, y0, *clip)
    whole = (from_h, from_w) == size
    if (from_w, from_h) == (to_w, to_h):
        return (None if whole else lambda frame: frame[y0 : y0 + from_h, x0 : x0 + from_w]), inverse
    flag = _flag(declared, (from_h, from_w), (to_h, to_w))

    def scale(frame: Frame) -> Frame:
        part = frame if whole else frame[y0 : y0 + from_h, x0 : x0 + from_w]
        cv2.resize(part, (to_w, to_h), dst=canvas, interpolation=flag)
        return canvas

    return scale, inverse


def _flag(declared: Preprocess, source: tuple[int, int], target: tuple[int, int]) -> int:
    """OpenCV's number of the interpolation. Its INTER_AREA misplaces pixels unless both sides shrink."""
    grows = target[0] > source[0] or target[1] > source[1]
    return _INTERPOLATION["linear" if grows and declared.interpolation == "area" else declared.interpolation]


def _region(declared: Preprocess, region: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The pixels x0, y0, x1, y1 of the declared part of a region, at least one each way."""
    left, top, width, height = region[0], region[1], region[2] - region[0], region[3] - region[1]
    x0, y0 = min(int(declared.roi[0] * width), width - 1), min(int(declared.roi[1] * height), height - 1)
    x1, y1 = max(x0 + 1, round(declared.roi[2] * width)), max(y0 + 1, round(declared.roi[3] * height))
    return left + x0, top + y0, left + x1, top + y1


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


def _integer_writer(tensor: Array, layout: Layout, table: NDArray[Any], reverse: bool) -> _Writer:
    small = tensor.itemsize == 1
    numbers = table.view(np.uint8)[:, 0] if small and table.shape[1] == 1 else None
    pixels = np.arange(256, dtype=np.uint8)
    identity = numbers is not None and bool((numbers == pixels).all())
    flips = numbers is not None and bool((numbers == pixels ^ 0x80).all())
    if small:  # OpenCV's and NumPy's calls on bytes serve both signs
        tensor, table = tensor.view(np.uint8), table.view(np.uint8)
    if not layout.planar:
        target = tensor.reshape((layout.height, layout.width, layout.channels)[: 2 if layout.channels == 1 else 3])
        if identity:
            return lambda image: np.copyto(target, image)
        if flips:
            return lambda image: void(np.bitwise_xor(image, 0x80, out=target))
        lut = np.ascontiguousarray(table[:, 0] if table.shape[1] == 1 else table[None])
        return lambda image: void(cv2.LUT(image, lut, dst=target))

    planes = list(tensor.reshape(layout.channels, layout.height, layout.width))
    looked_up = planes if small else [np.empty((layout.height, layout.width), np.uint8) for _ in planes]
    split = _splitter(looked_up, reverse)
    tables = [np.ascontiguousarray(table[:, c % table.shape[1]]) for c in range(layout.channels)]

    def write(image: Frame) -> None:
        split(image)
        if flips:
            np.bitwise_xor(tensor, 0x80, out=tensor)
        elif not identity:
            for plane, lut, target in zip(looked_up, tables, planes, strict=True):
                cv2.LUT(plane, lut, dst=target)

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
