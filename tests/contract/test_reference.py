"""The reference interpreter is bit for bit what TFLite's portable kernels are, and the oracle of other delegates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import memfd
from agent.errors import ModelError
from agent.profile import DELEGATES as PROFILE_DELEGATES
from agent.worker.delegates import DELEGATES, Options, Session
from agent.worker.delegates.reference import Reference
from agent.worker.images import decode_image
from tests.contract.operators import OPERATORS

try:
    from ai_edge_litert import interpreter
except ImportError:
    interpreter = None
with_portable_kernels = pytest.mark.skipif(
    interpreter is None, reason="LiteRT is not installed, whose kernels are asked"
)

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
SHIPPED = sorted((ROOT / "models").glob("*/*/*.tflite"))
PUBLISHED = [
    SHARED / "mlperf-tiny" / "vww_96_int8.tflite",
    SHARED / "mlperf-tiny" / "pretrainedResnet_quant.tflite",
    SHARED / "mlperf-tiny" / "ad01_int8.tflite",
    SHARED / "tflite-micro" / "person_detect_fixed.tflite",
    SHARED / "tflite-micro" / "mobilenet_v2_quantized_1x3x224x224.tflite",
]
FLOATS = ("vww_96_float.tflite", "pretrainedResnet.tflite", "ad01_fp32.tflite")


def load(data: bytes, delegate: Any = None) -> Session:
    fd = memfd.of_bytes("model", data)
    try:
        return (delegate or Reference()).load(fd, "tflite", Options())
    finally:
        os.close(fd)


class Portable:
    """LiteRT with its portable kernels: the arithmetic that the quantization specification is written in."""

    def __init__(self, data: bytes) -> None:
        kinds = interpreter.OpResolverType
        self._it = interpreter.Interpreter(model_content=data, experimental_op_resolver_type=kinds.BUILTIN_REF)
        self._it.allocate_tensors()

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        for detail, values in zip(self._it.get_input_details(), inputs, strict=True):
            self._it.set_tensor(detail["index"], values)
        self._it.invoke()
        return [self._it.get_tensor(detail["index"]) for detail in self._it.get_output_details()]


def drawn(session: Session, rng: np.random.Generator) -> list[np.ndarray]:
    """One input of uniform numbers, or of such that lie around the middle."""
    found = []
    for spec in session.inputs:
        if spec.dtype == "float32":
            found.append(rng.normal(0, 2, spec.shape).astype(np.float32))
            continue
        limits = np.iinfo(spec.dtype)
        values = rng.integers(limits.min, limits.max + 1, spec.shape)
        if rng.random() < 0.3:
            values = np.clip(rng.normal(-20, 40, spec.shape), limits.min, limits.max)
        found.append(values.astype(spec.dtype))
    return found


def answers(session: Session, inputs: list[np.ndarray]) -> list[np.ndarray]:
    for tensor, values in zip(session.tensors, inputs, strict=True):
        tensor[...] = values
    return [output.copy() for output in session.run()]


def assert_exact(data: bytes, *, seed: int = 0, rounds: int = 3) -> None:
    session, portable, rng = load(data), Portable(data), np.random.default_rng(seed)
    for _ in range(rounds):
        inputs = drawn(session, rng)
        for got, want in zip(answers(session, inputs), portable.run(inputs), strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            if got.dtype == np.float32:
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(got, want)


# --- whole models ----------------------------------------------------------------------------------------------------


def test_every_shipped_tflite_model_is_among_them() -> None:
    assert {path.parent.parent.name for path in SHIPPED} >= {"digits", "parts"}


@with_portable_kernels
@pytest.mark.parametrize("path", [*SHIPPED, *PUBLISHED], ids=lambda path: "-".join(path.parts[-3:]))
def test_a_quantized_model_answers_bit_for_bit_like_the_portable_kernels(path: Path) -> None:
    if not path.exists():
        pytest.skip("../shared/data is not here")
    assert_exact(path.read_bytes(), rounds=1 if path.stat().st_size > 1 << 20 else 3)


@with_portable_kernels
@pytest.mark.parametrize("name", FLOATS)
def test_a_float_model_answers_like_the_portable_kernels_but_for_their_rounding(name: str, shared_data: Path) -> None:
    assert_exact((shared_data / "mlperf-tiny" / name).read_bytes())


def test_the_published_pictures_are_answered_as_their_card_says(shared_data: Path) -> None:
    session = load((shared_data / "tflite-micro" / "person_detect_fixed.tflite").read_bytes())
    for name, want in (("person", (-113, 113)), ("no_person", (77, -77))):
        frame = decode_image((shared_data / "tflite-micro" / f"{name}.png").read_bytes())
        pixels = (frame[..., :1].astype(np.int16) - 128).astype(np.int8)
        assert tuple(answers(session, [pixels[None]])[0].reshape(-1)) == want


# --- one operator at a time ------------------------------------------------------------------------------------------


@with_portable_kernels
@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("family", OPERATORS, ids=lambda family: family.__name__)
def test_an_operator_answers_like_the_portable_kernel(family: Any, dtype: str) -> None:
    count = 0
    for seed in range(3):
        for data in family(np.random.default_rng(seed), dtype):
            assert_exact(data, seed=seed, rounds=2)
            count += 1
    assert count >= 3


# --- the oracle of the others ----------------------------------------------------------------------------------------

# Steps of 1/256 (or of the output's scale) by which another delegate may differ on real inputs, one more than was
# measured on x86-64: their kernels round elsewhere, and XNNPACK and OpenVINO compute what the models' softmax or
# logistic makes of a step.
STEPS = {
    "digits/1.0.0/int8.tflite": 2,
    "digits/1.1.0/int8.tflite": 2,
    "parts/1.0.0/int8.tflite": 8,
    "parts/1.1.0/int8.tflite": 8,
    "vibration/1.0.0/int8.tflite": 2,
    "vibration/1.1.0/int8.tflite": 2,
    "mlperf-tiny/vww_96_int8.tflite": 3,
    "mlperf-tiny/ad01_int8.tflite": 3,
    "tflite-micro/person_detect_fixed.tflite": 1,
}


def real_inputs(name: str) -> list[np.ndarray]:
    """What the model was made for, as int8 steps."""
    line = name.split("/")[0]
    if line in ("digits", "parts"):
        folder = ROOT / "models" / line / "golden"
        frames = [decode_image(path.read_bytes()) for path in sorted(folder.iterdir())]
    elif line == "vibration" or "ad01" in name:  # a spectrum: neighbouring bands are alike
        rng, size = np.random.default_rng(1), 195 if line == "vibration" else 640
        return [np.clip(np.cumsum(rng.normal(0, 6, size)) + 80, -128, 127).astype(np.int8) for _ in range(5)]
    else:
        frames = [decode_image((SHARED / "tflite-micro" / f"{n}.png").read_bytes()) for n in ("person", "no_person")]
    channels = 1 if line == "digits" or "person" in name else 3
    return [(np.repeat(f, 3, 2)[..., :channels] if f.shape[2] == 1 else f[..., :channels]) ^ 128 for f in frames]


def others() -> list[str]:
    found = []
    for name, make in DELEGATES.items():
        try:
            found += [name] if name != "reference" and "tflite" in make().formats else []
        except ModelError:
            pass  # not installed here
    return found


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("delegate", others())
def test_another_delegate_stays_within_few_steps_of_the_reference(delegate: str, name: str) -> None:
    path = (ROOT / "models" if name.startswith(("digits", "parts", "vibration")) else SHARED) / name
    if not path.exists():
        pytest.skip("../shared/data is not here")
    reference, other = load(path.read_bytes()), load(path.read_bytes(), DELEGATES[delegate]())
    for steps in real_inputs(name):
        values = [steps.view(np.int8).reshape(reference.tensors[0].shape)]
        for got, want in zip(answers(other, values), answers(reference, values), strict=True):
            assert np.abs(got.astype(int) - want.astype(int)).max() <= STEPS[name]


def test_it_is_no_profiles_choice_and_can_be_named() -> None:
    assert PROFILE_DELEGATES["reference"] == ("tflite",)
    for path in (ROOT / "device-profiles").glob("*.toml"):
        assert "reference" not in path.read_text().replace("docs/reference", "")
    assert DELEGATES["reference"]().name == "reference"
