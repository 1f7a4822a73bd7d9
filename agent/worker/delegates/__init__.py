"""Hardware paths that run a graph: what each of them promises, and the table of those this program has.

Importing this loads no runtime and no numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from agent.worker.tensor import Array, TensorSpec


class Compiled(Protocol):
    """What a runtime made of a model, where that can be kept."""

    @property
    def imported(self) -> bool:
        """Whether it came from an earlier export and was not made here."""
        ...

    def export(self) -> int:
        """A new sealed memfd for `Options.compiled`; the caller closes it.

        Raises:
            ModelError: `model_unloadable`: the runtime cannot give it, or it was itself imported.
        """


class Session(Protocol):
    """A model that is loaded and can run.

    `inputs` and `outputs` are the model's own, in its order. `tensors` are the input buffers, one per input, each
    C-contiguous, filled by the caller in place. `actual` is the delegate that really runs the graph and `coverage` its
    share of the graph's nodes, 0 to 1.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tensors: tuple[Array, ...]
    actual: str
    coverage: float

    @property
    def compiled(self) -> Compiled | None:
        """None where loading makes nothing that could be kept."""
        ...

    def run(self) -> tuple[Array, ...]:
        """Run on what `tensors` hold; the outputs are valid until the next run."""


@dataclass(frozen=True)
class Options:
    """How a model is loaded.

    `bf16` allows the runtime to compute floats in bfloat16 where it is faster. `model` is the SHA-256 of the model, as
    whoever hands it out checked it; without one nothing can be exported or imported. `compiled` is a sealed memfd that
    `Compiled.export` gave before; one of another runtime, driver, model, delegate or other options is not used.
    """

    threads: int = 1
    bf16: bool = False
    model: str = ""
    compiled: int | None = None


def parse_options(threads: int, options: Mapping[str, Any], compiled: int | None = None) -> Options:
    """The options of a `LoadModel`; unknown keys are a newer daemon's and change nothing here."""
    model = options.get("model")
    return Options(threads, options.get("bf16") is True, model if isinstance(model, str) else "", compiled)


class Delegate(Protocol):
    """One way to run models of some formats. `runtime` names library and version, `driver` what lies below it and
    decides how fast and how exactly it computes; empty where nothing does."""

    name: str
    runtime: str
    driver: str
    formats: frozenset[str]

    def load(self, fd: int, format: str, options: Options) -> Session:
        """Load the model in the sealed memfd `fd`, strictly: on this delegate or not at all.

        Raises:
            ModelError: `model_unloadable` with the runtime's own first line, `delegate_fell_back`, `model_shape`.
        """


DelegateLoader = Callable[[], Delegate]
"""Imports the runtime and returns the delegate. Raises `ModelError` with `runtime_missing`."""


def _litert_xnnpack() -> Delegate:
    from agent.worker.delegates.litert import LiteRT

    return LiteRT("litert:xnnpack")


def _litert_cpu() -> Delegate:
    from agent.worker.delegates.litert import LiteRT

    return LiteRT("litert:cpu")


def _tflite_cpu() -> Delegate:
    from agent.worker.delegates.tflite import TFLiteRuntime

    return TFLiteRuntime()


def _external(name: str) -> DelegateLoader:
    def load() -> Delegate:
        from agent.worker.delegates.external import LIBRARIES, ExternalDelegate

        return ExternalDelegate(name, LIBRARIES[name])

    return load


def _onnx(name: str) -> DelegateLoader:
    def load() -> Delegate:
        from agent.worker.delegates.onnxruntime import OnnxRuntime

        return OnnxRuntime(name)

    return load


def _openvino(name: str) -> DelegateLoader:
    def load() -> Delegate:
        from agent.worker.delegates.openvino import OpenVINO

        return OpenVINO(name)

    return load


def _reference() -> Delegate:
    from agent.worker.delegates.reference import Reference

    return Reference()


DELEGATES: Mapping[str, DelegateLoader] = {
    "litert:xnnpack": _litert_xnnpack,
    "litert:cpu": _litert_cpu,
    "litert:edgetpu": _external("litert:edgetpu"),
    "litert:ethosu": _external("litert:ethosu"),
    "litert:vx": _external("litert:vx"),
    "tflite:cpu": _tflite_cpu,
    "onnx:cpu": _onnx("onnx:cpu"),
    "onnx:cuda": _onnx("onnx:cuda"),
    "onnx:tensorrt": _onnx("onnx:tensorrt"),
    "onnx:openvino": _onnx("onnx:openvino"),
    "onnx:qnn": _onnx("onnx:qnn"),
    "openvino:cpu": _openvino("openvino:cpu"),
    "openvino:gpu": _openvino("openvino:gpu"),
    "openvino:npu": _openvino("openvino:npu"),
    "reference": _reference,
}

_FORMATS_OF = {"litert": ("tflite",), "tflite": ("tflite",), "reference": ("tflite",), "onnx": ("onnx",)}
FORMATS: Mapping[str, tuple[str, ...]] = {
    name: _FORMATS_OF.get(name.partition(":")[0], ("onnx", "ovir", "tflite")) for name in DELEGATES
}
"""Model formats of every delegate, of those too whose runtime is not here."""
