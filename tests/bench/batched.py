"""One measurement of `throughput`: a runtime, a batch size, so many threads and sessions, for so long.

Prints one JSON object: images answered, wall seconds, CPU seconds. A process of its own, because no runtime gives back
what it took, and each would find the caches of the one before it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402

WARM_UPS = 3


def litert(model: str, batch: int, threads: int) -> Callable[[], object]:
    """A run of a .tflite model."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=model, num_threads=threads)
    given = interpreter.get_input_details()[0]
    interpreter.resize_tensor_input(given["index"], [batch, *given["shape"][1:]])
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], np.zeros([batch, *given["shape"][1:]], given["dtype"]))
    return interpreter.invoke


def onnx(model: str, batch: int, threads: int) -> Callable[[], object]:
    """A run of an .onnx model with an open batch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    fed = {given.name: np.zeros([batch, *given.shape[1:]], np.float32)}
    return lambda: session.run(None, fed)


def openvino(model: str, batch: int, threads: int) -> Callable[[], object]:
    """The same in OpenVINO."""
    import openvino as ov

    core = ov.Core()
    network = core.read_model(model)
    shape = [batch, *(d.get_length() for d in list(network.inputs[0].get_partial_shape())[1:])]
    network.reshape(shape)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    request.get_input_tensor(0).data[...] = 0
    return request.infer


RUNTIMES = {"litert": litert, "onnx": onnx, "openvino": openvino}


def main(runtime: str, model: str, batch: int, threads: int, sessions: int, seconds: float) -> None:
    """Run `sessions` sessions side by side, each in a thread of its own."""
    runs = [RUNTIMES[runtime](model, batch, threads) for _ in range(sessions)]
    for run in runs * WARM_UPS:
        run()
    counts = [0] * sessions
    began, computed = time.perf_counter(), time.process_time()
    end = began + seconds

    def work(index: int) -> None:
        while time.perf_counter() < end:
            runs[index]()
            counts[index] += batch

    workers = [threading.Thread(target=work, args=(index,)) for index in range(sessions)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wall, cpu = time.perf_counter() - began, time.process_time() - computed
    print(json.dumps({"images": sum(counts), "wall_s": wall, "cpu_s": cpu}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
