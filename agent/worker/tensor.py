"""What one input or output of a model is: name, dtype, shape and quantization.

Invariant: a `TensorSpec` has a fixed shape of positive sizes and a dtype from a closed table, so a size computed from
it is a size that can be allocated or refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason

Array = NDArray[Any]

DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"),
        *("float16", "float32", "float64", "bool"),
    )
}
MAX_TENSOR_BYTES = 1 << 28
MAX_RANK = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor; real value = (q - zero_point) * scale where `scale` is given."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | None = None
    zero_point: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether its numbers are steps, not values."""
        return self.scale is not None

    def empty(self) -> Array:
        """A zeroed array of this shape and dtype."""
        return np.zeros(self.shape, DTYPES[self.dtype])

    def to_json(self) -> dict[str, Any]:
        """As in release.json."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "scale": self.scale,
            "zero_point": self.zero_point,
        }

    def real(self, values: Array) -> NDArray[np.float32]:
        """The real values of a tensor of this spec, float32."""
        if self.scale is None:
            return values.astype(np.float32)
        return (values.astype(np.float32) - np.float32(self.zero_point or 0)) * np.float32(self.scale)


def make_spec(
    name: str, dtype: str, shape: Sequence[Any], scale: float | None = None, zero_point: int | None = None
) -> TensorSpec:
    """A checked spec; an open first dimension (the batch: None, a name, or not positive) becomes 1.

    Raises:
        ModelError: `model_shape` for another open dimension, an unknown dtype, or a tensor beyond `MAX_TENSOR_BYTES`.
    """
    if dtype not in DTYPES:
        raise _bad(name, f"has the dtype {dtype}", f"use one of {', '.join(DTYPES)}")
    sizes = [size if isinstance(size, int) and size > 0 else 0 for size in shape]
    if sizes and sizes[0] == 0:
        sizes[0] = 1
    if 0 in sizes or len(sizes) > MAX_RANK:
        raise _bad(name, f"has the open shape {list(shape)}", "export the model with a fixed shape")
    if math.prod(sizes) * DTYPES[dtype].itemsize > MAX_TENSOR_BYTES:
        raise _bad(name, f"has the shape {sizes}, beyond {MAX_TENSOR_BYTES} bytes", "use a smaller model input")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise _bad(name, f"has the scale {scale}", "quantize the model again")
    return TensorSpec(name, dtype, tuple(sizes), scale, None if scale is None else int(zero_point or 0))


def parse_specs(items: Sequence[Any], what: str) -> tuple[TensorSpec, ...]:
    """Specs as release.json writes them.

    Raises:
        ModelError: `model_shape`, naming `what`.
    """
    specs = []
    for item in items:
        try:
            name, dtype, shape = item["name"], item["dtype"], item["shape"]
            scale, zero_point = item.get("scale"), item.get("zero_point")
        except (TypeError, KeyError, AttributeError) as e:
            raise _bad(what, "has no name, dtype and shape", "build the release again") from e
        whole = all(isinstance(size, int) for size in shape) if isinstance(shape, list) else False
        numbers = (scale is None or isinstance(scale, (int, float))) and (
            zero_point is None or isinstance(zero_point, int)
        )
        if not (isinstance(name, str) and isinstance(dtype, str) and whole and numbers):
            raise _bad(what, "is not written as name, dtype, shape, scale, zero_point", "build the release again")
        specs.append(make_spec(name, dtype, shape, None if scale is None else float(scale), zero_point))
    return tuple(specs)


def bind(
    wanted: Sequence[TensorSpec], found: Sequence[TensorSpec], what: str
) -> tuple[tuple[TensorSpec, ...], list[int]]:
    """Match the specs a release declares with those a session has.

    Returns:
        The specs in the declared order, and for each its index in `found`. Nothing declared takes `found` as it is.
        Quantization comes from the release where it states one, because not every runtime tells it.

    Raises:
        ModelError: `model_shape`, one line naming the tensor and the difference.
    """
    if not wanted:
        return tuple(found), list(range(len(found)))
    names = [spec.name for spec in found]
    specs, indices = [], []
    for spec in wanted:
        if spec.name not in names:
            raise _bad(spec.name, f"is not among the model's {what}s {names}", "build the release from this model")
        index = names.index(spec.name)
        actual = found[index]
        if (actual.dtype, actual.shape) != (spec.dtype, spec.shape):
            raise _bad(
                spec.name,
                f"is {actual.dtype}{list(actual.shape)} in the model, {spec.dtype}{list(spec.shape)} in the release",
                "build the release from this model",
            )
        source = spec if spec.quantized else actual
        specs.append(TensorSpec(spec.name, spec.dtype, spec.shape, source.scale, source.zero_point))
        indices.append(index)
    return tuple(specs), indices


def require_scale(spec: TensorSpec) -> None:
    """Pass a tensor whose numbers can be read as values: floats, plain uint8, or quantized with a known scale.

    Raises:
        ModelError: `model_shape`; some runtimes run a quantized model but do not tell its scales.
    """
    if spec.dtype == "int8" and not spec.quantized:
        raise _bad(spec.name, "is int8 and nobody says its scale", "build a release where LiteRT can read the model")


def _bad(name: str, why: str, hint: str) -> ModelError:
    return ModelError(Reason.MODEL_SHAPE, f"tensor {name[:60]!r} {why}", hint=hint)
