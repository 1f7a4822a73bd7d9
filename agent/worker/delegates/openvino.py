"""OpenVINO: `openvino:cpu`, for ONNX and TFLite.

Invariants: the device is named, never `AUTO`, and `EXECUTION_DEVICES` must agree; floats stay float32 (by default it
computes in bfloat16 where the CPU can, at a visible loss); its telemetry package is never imported.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from typing import Any

from agent.errors import ModelError, Reason
from agent.worker.delegates import Options
from agent.worker.delegates.model import check_sealed, check_tflite, import_runtime, path_of, refused, version_of
from agent.worker.delegates.onnxfile import refuse_external_data
from agent.worker.tensor import Array, TensorSpec, make_spec

DEVICE = "CPU"
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


class OpenVINO:
    """OpenVINO on the CPU.

    Raises:
        ModelError: `runtime_missing`.
    """

    name = "openvino:cpu"
    formats = frozenset({"onnx", "tflite"})

    def __init__(self) -> None:
        # None makes the import fail; openvino then uses a stub of its own instead of calling home.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        self._ov = import_runtime("openvino", "openvino")
        self.runtime = f"openvino {version_of('openvino')}"
        self._core = self._ov.Core()

    def load(self, fd: int, format: str, options: Options) -> OpenVINOSession:
        """See `Delegate.load`."""
        check_sealed(fd)
        try:
            model = self._read(fd, format)
            if model.is_dynamic():
                model.reshape({port: _fixed(port) for port in model.inputs})
            compiled = self._core.compile_model(
                model,
                DEVICE,
                {
                    "INFERENCE_PRECISION_HINT": "bf16" if options.bf16 else "f32",
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": options.threads,
                    "NUM_STREAMS": 1,
                },
            )
            devices = [str(device) for device in compiled.get_property("EXECUTION_DEVICES")]
        except (RuntimeError, ValueError, TypeError) as e:
            raise refused(self.runtime, e, line=-1) from e
        if devices != [DEVICE]:
            raise ModelError(
                Reason.DELEGATE_FELL_BACK, f"OpenVINO chose {', '.join(devices)}", hint=f"check its {DEVICE} plug-in"
            )
        return OpenVINOSession(compiled, self.runtime)

    def _read(self, fd: int, format: str) -> Any:
        if format == "onnx":
            refuse_external_data(fd)
            with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as data:
                return self._core.read_model(data.read())
        # A TFLite model is only recognised by the suffix of a path; anything else there would be read as what it is.
        check_tflite(fd)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "m.tflite")
            os.symlink(path_of(fd), path)
            return self._core.read_model(path)


class OpenVINOSession:
    """A compiled model with one inference request; its tensors are the request's own memory.

    Raises:
        ModelError: `model_shape` for a tensor without a fixed shape.
    """

    actual = OpenVINO.name
    coverage = 1.0

    def __init__(self, compiled: Any, runtime: str) -> None:
        self._runtime = runtime
        self.inputs = tuple(_spec(port) for port in compiled.inputs)
        self.outputs = tuple(_spec(port) for port in compiled.outputs)
        self._request = compiled.create_infer_request()
        self.tensors: tuple[Array, ...] = tuple(
            self._request.get_input_tensor(index).data for index in range(len(self.inputs))
        )
        self._results: tuple[Array, ...] = tuple(
            self._request.get_output_tensor(index).data for index in range(len(self.outputs))
        )

    def run(self) -> tuple[Array, ...]:
        """See `Session.run`."""
        try:
            self._request.infer()
        except RuntimeError as e:
            raise refused(self._runtime, e, line=-1) from e
        return self._results


def _fixed(port: Any) -> list[int]:
    """The port's shape with an open batch as 1; another open dimension stays and is refused by `_spec`."""
    shape = [dimension.get_length() if dimension.is_static else -1 for dimension in port.get_partial_shape()]
    return [1 if index == 0 and size < 1 else size for index, size in enumerate(shape)]


def _spec(port: Any) -> TensorSpec:
    names = sorted(port.get_names())
    shape = [dimension.get_length() if dimension.is_static else -1 for dimension in port.get_partial_shape()]
    kind = port.get_element_type().get_type_name()
    return make_spec(names[0] if names else "", _DTYPES.get(kind, kind), shape)
