"""A user's script around openvino-model-api: frames of a clip through its YOLO wrapper. Runs in that package's own
environment; prints `first` at the first answer and one JSON object at the end."""

import json
import resource
import sys
import time

import cv2
from model_api.models import Model


def main(model_file: str, clip: str, seconds: float) -> None:
    """Answer frames for `seconds`."""
    model = Model.create_model(model_file, model_type="YOLO11", preload=True, device="CPU")
    capture = cv2.VideoCapture(clip)
    frames = 0
    began = computed = 0.0
    while True:
        ok, frame = capture.read()
        if not ok:
            capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            continue
        model(frame)
        if frames == 0:
            print("first", flush=True)
            began, computed = time.perf_counter(), time.process_time()
        frames += 1
        if time.perf_counter() - began > seconds:
            break
    print(
        json.dumps(
            {
                "frames": frames - 1,
                "wall_s": time.perf_counter() - began,
                "cpu_s": time.process_time() - computed,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
