"""What stands in a TFLite file, read from its flatbuffer without a library.

It is not a validator of models: it hands out tensors, operators and their options, and knows no operator's meaning.
Field numbers are those of TFLite's schema (schema.fbs, version 3).
Invariants: no byte outside the file is read, whatever its offsets say; what is read of it is bounded by `MAX_*`, so
that tables which all point at one another cost no more than the file; constants are views into the file, never copies.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from agent.errors import ModelError, Reason
from agent.worker.delegates.tflitenames import operator_name
from agent.worker.tensor import DTYPES, MAX_RANK, Array

MAX_TENSORS = 1 << 16
MAX_OPERATORS = 1 << 14
MAX_ELEMENTS = 1 << 21
"""Numbers in all shapes, scales, zero points and lists of tensors together."""
MAX_NAME_BYTES = 1024
MAX_DIM = 1 << 30

_TYPES = {
    0: "float32",
    1: "float16",
    2: "int32",
    3: "uint8",
    4: "int64",
    6: "bool",
    7: "int16",
    9: "int8",
    10: "float64",
    15: "uint32",
    16: "uint16",
}
_CUSTOM = 32
_MAX_OLD_CODE = 127  # from here on the code stands in a wider field alone


@dataclass(frozen=True)
class Quantization:
    """Real value = (q - zero_point) * scale: one pair for all, or one for each index of the dimension `axis`."""

    scales: Array
    zero_points: Array
    axis: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of a graph; `data` is None unless it is a constant, `dtype` is empty for kinds nobody here reads."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    quantization: Quantization | None
    data: Array | None
    odd: str = ""
    """Why nothing here can use it: sparse, or a variable. Empty for the others."""
    open: bool = False
    """Whether a size other than the first, the batch, is left open; `shape` has 1 there."""


@dataclass(frozen=True)
class Operator:
    """One node: indices of its tensors (-1 for one left out), and its options."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Record


@dataclass(frozen=True)
class Graph:
    """The main graph of a file, its operators in the order in which they run."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read_graph(data: memoryview) -> Graph:
    """Read the main graph of a TFLite file.

    Raises:
        ModelError: `model_unloadable` for whatever is not a whole TFLite file.
    """
    if len(data) < 8 or bytes(data[4:8]) != b"TFL3":
        raise malformed("it does not begin as a TFLite model")
    file = _File(data)
    model = file.root()
    graphs = model.records(2, 1 << 10)
    if not graphs:
        raise malformed("it has no graph")
    buffers = model.records(4, MAX_TENSORS)
    codes = [_operator(code) for code in model.records(1, MAX_OPERATORS)]
    graph = graphs[0]
    tensors = tuple(_tensor(file, record, buffers) for record in graph.records(0, MAX_TENSORS))
    operators = []
    for record in graph.records(3, MAX_OPERATORS):
        code = record.unsigned(0)
        if code >= len(codes):
            raise malformed(f"it names operator code {code} of {len(codes)}")
        inputs = record.indices(1, len(tensors), optional=True)
        operators.append(
            Operator(codes[code], inputs, record.indices(2, len(tensors)), record.record(4) or file.empty())
        )
    return Graph(tensors, tuple(operators), graph.indices(1, len(tensors)), graph.indices(2, len(tensors)))


def malformed(why: str) -> ModelError:
    """The error of a file that cannot be read."""
    return ModelError(Reason.MODEL_UNLOADABLE, f"the TFLite file is damaged: {why}", hint="fetch or export it again")


class Record:
    """A flatbuffer's table: fields by number, each absent one its default."""

    def __init__(self, file: _File, position: int, fields: tuple[int, ...]) -> None:
        self._file = file
        self._position = position
        self._fields = fields

    def _at(self, field: int) -> int:
        """Position of a field's value; 0 when it is absent."""
        offset = self._fields[field] if field < len(self._fields) else 0
        return self._position + offset if offset else 0

    def byte(self, field: int, default: int = 0) -> int:
        at = self._at(field)
        return self._file.number("<b", at) if at else default

    def flag(self, field: int) -> bool:
        return self.byte(field) != 0

    def signed(self, field: int, default: int = 0) -> int:
        at = self._at(field)
        return self._file.number("<i", at) if at else default

    def unsigned(self, field: int) -> int:
        at = self._at(field)
        return self._file.number("<I", at) if at else 0

    def long(self, field: int) -> int:
        at = self._at(field)
        return self._file.number("<Q", at) if at else 0

    def real(self, field: int, default: float = 0.0) -> float:
        at = self._at(field)
        return self._file.real(at) if at else default

    def record(self, field: int) -> Record | None:
        at = self._at(field)
        return self._file.record(at + self._file.number("<I", at)) if at else None

    def records(self, field: int, most: int) -> list[Record]:
        """A list of tables."""
        at = self._at(field)
        if not at:
            return []
        start, count = self._file.vector(at, 4, most)
        self._file.spend(count)
        places = [start + 4 * i for i in range(count)]
        return [self._file.record(place + self._file.number("<I", place)) for place in places]

    def numbers(self, field: int, dtype: str) -> Array:
        """A list of numbers, as a view into the file."""
        at = self._at(field)
        if not at:
            return np.zeros(0, dtype)
        start, count = self._file.vector(at, np.dtype(dtype).itemsize, MAX_ELEMENTS)
        self._file.spend(count)
        return np.frombuffer(self._file.data, dtype, count, start)

    def indices(self, field: int, limit: int, *, optional: bool = False) -> tuple[int, ...]:
        """A list of tensors' numbers below `limit`; -1 stands for none where `optional`."""
        found = tuple(int(index) for index in self.numbers(field, "<i4"))
        for index in found:
            if not (-1 if optional else 0) <= index < limit:
                raise malformed(f"it names tensor {index} of {limit}")
        return found

    def bytes(self, field: int) -> memoryview | None:
        """A list of bytes; None when it is absent."""
        at = self._at(field)
        if not at:
            return None
        start, count = self._file.vector(at, 1, len(self._file.data))
        return self._file.data[start : start + count]


class _File:
    """Bounds-checked access to the bytes."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self._left = MAX_ELEMENTS

    def spend(self, elements: int) -> None:
        self._left -= elements
        if self._left < 0:
            raise malformed(f"it lists more than {MAX_ELEMENTS} numbers beside its weights")

    def _within(self, start: int, length: int) -> None:
        if not 0 <= start <= len(self.data) - length:
            raise malformed(f"it points at byte {start}, behind its end")

    def number(self, kind: str, at: int) -> int:
        self._within(at, struct.calcsize(kind))
        return int(struct.unpack_from(kind, self.data, at)[0])

    def real(self, at: int) -> float:
        self._within(at, 4)
        return float(struct.unpack_from("<f", self.data, at)[0])

    def vector(self, at: int, size: int, most: int) -> tuple[int, int]:
        """Start and length of the vector that the offset at `at` names."""
        start = at + self.number("<I", at)
        count = self.number("<I", start)
        if count > most:
            raise malformed(f"it has a list of {count} items, beyond {most}")
        self._within(start + 4, count * size)
        return start + 4, count

    def root(self) -> Record:
        return self.record(self.number("<I", 0))

    def record(self, position: int) -> Record:
        """The table at `position`."""
        table = position - self.number("<i", position)
        length = self.number("<H", table)
        self._within(table, length)
        if length < 4 or length % 2:
            raise malformed(f"it has a table of {length} bytes")
        count = (length - 4) // 2
        self.spend(count)
        return Record(self, position, struct.unpack_from(f"<{count}H", self.data, table + 4))

    def empty(self) -> Record:
        """A table whose every field is absent."""
        return Record(self, 0, ())


def _operator(code: Record) -> str:
    """Name of an operator; a custom one is named after its author's word for it."""
    old = code.byte(0)
    number = code.signed(3) if old == _MAX_OLD_CODE else max(old, code.signed(3))
    if number == _CUSTOM:
        return f"CUSTOM {_text(code.bytes(1))!r}"
    return operator_name(number)


def _text(data: memoryview | None) -> str:
    return bytes(data[:MAX_NAME_BYTES] if data else b"").decode("utf-8", "replace")


def _tensor(file: _File, record: Record, buffers: list[Record]) -> Tensor:
    shape = tuple(int(size) for size in record.numbers(0, "<i4"))
    if len(shape) > MAX_RANK or any(not 0 <= size <= MAX_DIM for size in shape):
        raise malformed(f"it has a tensor of the shape {list(shape[: MAX_RANK + 1])}")
    dtype = _TYPES.get(record.byte(1), "")
    number = record.unsigned(2)
    if number >= len(buffers):
        raise malformed(f"it names buffer {number} of {len(buffers)}")
    held = _held(file, buffers[number]) if number else None  # buffer 0 is empty by definition
    data = None
    if held is not None and len(held) and dtype:
        if math.prod(shape) * DTYPES[dtype].itemsize != len(held):
            raise malformed(f"a {dtype} tensor of the shape {list(shape)} has {len(held)} bytes")
        data = np.frombuffer(held, DTYPES[dtype]).reshape(shape)
    odd = "sparse" if record.record(6) else "a variable" if record.flag(5) else ""
    quantization = _quantization(record.record(4), shape, dtype)
    is_open = bool((record.numbers(7, "<i4")[1:] < 0).any())
    return Tensor(_text(record.bytes(3)), dtype, shape, quantization, data, odd, is_open)


def _held(file: _File, buffer: Record) -> memoryview | None:
    """A constant's bytes: in the flatbuffer, or behind it, where large ones lie."""
    start, size = buffer.long(1), buffer.long(2)
    if start > 1:
        file._within(start, size)
        return file.data[start : start + size]
    return buffer.bytes(0)


def _quantization(record: Record | None, shape: tuple[int, ...], dtype: str) -> Quantization | None:
    if record is None:
        return None
    scales = record.numbers(2, "<f4")
    zero_points = record.numbers(3, "<i8")
    axis = record.signed(6)
    if not len(scales):
        return None
    if len(zero_points) == 0:
        zero_points = np.zeros(1, np.int64)
    if len(scales) != 1 and not (0 <= axis < len(shape) and shape[axis] == len(scales)):
        raise malformed(f"a tensor of the shape {list(shape)} has {len(scales)} scales along dimension {axis}")
    if len(scales) == 1 and not 0 <= axis < max(len(shape), 1):
        raise malformed(f"a tensor of the shape {list(shape)} is quantized along dimension {axis}")
    if len(zero_points) not in (1, len(scales)):
        raise malformed(f"a tensor has {len(scales)} scales and {len(zero_points)} zero points")
    if dtype in ("int8", "uint8", "int16"):
        limits = np.iinfo(dtype)
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise malformed("a tensor has a scale that is no positive number")
        if not ((zero_points >= limits.min).all() and (zero_points <= limits.max).all()):
            raise malformed(f"a zero point lies outside {dtype}")
    return Quantization(scales.astype(np.float32), zero_points.astype(np.int64), axis)
