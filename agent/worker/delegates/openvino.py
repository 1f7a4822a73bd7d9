"""OpenVINO: `openvino:cpu`, `openvino:gpu` and `openvino:npu`, for ONNX, TFLite and its own `*.ovir`.

Invariants: the device is named, never `AUTO`, and `EXECUTION_DEVICES` must agree; floats stay float32 unless the
release allows bfloat16 (by default it computes in bfloat16 where the CPU can, at a visible loss); no cache of its own
lies on the disk; its telemetry package is never imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.errors import ModelError, Reason
from agent.worker.delegates import Options, compiled, ovir
from agent.worker.delegates.model import (
    check_sealed,
    check_tflite,
    device_missing,
    import_runtime,
    path_of,
    refused,
    version_of,
)
from agent.worker.delegates.onnxfile import refuse_external_data
from agent.worker.tensor import Array, TensorSpec, make_spec

_ERRORS = (RuntimeError, ValueError, TypeError)
_DTYPES = {
    "i8": "int8",
    "u8": "uint8",
    "i16": "int16",
    "u16": "uint16",
    "i32": "int32",
    "u32": "uint32",
    "i64": "int64",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "boolean": "bool",
}


@dataclass(frozen=True)
class Device:
    """One of OpenVINO's devices. `f32` says that it can compute floats in full; `brought_by` what makes it appear."""

    name: str
    f32: bool
    brought_by: str


DEVICES: Mapping[str, Device] = {
    "openvino:cpu": Device("CPU", True, "the openvino wheel"),
    "openvino:gpu": Device("GPU", True, "Intel's OpenCL driver: the Debian package intel-opencl-icd"),
    # it has no float32 at all: what is lost is for the golden vectors to say
    "openvino:npu": Device("NPU", False, "Intel's NPU driver: intel-driver-compiler-npu and intel-level-zero-npu"),
}


class OpenVINO:
    """OpenVINO on one device.

    Args:
        name: a key of `DEVICES`.

    Raises:
        ModelError: `runtime_missing`, also for a device that OpenVINO does not find here.
    """

    formats = frozenset({"onnx", "tflite", "ovir"})

    def __init__(self, name: str) -> None:
        self.name = name
        self._device = DEVICES[name]
        # None makes the import fail; openvino then uses a stub of its own instead of calling home.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        self._ov = import_runtime("openvino", "openvino")
        self.runtime = f"openvino {version_of('openvino')}"
        self._core = self._ov.Core()
        try:
            found = [str(device) for device in self._core.available_devices]
            if not any(_is(device, self._device.name) for device in found):
                raise device_missing(
                    f"openvino has no {self._device.name} here, but {', '.join(found)}", self._device.brought_by
                )
            self.driver = self._describe_driver()
        except _ERRORS as e:
            raise device_missing(f"openvino {self._device.name}: {_first_line(e)}", self._device.brought_by) from e

    def load(self, fd: int, format: str, options: Options) -> OpenVINOSession:
        """See `Delegate.load`. What was compiled before is imported instead where it fits."""
        check_sealed(fd)
        bound = compiled.binding(self, options)
        session = self._import(bound, options)
        imported = session is not None
        if session is None:
            try:
                model, weights = self._read(fd, format)
                if model.is_dynamic():
                    model.reshape({port: _fixed(port) for port in model.inputs})
                found = self._core.compile_model(model, self._device.name, self._settings(options))
                self._check_device(found)
                session = OpenVINOSession(found, self.name, self.runtime, weights)
            except _ERRORS as e:
                raise refused(self.runtime, e, line=-1) from e
        if bound:
            session.compiled = _Compiled(session.model, session.lent, bound, self.runtime, imported)
        return session

    def _settings(self, options: Options) -> dict[str, Any]:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self._device.f32:
            settings["INFERENCE_PRECISION_HINT"] = "bf16" if options.bf16 and self._has_bf16() else "f32"
        if self._device.name == "CPU":
            settings |= {"INFERENCE_NUM_THREADS": options.threads, "NUM_STREAMS": 1}
        return settings

    def _has_bf16(self) -> bool:
        return "BF16" in self._core.get_property(self._device.name, "OPTIMIZATION_CAPABILITIES")

    def _describe_driver(self) -> str:
        """What OpenVINO itself names as deciding over the use of a cache: the device's name, its driver's version …"""
        device = self._device.name
        names = sorted(str(name) for name in self._core.get_property(device, "CACHING_PROPERTIES"))
        return " ".join(str(self._core.get_property(device, name)) for name in names)

    def _import(self, bound: bytes, options: Options) -> OpenVINOSession | None:
        """The model as it was exported before; None when that is for something else, or is refused."""
        blob = None if options.compiled is None else compiled.unwrap(options.compiled, bound)
        if blob is None:
            return None
        try:
            tensor = self._ov.Tensor(blob, shared_memory=True)
            found = self._core.import_model(tensor, self._device.name, self._settings(options))
            self._check_device(found)
            return OpenVINOSession(found, self.name, self.runtime, tensor)
        except _ERRORS:
            return None  # it is only a short cut

    def _check_device(self, found: Any) -> None:
        devices = [str(device) for device in found.get_property("EXECUTION_DEVICES")]
        if not devices or not all(_is(device, self._device.name) for device in devices):
            raise ModelError(
                Reason.DELEGATE_FELL_BACK,
                f"OpenVINO chose {', '.join(devices)}",
                hint=f"check its {self._device.name} plug-in",
            )

    def _read(self, fd: int, format: str) -> tuple[Any, Any]:
        """The model, and the memory that it uses and does not own."""
        if format == "ovir":
            xml, weights = ovir.split(fd)
            tensor = self._ov.Tensor(weights, shared_memory=True)
            return self._core.read_model(xml, tensor), tensor
        if format == "onnx":
            refuse_external_data(fd)
        else:
            check_tflite(fd)
        # A model is only recognised by the suffix of a path, and from a path it is read without a copy of the file.
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, f"m.{format}")
            os.symlink(path_of(fd), path)
            return self._core.read_model(path), None


class OpenVINOSession:
    """A compiled model with one inference request; its tensors are the request's own memory.

    Args:
        model: OpenVINO's compiled model.
        lent: memory that it goes on using and does not own, if any.

    Raises:
        ModelError: `model_shape` for a tensor without a fixed shape.
    """

    coverage = 1.0

    def __init__(self, model: Any, delegate: str, runtime: str, lent: Any) -> None:
        self.actual = delegate
        self.compiled: _Compiled | None = None
        self.model = model
        self._runtime = runtime
        self.inputs = tuple(_spec(port) for port in model.inputs)
        self.outputs = tuple(_spec(port) for port in model.outputs)
        self._request = model.create_infer_request()
        self.tensors: tuple[Array, ...] = tuple(
            self._request.get_input_tensor(index).data for index in range(len(self.inputs))
        )
        self._results: tuple[Array, ...] = tuple(
            self._request.get_output_tensor(index).data for index in range(len(self.outputs))
        )
        self.lent = lent  # the last to go

    def run(self) -> tuple[Array, ...]:
        """See `Session.run`."""
        try:
            self._request.infer()
        except RuntimeError as e:
            raise refused(self._runtime, e, line=-1) from e
        return self._results


@dataclass(frozen=True)
class _Compiled:
    """See `delegates.Compiled`. `lent` is memory that `model` reads and does not own."""

    model: Any
    lent: Any
    bound: bytes
    runtime: str
    imported: bool

    def export(self) -> int:
        """See `delegates.Compiled.export`."""
        if self.imported:  # OpenVINO would write something that it cannot read
            raise ModelError(Reason.MODEL_UNLOADABLE, "it was imported", hint="keep what it was imported from")
        try:
            return compiled.wrap(self.bound, self.model.export_model().getbuffer())
        except _ERRORS as e:
            raise refused(self.runtime, e, line=-1) from e


def _is(device: str, wanted: str) -> bool:
    """Whether a device is of the wanted kind: `GPU` and `GPU.0` are."""
    return device == wanted or device.startswith(f"{wanted}.")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _fixed(port: Any) -> list[int]:
    """The port's shape with an open batch as 1; another open dimension stays and is refused by `_spec`."""
    shape = [dimension.get_length() if dimension.is_static else -1 for dimension in port.get_partial_shape()]
    return [1 if index == 0 and size < 1 else size for index, size in enumerate(shape)]


def _spec(port: Any) -> TensorSpec:
    names = sorted(port.get_names())
    shape = [dimension.get_length() if dimension.is_static else -1 for dimension in port.get_partial_shape()]
    kind = port.get_element_type().get_type_name()
    return make_spec(names[0] if names else "", _DTYPES.get(kind, kind), shape)
