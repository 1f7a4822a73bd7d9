"""The bare loop that the pipeline is compared with: one process, one thread, OpenCV and LiteRT, nothing else.

It makes the calls that any hand-written script would make, in the order of the shipped models, paced like a camera or
as fast as it can. Prints one JSON object: frames, seconds, CPU seconds, p50 and p99 of tick to result in milliseconds,
resident memory in MB.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter

KERNEL = np.ones((3, 3), np.uint8)
STRIDE = 8.0
THRESHOLD = 0.35


def main(clip: str, model: str, fps: float, seconds: float) -> None:
    """Run for `seconds`, at `fps` or unpaced for 0, and print the figures."""
    cv2.setNumThreads(1)
    interpreter = Interpreter(model_path=model, num_threads=1)
    interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]
    height, width = (int(n) for n in given["shape"][1:3])
    capture = cv2.VideoCapture(clip)
    fed = np.empty((1, height, width, 3), np.int8)
    small = np.empty((height, width, 3), np.uint8)
    read = _reader(interpreter, width)
    latencies: list[float] = []
    frame = None
    interpreter.invoke()
    cpu_start = time.process_time()
    tick = began = time.monotonic()
    end = tick + seconds
    while tick < end:
        ok, frame = capture.read(frame)
        if not ok:
            capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            continue
        cv2.resize(frame, (width, height), dst=small, interpolation=cv2.INTER_LINEAR)
        cv2.cvtColor(small, cv2.COLOR_BGR2RGB, dst=small)
        np.bitwise_xor(small, 0x80, out=fed.view(np.uint8)[0])
        interpreter.set_tensor(given["index"], fed)
        interpreter.invoke()
        read(frame.shape[1])
        now = time.monotonic()
        latencies.append(now - tick)
        if fps:
            tick += 1 / fps
            time.sleep(max(0.0, tick - time.monotonic()))
        else:
            tick = now
    cpu_s, took = time.process_time() - cpu_start, time.monotonic() - began
    latencies.sort()
    figures = {
        "frames": len(latencies),
        "seconds": took,
        "cpu_s": cpu_s,
        "p50_ms": 1000 * latencies[len(latencies) // 2],
        "p99_ms": 1000 * latencies[int(len(latencies) * 0.99)],
        "rss_mb": _rss_mb(),
    }
    print(json.dumps(figures))


def _rss_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _reader(interpreter: Any, width: int) -> Callable[[int], object]:
    """Reads the outputs of a frame so many pixels wide: boxes of a detector, else the best class."""
    outputs = interpreter.get_output_details()
    if len(outputs) == 1:
        (only,) = outputs
        scale, zero = only["quantization"]

        def classify(_: int) -> tuple[int, float]:
            scores = (interpreter.get_tensor(only["index"])[0].astype(np.float32) - zero) * scale
            best = int(scores.argmax())
            return best, float(scores[best])

        return classify
    heat_out = next(o for o in outputs if o["shape"][-1] == 3)
    box_out = next(o for o in outputs if o["shape"][-1] == 4)

    def detect(source_width: int) -> list[tuple[int, float, np.ndarray]]:
        heat = interpreter.get_tensor(heat_out["index"])[0]
        box = interpreter.get_tensor(box_out["index"])[0]
        return decode(heat, heat_out["quantization"], box, box_out["quantization"], source_width / width)

    return detect


def decode(
    heat: np.ndarray, heat_scale: tuple[float, int], box: np.ndarray, box_scale: tuple[float, int], zoom: float
) -> list[tuple[int, float, np.ndarray]]:
    """Peaks of the heat map as boxes in source pixels, without those that overlap a better one of their class."""
    limit = round(THRESHOLD / heat_scale[0] + heat_scale[1])
    shifted = (heat.view(np.uint8) ^ 0x80) if heat.dtype == np.int8 else heat
    peaks = (shifted == cv2.dilate(shifted, KERNEL)) & (heat >= limit)
    ys, xs, classes = np.nonzero(peaks)
    if len(ys) == 0:
        return []
    scores = (heat[ys, xs, classes].astype(np.float32) - heat_scale[1]) * heat_scale[0]
    d = (box[ys, xs].astype(np.float32) - box_scale[1]) * box_scale[0]
    centre_x, centre_y = (xs + d[:, 0]) * STRIDE * zoom, (ys + d[:, 1]) * STRIDE * zoom
    w, h = d[:, 2] * STRIDE * zoom, d[:, 3] * STRIDE * zoom
    boxes = np.stack([centre_x - w / 2, centre_y - h / 2, w, h], axis=1)
    kept = cv2.dnn.NMSBoxesBatched(boxes.tolist(), scores.tolist(), classes.tolist(), THRESHOLD, 0.5)
    return [(int(classes[i]), float(scores[i]), boxes[i]) for i in kept]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
