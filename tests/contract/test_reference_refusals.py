"""What the reference does not run it refuses by name, and no file makes its reader crash, hang or fill the memory."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import memfd
from agent.errors import ModelError, Reason
from agent.worker.delegates import Options, Session, referencenode
from agent.worker.delegates.reference import Reference
from agent.worker.delegates.referenceops import KERNELS
from agent.worker.delegates.tflitefile import read_graph
from tests.contract.flatbuffer import Field, Flatbuffer
from tests.contract.tflitewriter import Op, T, write

ROOT = Path(__file__).resolve().parents[2]
DIGITS = (ROOT / "models/digits/1.0.0/int8.tflite").read_bytes()
PARTS = (ROOT / "models/parts/1.0.0/int8.tflite").read_bytes()
SHARED = ROOT.parent / "shared" / "data"


def load(data: bytes) -> Session:
    fd = memfd.of_bytes("model", data)
    try:
        return Reference().load(fd, "tflite", Options())
    finally:
        os.close(fd)


def refusal(data: bytes) -> str:
    with pytest.raises(ModelError) as caught:
        load(data)
    assert caught.value.reason in (Reason.MODEL_UNLOADABLE, Reason.MODEL_SHAPE)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


def try_it(data: bytes) -> bool:
    """Load and run; True when it loaded."""
    try:
        session = load(data)
    except ModelError as e:
        refused = e.reason
    else:
        refused = None
    if refused:
        assert refused in (Reason.MODEL_UNLOADABLE, Reason.MODEL_SHAPE)
        return False
    outputs = session.run()
    assert [(o.shape, o.dtype.name) for o in outputs] == [(s.shape, s.dtype) for s in session.outputs]
    return True


# --- refused by name -------------------------------------------------------------------------------------------------


def written(name: str, kind: str = "", custom: str = "", **tensor: object) -> bytes:
    pair = [T("int8", (1, 4), [0.1]), T(**{"dtype": "int8", "shape": (1, 4), "scales": [0.1], **tensor})]  # type: ignore[arg-type]
    return write(pair, [Op(name, [0], [1], kind, custom=custom)], [0], [1])


@pytest.mark.parametrize("name", ["HARD_SWISH", "STABLEHLO_ADD", "WHILE", "UNIDIRECTIONAL_SEQUENCE_LSTM"])
def test_an_operator_that_it_lacks_is_named(name: str) -> None:
    assert refusal(written(name)) == f"the reference does not have the operator {name}"


def test_a_custom_operator_is_named_after_its_authors_word() -> None:
    assert refusal(written("CUSTOM", custom="Mine\n")) == "the reference does not have the operator CUSTOM 'Mine\\n'"


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        ({"dtype": "int16"}, "it mixes or has the dtypes int16, int8"),
        ({"shape": (1, 5)}, "its output would be [1, 4], the file says [1, 5]"),
        ({"scales": ()}, "has no scale, or several"),
        ({"scales": [float("nan")]}, "a scale that is no positive number"),
        ({"zero_point": 300}, "a zero point lies outside int8"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_it_cannot_compute_exactly_is_refused(tensor: dict[str, object], why: str) -> None:
    assert why in refusal(written("TANH", **tensor))


def test_the_published_model_with_invalid_quantization_is_refused(shared_data: Path) -> None:
    assert "scales along dimension 3" in refusal((shared_data / "tflite-micro" / "person_detect.tflite").read_bytes())


# --- hostile files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation may still be a valid model, of any size: what runs here runs for a moment."""
    monkeypatch.setattr(referencenode.Budget, "__init__", lambda self: self.__dict__.update(SMALL))


SMALL = {"work": 1 << 31, "tensor_bytes": 1 << 26}


def test_every_cut_of_a_file_is_refused() -> None:
    for length in [*range(1, 400), *range(400, len(DIGITS), 997)]:
        refusal(DIGITS[:length])


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("model", [DIGITS, PARTS], ids=["digits", "parts"])
def test_mutated_models_are_refused_or_run(model: bytes) -> None:
    """Damage where the structure lies (the graph is written behind the weights, and around the offsets)."""
    rng = np.random.default_rng(7)
    loaded = 0
    structure = structure_of(model)
    for _ in range(400 if model is DIGITS else 30):
        data = bytearray(model)
        for _ in range(int(rng.integers(1, 4))):
            at = int(structure[rng.integers(len(structure))])
            if rng.random() < 0.5:
                data[at] = rng.integers(256)
            else:
                value = [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0xFFFF, len(model), 64][rng.integers(8)]
                data[at & ~3 : (at & ~3) + 4] = struct.pack("<I", value)
        loaded += try_it(bytes(data[: len(model)]))
    assert loaded  # some damage is harmless, or these would be no mutations of a model


def structure_of(model: bytes) -> np.ndarray:
    """The bytes that are no constant's."""
    data = memoryview(model)
    whole = np.frombuffer(data, np.uint8)
    free = np.ones(len(model), bool)
    for tensor in read_graph(data).tensors:
        if tensor.data is not None and tensor.data.nbytes > 64:
            start = tensor.data.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
            free[start : start + tensor.data.nbytes] = False
    return np.flatnonzero(free)


@pytest.mark.usefixtures("small_limits")
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 1 << 20), st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_no_bytes_make_it_fail_otherwise(tail: bytes, at: int, words: list[int]) -> None:
    try_it(struct.pack("<I", 8) + b"TFL3" + tail)
    data = bytearray(DIGITS)
    at = at % (len(data) - 100) & ~3
    data[at : at + 4 * len(words)] = struct.pack(f"<{len(words)}I", *words)
    try_it(bytes(data))


def test_lists_that_share_one_long_list_cost_no_more_than_the_file() -> None:
    """16,000 operators that all name the same 100,000 inputs would be 1.6 thousand million numbers."""
    b = Flatbuffer()
    inputs = b.numbers("i", [0] * 100_000)
    ends: dict[int, Field] = {1: inputs, 2: inputs}
    graph = b.table({0: b.places([b.table({})]), 3: b.places([b.table(ends)] * 16_000)})
    model = b.table({1: b.places([b.table({})]), 2: b.places([graph]), 4: b.places([b.table({})])})
    data = b.file(model, b"TFL3")
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        assert "lists more than" in refusal(data)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((1, 1 << 29), "values"),
        ((1, 1 << 13, 1 << 13), "values"),
        ((1 << 29, 1 << 29, 1 << 29), "values"),
        ((-5, 4), "of the shape"),
        ((1,) * 9, "of the shape"),
        ((0, 4), "open shape"),
    ],
    ids=str,
)
def test_tensors_beyond_all_memory_are_refused_before_they_are_made(shape: tuple[int, ...], why: str) -> None:
    pair = [T("int8", shape, [0.1]), T("int8", shape, [0.1])]
    tracemalloc.start()
    try:
        assert why in refusal(write(pair, [Op("TANH", [0], [1])], [0], [1]))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("operator", ["CONV_2D", "AVERAGE_POOL_2D"])
def test_padding_beyond_all_memory_is_refused_when_it_is_loaded(operator: str) -> None:
    """One pixel, and around it as many zeros as a wide or dilated kernel reaches."""
    if operator == "CONV_2D":
        depth = 1 << 10
        far = {"strideW": 1, "strideH": 1, "dilationWFactor": 4000, "dilationHFactor": 4000}
        weights = [T("int8", (1, 2, 2, depth), [0.1], data=np.zeros(4 * depth))]
        last, op = (1, 1, 1, 1), Op(operator, [0, 2, -1], [1], "Conv2DOptions", far)
    else:
        depth, weights = 1 << 19, []
        wide = {"strideW": 1, "strideH": 1, "filterWidth": 63, "filterHeight": 63}
        last, op = (1, 1, 1, depth), Op(operator, [0], [1], "Pool2DOptions", wide)
    tensors = [T("int8", (1, 1, 1, depth), [0.1]), T("int8", last, [0.1]), *weights]
    assert "values with its padding" in refusal(write(tensors, [op], [0], [1]))


def test_a_graph_of_endless_work_is_refused() -> None:
    tensors = [T("int8", (1, 1 << 22), [0.1]) for _ in range(200)]
    ops = [Op("TANH", [i], [i + 1]) for i in range(199)]
    assert "takes more than" in refusal(write(tensors, ops, [0], [199]))


def test_the_page_lists_exactly_its_operators() -> None:
    text = (ROOT / "docs" / "reference" / "delegates.md").read_text().partition("Its operators:")[2]
    listed = text.strip().partition("\n\n")[0].rstrip(".").replace("\n", " ").split(", ")
    assert [word.strip() for word in listed] == list(KERNELS)
