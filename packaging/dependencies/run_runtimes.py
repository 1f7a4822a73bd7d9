"""Run every installed runtime on real models in this one process and check what it answers.

Usage: run_runtimes.py DATA_FOLDER AD01_ONNX [RUNTIME ...]. RUNTIME (litert, tflite, onnx, openvino) must be present and
right; without any, whatever is installed is tried. Prints one line a runtime and exits 1 on the first wrong answer.
An installed package proves nothing: tflite-runtime 2.14 imports under NumPy 2 and fails when an interpreter is made.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path

import cv2
import numpy as np

# (no person, person) of vww_96_int8 for the two published pictures, by LiteRT 2.3; other kernels differ by a step
# or two.
EXPECTED = {"person.png": (-93, 93), "no_person.png": (57, -57)}
TOLERANCE_STEPS = 3
MODULES = {"litert": "ai_edge_litert", "tflite": "tflite_runtime", "onnx": "onnxruntime", "openvino": "openvino"}


def picture(data: Path, name: str) -> np.ndarray:
    """int8[1, 96, 96, 3]: the grey picture in three channels, zero point −128."""
    grey = cv2.imread(str(data / "tflite-micro" / name), cv2.IMREAD_GRAYSCALE)
    grey = cv2.resize(grey, (96, 96), interpolation=cv2.INTER_LINEAR)
    return (np.repeat(grey[None, :, :, None], 3, axis=3).astype(np.int16) - 128).astype(np.int8)


def check_vww(data: Path, infer) -> str:
    """Both pictures through `infer`; returns the answers. Raises AssertionError on a wrong one."""
    answers = {}
    for name, expected in EXPECTED.items():
        got = [int(v) for v in np.asarray(infer(picture(data, name))).reshape(-1)]
        off = max(abs(g - e) for g, e in zip(got, expected, strict=True))
        assert off <= TOLERANCE_STEPS, f"{name}: {got}, expected {expected}"
        answers[name] = got
    return f"vww_96_int8 {answers}"


def through_interpreter(data: Path, interpreter_class) -> str:
    interpreter = interpreter_class(str(data / "mlperf-tiny/vww_96_int8.tflite"), num_threads=1)
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def infer(tensor: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(source["index"], tensor)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return check_vww(data, infer)


def litert(data: Path, onnx_model: Path) -> str:
    from ai_edge_litert.interpreter import Interpreter

    return through_interpreter(data, Interpreter)


def tflite(data: Path, onnx_model: Path) -> str:
    from tflite_runtime.interpreter import Interpreter

    return through_interpreter(data, Interpreter)


def openvino(data: Path, onnx_model: Path) -> str:
    # A bare import sends a report home; without this module openvino uses a stub of its own.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino as ov

    core = ov.Core()
    model = core.read_model(data / "mlperf-tiny/vww_96_int8.tflite")
    # Without the hint, CPUs that have bfloat16 compute in it.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return check_vww(data, lambda tensor: compiled([tensor])[0])


def onnx(data: Path, onnx_model: Path) -> str:
    import onnxruntime as ort

    session = ort.InferenceSession(str(onnx_model), providers=["CPUExecutionProvider"])
    frame = np.random.default_rng(1).standard_normal((1, 640), dtype=np.float32)
    got = session.run(None, {"input": frame})[0]
    if importlib.util.find_spec("ai_edge_litert"):
        from ai_edge_litert.interpreter import Interpreter
    elif importlib.util.find_spec("tflite_runtime"):
        from tflite_runtime.interpreter import Interpreter
    else:
        assert np.isfinite(got).all()
        return "ad01 finite (no TFLite runtime to compare with)"
    oracle = Interpreter(str(data / "mlperf-tiny/ad01_fp32.tflite"), num_threads=1)
    oracle.allocate_tensors()
    oracle.set_tensor(oracle.get_input_details()[0]["index"], frame)
    oracle.invoke()
    off = float(np.abs(oracle.get_tensor(oracle.get_output_details()[0]["index"]) - got).max())
    assert off < 1e-4, f"ad01: {off} from the TFLite runtime's answer"
    return f"ad01 within {off:.1e} of the TFLite runtime"


RUNTIMES = {"litert": litert, "tflite": tflite, "onnx": onnx, "openvino": openvino}


def main(data: Path, onnx_model: Path, wanted: list[str]) -> int:
    versions = {
        name: importlib.metadata.version(name)
        for name in ("numpy", "opencv-python-headless", "paho-mqtt", "cryptography", "tuf")
    }
    print(f"python {platform.python_version()} {platform.machine()} {versions}")
    import paho.mqtt.client  # noqa: F401
    import tuf.ngclient  # noqa: F401
    from cryptography.hazmat.primitives import hpke  # noqa: F401

    failed = False
    for name in wanted or [n for n in RUNTIMES if importlib.util.find_spec(MODULES[n])]:
        try:
            print(f"ok   {name}: {RUNTIMES[name](data, onnx_model)}", flush=True)
        except (AssertionError, ImportError, RuntimeError, ValueError, AttributeError, SystemError) as e:
            failed = True
            print(f"FAIL {name}: {type(e).__name__}: {e}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
