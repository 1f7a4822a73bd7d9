"""Golden vectors: known inputs with the outputs a publisher recorded, and the comparison with what runs here.

Stored as an uncompressed .npz: `image_<i>` (the bytes of a PNG or JPEG file, uint8) or `tensor_<i>_<j>` (input j of
vector i), and the expected `<component>/<i>/<j>` (output j) in the output's own dtype, float32 mostly as float16.
Other runtimes and CPUs differ by a step or two, so nothing is compared bit for bit: each output has an absolute
tolerance after dequantization, and a classification must keep its winner wherever it led clearly.
Invariants: no pickle, no compression, and no array larger than its bytes in the file are ever read.
"""

from __future__ import annotations

import io
import math
import re
import tokenize
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason
from agent.worker.graph import Classification, Graph, Yolo
from agent.worker.pipeline import Pipeline
from agent.worker.postprocess.yolo import units as yolo_units
from agent.worker.tensor import Array, TensorSpec
from agent.worker.windowfile import decode_frame

MAX_GOLDEN_BYTES = 64 << 20
MAX_VECTORS = 256
DEFAULT_MARGIN = 0.1
ATOL_STEPS = 6
ATOL_RANGE_SHARE = 0.02
# of the largest value: vectors keep floats in half precision, and runtimes sum them in another order
ATOL_VALUE_SHARE = 0.002
# int8 networks requantize inside, so delegates that are all right may still differ by more than any fixed share
ATOL_SPREAD_FACTOR = 1.5
ATOL_MOST_RANGE_SHARE = 0.1
_ENCRYPTED = 1  # flag bit of a zip member
# NumPy evaluates the header of a member as Python's literals, with what that may raise
_UNREADABLE = (
    *(zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, SyntaxError, TypeError, LookupError),
    *(RecursionError, MemoryError, tokenize.TokenError),
)
_IMAGE = re.compile(r"image_(\d{1,3})")
_TENSOR = re.compile(r"tensor_(\d{1,3})_(\d{1,2})")
_EXPECTED = re.compile(r"(.{1,64})/(\d{1,3})/(\d{1,2})")
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Vector:
    """One input (an encoded image, or tensors in order) and the outputs each component gave."""

    image: bytes | None
    tensors: tuple[Array, ...]
    expected: Mapping[str, tuple[Array, ...]]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What may differ: `atol` per component and output, in real values; `margin` in score."""

    atol: Mapping[str, tuple[float, ...]]
    margin: float


def load_vectors(data: bytes) -> list[Vector]:
    """Parse a golden file.

    Raises:
        ModelError: `golden_mismatch` when it is not one.
    """
    if len(data) > MAX_GOLDEN_BYTES:
        raise _bad(f"a golden file of {len(data)} bytes")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            arrays = {info.filename.removesuffix(".npy"): _read(archive, info) for info in archive.infolist()}
    except _UNREADABLE as e:
        raise _bad(f"the golden file cannot be read: {e}") from e
    images: dict[int, bytes] = {}
    tensors: dict[int, dict[int, Array]] = {}
    expected: dict[int, dict[str, dict[int, Array]]] = {}
    for name, array in arrays.items():
        if match := _IMAGE.fullmatch(name):
            images[int(match[1])] = array.tobytes()
        elif match := _TENSOR.fullmatch(name):
            tensors.setdefault(int(match[1]), {})[int(match[2])] = array
        elif match := _EXPECTED.fullmatch(name):
            expected.setdefault(int(match[2]), {}).setdefault(match[1], {})[int(match[3])] = array
        else:
            raise _bad(f"the golden file has an unknown entry {name[:40]!r}")
    indices = sorted(images.keys() | tensors.keys())
    if not 0 < len(indices) <= MAX_VECTORS:
        raise _bad(f"the golden file has {len(indices)} vectors")
    return [
        Vector(
            images.get(i),
            _row(tensors.get(i, {})),
            {component: _row(outputs) for component, outputs in expected.get(i, {}).items()},
        )
        for i in indices
    ]


def dump_vectors(vectors: Sequence[Vector]) -> bytes:
    """The bytes of a golden file."""
    arrays: dict[str, Array] = {}
    for i, vector in enumerate(vectors):
        if vector.image is not None:
            arrays[f"image_{i}"] = np.frombuffer(vector.image, np.uint8)
        arrays.update({f"tensor_{i}_{j}": tensor for j, tensor in enumerate(vector.tensors)})
        for component, outputs in vector.expected.items():
            arrays.update({f"{component}/{i}/{j}": _compact(output) for j, output in enumerate(outputs)})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            # A fixed date: the same vectors give the same file, so the same signed hash.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue())
    return out.getvalue()


def parse_tolerance(tolerance: Mapping[str, Any]) -> Tolerance:
    """Parse `graph.golden` of a release.

    Raises:
        ModelError: `golden_mismatch`, naming the key.
    """
    atol = tolerance.get("atol", {})
    margin = tolerance.get("margin", DEFAULT_MARGIN)
    if not isinstance(atol, Mapping) or not _is_tolerance(margin):
        raise _bad("golden.atol or golden.margin of the release is not a tolerance")
    for component, values in atol.items():
        if not isinstance(values, list) or not all(_is_tolerance(value) for value in values):
            raise _bad(f"golden.atol of {str(component)[:40]!r} is not a list of numbers")
    return Tolerance({k: tuple(float(v) for v in values) for k, values in atol.items()}, float(margin))


def default_atol(spec: TensorSpec, outputs: Sequence[Array], others: Sequence[Array] = ()) -> float:
    """The tolerance of one output over the vectors.

    Args:
        spec: of the output.
        outputs: one array per vector, of the delegate that records.
        others: the same of further delegates, so many times as long as `outputs`; may be empty.

    Returns:
        The largest of six steps, two per cent of the output's range and 0.2 per cent of its largest value; half as
        much again as the other delegates were off where that is more, but then at most ten per cent of the range.
    """
    values = [spec.real(output) for output in outputs]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    span, largest = high - low, max(abs(low), abs(high))
    least = max(ATOL_STEPS * (spec.scale or 0.0), ATOL_RANGE_SHARE * span, ATOL_VALUE_SHARE * largest, 1e-6)
    spread = 0.0
    for i, other in enumerate(others):
        spread = max(spread, float(np.nan_to_num(np.abs(spec.real(other) - values[i % len(values)]).max())))
    return max(least, min(ATOL_SPREAD_FACTOR * spread, ATOL_MOST_RANGE_SHARE * span))


def units(pipeline: Pipeline, graph: Graph) -> list[Array]:
    """What each output's real values are multiplied by before they are compared: a tensor may hold pixels beside
    scores, and what is nothing in the one is everything in the other."""
    if isinstance(graph.postprocess, Yolo):
        return [yolo_units(graph.postprocess, pipeline.outputs[0], pipeline.inputs[pipeline.fed :])]
    return [np.ones((), np.float32)] * len(pipeline.outputs)


def rounded(output: Array, atol: float, unit: Array | float = 1.0) -> Array:
    """`output`, floats rounded to a power of two near an eighth of its tolerance, in units as `units` gives them.

    What is kept is compared with `atol`, so finer digits would be noise that no compression and no delta can shrink;
    at most a sixteenth of the tolerance is spent. Integers are kept as they are.
    """
    if not np.issubdtype(output.dtype, np.floating):
        return output
    step = 2.0 ** math.floor(math.log2(atol / 8)) / unit
    return (np.round(output / step) * step).astype(output.dtype)


def outputs_of(pipeline: Pipeline, vector: Vector) -> Sequence[Array]:
    """What the pipeline answers to a vector's input; valid until the next run.

    Raises:
        ModelError: `golden_mismatch` or `image_unreadable` when the input is not one for this model.
    """
    if vector.image is not None:
        return pipeline.outputs_of_image(decode_frame(vector.image))
    fits = [(t.dtype.name, t.shape) for t in vector.tensors] == [(s.dtype, s.shape) for s in pipeline.inputs]
    if not fits:
        raise _bad("a golden vector does not fit the model's inputs")
    return pipeline.outputs_of_tensors(vector.tensors)


def check(pipeline: Pipeline, graph: Graph, component: str, vectors: Sequence[Vector], tolerance: Tolerance) -> float:
    """Run every vector and compare.

    Returns:
        The largest error as a share of its tolerance, 0 to 1.

    Raises:
        ModelError: `golden_mismatch`, naming vector, output, error and tolerance.
    """
    atol = tolerance.atol.get(component, ())
    if len(atol) != len(pipeline.outputs):
        raise _bad(f"{component[:48]} has {len(pipeline.outputs)} outputs and {len(atol)} tolerances in the release")
    worst = 0.0
    weights = units(pipeline, graph)
    for i, vector in enumerate(vectors):
        expected = vector.expected.get(component, ())
        if len(expected) != len(pipeline.outputs):
            raise _bad(f"golden vector {i} holds nothing for {component}")
        actual = outputs_of(pipeline, vector)
        for spec, limit, unit, want, got in zip(pipeline.outputs, atol, weights, expected, actual, strict=True):
            if want.shape != got.shape:
                raise _bad(f"golden vector {i}: {spec.name[:60]} has shape {list(got.shape)}, not {list(want.shape)}")
            if not np.isfinite(got).all() and np.isfinite(want).all():
                raise ModelError(Reason.OUTPUT_NOT_FINITE, f"golden vector {i}: {spec.name[:60]} holds NaN or infinity")
            error = float((np.abs(spec.real(got) - spec.real(want)) * unit).max(initial=0.0))
            if not error <= limit:  # also true for NaN
                raise _bad(f"golden vector {i}: {spec.name[:60]} is off by {error:.4g}, tolerance {limit:.4g}")
            worst = max(worst, error / limit if limit else 0.0)
        if isinstance(graph.postprocess, Classification):
            _check_winner(i, pipeline.outputs[0], expected[0], actual[0], graph.postprocess, tolerance.margin)
    return worst


def _check_winner(i: int, spec: TensorSpec, want: Array, got: Array, declared: Classification, margin: float) -> None:
    before, after = (_scores(spec, values, declared) for values in (want, got))
    first, second = np.partition(before, -2)[-2:][::-1] if before.size > 1 else (before[0], -math.inf)
    if first - second > margin and int(before.argmax()) != int(after.argmax()):
        raise _bad(f"golden vector {i}: class {int(after.argmax())} wins instead of {int(before.argmax())}")


def _scores(spec: TensorSpec, values: Array, declared: Classification) -> NDArray[np.float32]:
    scores = spec.real(values).reshape(-1)
    if declared.sigmoid:
        return np.asarray(0.5 + 0.5 * np.tanh(scores / 2), np.float32)
    if not declared.softmax:
        return scores
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum(), np.float32)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """One member, whose header may not promise more than its bytes hold."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
        raise ValueError(f"{info.filename[:40]!r} is compressed or encrypted")
    stream = io.BytesIO(archive.read(info))
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"{info.filename[:40]!r} has npy version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    rest = stream.read()
    if fortran or dtype.hasobject or math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError(f"{info.filename[:40]!r} is not a plain array")
    return np.frombuffer(rest, dtype).reshape(shape)


def _compact(output: Array) -> Array:
    """float32 as float16 where its numbers fit; anything else as it is."""
    if output.dtype == np.float32 and np.isfinite(output).all() and np.abs(output).max(initial=0) <= _FLOAT16_MAX:
        return output.astype(np.float16)
    return output


def _row(items: Mapping[int, Array]) -> tuple[Array, ...]:
    if sorted(items) != list(range(len(items))):
        raise _bad("the golden file lacks an array in between")
    return tuple(items[j] for j in range(len(items)))


def _is_tolerance(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _bad(message: str) -> ModelError:
    return ModelError(Reason.GOLDEN_MISMATCH, message, hint="record the vectors again: edge-ota release")
