"""ONNX Runtime with one of its providers: `onnx:cpu`, `onnx:cuda`, `onnx:tensorrt`, `onnx:openvino`, `onnx:qnn`.

On `onnx:cpu` no other provider is registered, so every node runs there: coverage is 1 by construction. With any other
one the CPU is forbidden, and where the nodes went is read from one profiled run.
Invariants: the model is opened through its memfd and may not name files beside it; no thread spins while idle; ONNX
Runtime never tries again with other providers by itself; floats stay float32 unless the release allows otherwise.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.errors import ModelError, Reason
from agent.worker.delegates import Options
from agent.worker.delegates.model import (
    check_sealed,
    device_missing,
    first_line,
    import_runtime,
    path_of,
    refused,
)
from agent.worker.delegates.onnxfile import refuse_external_data
from agent.worker.tensor import Array, TensorSpec, make_spec

CPU = "onnx:cpu"
MAX_PROFILE_BYTES = 256 << 20
# how ONNX Runtime begins its refusal of a graph that would need the CPU as well
_FELL_BACK = "nodes that are assigned to the default CPU EP"
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


@dataclass(frozen=True)
class Provider:
    """What ONNX Runtime calls an execution provider.

    `distribution` is the wheel that has it, and `brought_by` the same for people; `settings` its options; the first
    line of one of `driver_files` names the version of its driver.
    """

    name: str
    distribution: str
    brought_by: str
    settings: Callable[[Options], dict[str, str]]
    driver_files: tuple[str, ...] = ()


def _cuda(options: Options) -> dict[str, str]:
    # TensorFloat-32 keeps ten bits of a float's mantissa
    return {"use_tf32": "1" if options.bf16 else "0"}


def _tensorrt(options: Options) -> dict[str, str]:
    return {
        "trt_fp16_enable": "False",
        "trt_bf16_enable": "True" if options.bf16 else "False",
        # its cache would lie on the disk in clear
        "trt_engine_cache_enable": "False",
    }


def _openvino(options: Options) -> dict[str, str]:
    # the CPU by name: its GPU and NPU are `openvino:gpu` and `openvino:npu`
    return {
        "device_type": "CPU",
        "precision": "ACCURACY" if options.bf16 else "FP32",
        "num_of_threads": str(options.threads),
        "num_streams": "1",
    }


def _qnn(_: Options) -> dict[str, str]:
    return {"backend_path": "libQnnHtp.so"}


# the kernel module's, then JetPack's
_NVIDIA = ("/proc/driver/nvidia/version", "/etc/nv_tegra_release")
PROVIDERS: Mapping[str, Provider] = {
    CPU: Provider("CPUExecutionProvider", "onnxruntime", "the onnxruntime wheel", lambda _: {}),
    "onnx:cuda": Provider(
        "CUDAExecutionProvider",
        "onnxruntime-gpu",
        "the onnxruntime-gpu wheel and NVIDIA's CUDA and cuDNN, on Jetson both from NVIDIA's JetPack",
        _cuda,
        _NVIDIA,
    ),
    "onnx:tensorrt": Provider(
        "TensorrtExecutionProvider",
        "onnxruntime-gpu",
        "the onnxruntime-gpu wheel and NVIDIA's TensorRT, on Jetson both from NVIDIA's JetPack",
        _tensorrt,
        _NVIDIA,
    ),
    "onnx:openvino": Provider(
        "OpenVINOExecutionProvider", "onnxruntime-openvino", "Intel's onnxruntime-openvino wheel", _openvino
    ),
    "onnx:qnn": Provider("QNNExecutionProvider", "onnxruntime-qnn", "Qualcomm's onnxruntime-qnn wheel", _qnn),
}


class OnnxRuntime:
    """ONNX Runtime with one provider.

    Args:
        name: a key of `PROVIDERS`.

    Raises:
        ModelError: `runtime_missing`, also for a build without this provider.
    """

    formats = frozenset({"onnx"})

    def __init__(self, name: str) -> None:
        self.name = name
        self._provider = PROVIDERS[name]
        # Read while importing; the host sets it too, but not everybody who imports this is started by a host.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        self._ort = import_runtime("onnxruntime", "onnx")
        if self._provider.name not in self._ort.get_available_providers():
            raise device_missing(f"this onnxruntime has no {self._provider.name}", self._provider.brought_by)
        self.runtime = f"{self._provider.distribution} {self._ort.__version__}"
        self.driver = first_line(self._provider.driver_files)

    def load(self, fd: int, format: str, options: Options) -> OnnxSession:
        """See `Delegate.load`."""
        check_sealed(fd)
        refuse_external_data(fd)
        if self.name == CPU:
            return OnnxSession(self._open(fd, options), self._ort, self.name, self.runtime)
        # private to this process and gone with it; it names nodes, never weights
        with tempfile.TemporaryDirectory() as folder:
            prefix = os.path.join(folder, "run")
            session = OnnxSession(self._open(fd, options, prefix), self._ort, self.name, self.runtime)
            session.run()
            session.coverage = share(session.end_profiling(), self._provider.name)
        if session.coverage == 0:
            raise ModelError(
                Reason.DELEGATE_FELL_BACK, f"{self._provider.name} ran no node of this model", hint="use onnx:cpu"
            )
        return session

    def _open(self, fd: int, options: Options, profile: str = "") -> Any:
        ort, provider = self._ort, self._provider
        settings = ort.SessionOptions()
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile:
            # not with the CPU's own provider: it forbids that one too
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            settings.enable_profiling, settings.profile_file_prefix = True, profile
        try:
            session = ort.InferenceSession(
                path_of(fd), settings, [provider.name], [provider.settings(options)], enable_fallback=0
            )
        except Exception as e:  # ONNX Runtime's exceptions share no root but this one
            if _FELL_BACK in str(e):
                raise ModelError(
                    Reason.DELEGATE_FELL_BACK,
                    f"{provider.name} leaves some nodes of this model to the CPU",
                    hint="use onnx:cpu, or a model of operators that the provider has",
                ) from e
            raise refused(self.runtime, e) from e
        found = session.get_providers()
        if found[0] != provider.name:
            raise ModelError(
                Reason.DELEGATE_FELL_BACK,
                f"ONNX Runtime chose {', '.join(found)}: {provider.name} does not start here",
                hint=f"it comes with {provider.brought_by}",
            )
        return session


class OnnxSession:
    """A loaded ONNX Runtime session whose inputs and outputs are bound to fixed buffers.

    Raises:
        ModelError: `model_shape` for a tensor without a fixed shape.
    """

    compiled = None

    def __init__(self, session: Any, ort: Any, delegate: str, runtime: str) -> None:
        self.actual = delegate
        self.coverage = 1.0
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

    def end_profiling(self) -> str:
        """Stop recording; the path of what was recorded."""
        return str(self._session.end_profiling())


def share(path: str, provider: str) -> float:
    """Share of the graph's nodes that ran on `provider`, read from a profile; a node that it fused counts as one.

    Raises:
        ModelError: `model_unloadable` for a profile that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            events = json.loads(file.read(MAX_PROFILE_BYTES))
        where = {
            str(event["name"]): str(event["args"]["provider"])
            for event in events
            if event.get("cat") == "Node" and event.get("args", {}).get("provider")
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise ModelError(
            Reason.MODEL_UNLOADABLE, f"ONNX Runtime's profile cannot be read: {e}", hint="use onnx:cpu"
        ) from e
    return sum(name == provider for name in where.values()) / len(where) if where else 0.0


def _spec(arg: Any) -> TensorSpec:
    return make_spec(arg.name, _DTYPES.get(arg.type, arg.type), arg.shape)
