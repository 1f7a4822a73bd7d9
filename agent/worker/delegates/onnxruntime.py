"""ONNX Runtime: `onnx:cpu`.

The CPU provider is the only one registered, so every node runs on it: coverage is 1 by construction.
Invariants: the model is opened through its memfd and may not name files beside it; no thread spins while idle.
"""

from __future__ import annotations

import os
from typing import Any

from agent.errors import ModelError, Reason
from agent.worker.delegates import Options
from agent.worker.delegates.model import check_sealed, import_runtime, path_of, refused, version_of
from agent.worker.delegates.onnxfile import refuse_external_data
from agent.worker.tensor import Array, TensorSpec, make_spec

PROVIDER = "CPUExecutionProvider"
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(uint32)": "uint32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntime:
    """ONNX Runtime on the CPU.

    Raises:
        ModelError: `runtime_missing`.
    """

    name = "onnx:cpu"
    formats = frozenset({"onnx"})

    def __init__(self) -> None:
        # Read while importing; the host sets it too, but not everybody who imports this is started by a host.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        self._ort = import_runtime("onnxruntime", "onnx")
        self.runtime = f"onnxruntime {version_of('onnxruntime')}"

    def load(self, fd: int, format: str, options: Options) -> OnnxSession:
        """See `Delegate.load`."""
        check_sealed(fd)
        refuse_external_data(fd)
        ort = self._ort
        settings = ort.SessionOptions()
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            # Not `session.disable_cpu_ep_fallback`: it forbids the CPU provider itself.
            session = ort.InferenceSession(path_of(fd), settings, providers=[PROVIDER])
        except Exception as e:  # ONNX Runtime's exceptions share no root but this one
            raise refused(self.runtime, e) from e
        if session.get_providers() != [PROVIDER]:
            raise ModelError(
                Reason.DELEGATE_FELL_BACK,
                f"ONNX Runtime chose {', '.join(session.get_providers())}",
                hint=f"install a build that has {PROVIDER}",
            )
        return OnnxSession(session, ort, self.runtime)


class OnnxSession:
    """A loaded ONNX Runtime session whose inputs and outputs are bound to fixed buffers.

    Raises:
        ModelError: `model_shape` for a tensor without a fixed shape.
    """

    actual = OnnxRuntime.name
    coverage = 1.0

    def __init__(self, session: Any, ort: Any, runtime: str) -> None:
        self._session = session
        self._runtime = runtime
        self.inputs = tuple(_spec(arg) for arg in session.get_inputs())
        self.outputs = tuple(_spec(arg) for arg in session.get_outputs())
        self.tensors = tuple(spec.empty() for spec in self.inputs)
        self._results = tuple(spec.empty() for spec in self.outputs)
        self._binding = session.io_binding()
        for spec, tensor in zip(self.inputs, self.tensors, strict=True):
            self._binding.bind_input(spec.name, "cpu", 0, tensor.dtype, list(spec.shape), tensor.ctypes.data)
        for spec, tensor in zip(self.outputs, self._results, strict=True):
            self._binding.bind_output(spec.name, "cpu", 0, tensor.dtype, list(spec.shape), tensor.ctypes.data)

    def run(self) -> tuple[Array, ...]:
        """See `Session.run`."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as e:  # as above
            raise refused(self._runtime, e) from e
        return self._results


def _spec(arg: Any) -> TensorSpec:
    return make_spec(arg.name, _DTYPES.get(arg.type, arg.type), arg.shape)
