"""Hardware paths that run a graph: what each of them promises, and the table of those this program has.

Importing this loads no runtime and no numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from agent.worker.tensor import Array, TensorSpec


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

    def run(self) -> tuple[Array, ...]:
        """Run on what `tensors` hold; the outputs are valid until the next run."""


@dataclass(frozen=True)
class Options:
    """How a model is loaded. `bf16` allows the runtime to compute floats in bfloat16 where it is faster."""

    threads: int = 1
    bf16: bool = False


def parse_options(threads: int, options: Mapping[str, Any]) -> Options:
    """The options of a `LoadModel`; unknown keys are a newer daemon's and change nothing here."""
    return Options(threads, options.get("bf16") is True)


class Delegate(Protocol):
    """One way to run models of some formats. `runtime` names library and version."""

    name: str
    runtime: str
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


def _onnx_cpu() -> Delegate:
    from agent.worker.delegates.onnxruntime import OnnxRuntime

    return OnnxRuntime()


def _openvino_cpu() -> Delegate:
    from agent.worker.delegates.openvino import OpenVINO

    return OpenVINO()


DELEGATES: Mapping[str, DelegateLoader] = {
    "litert:xnnpack": _litert_xnnpack,
    "litert:cpu": _litert_cpu,
    "tflite:cpu": _tflite_cpu,
    "onnx:cpu": _onnx_cpu,
    "openvino:cpu": _openvino_cpu,
}
