"""A user's script around Ultralytics: `predict` streams a clip through an exported model. Runs in that package's own
environment; with `export FILE` it makes the model that every peer is given: YOLO11n at 320 pixels, its published
architecture with untrained weights, since nothing here may depend on a download of weights."""

import json
import resource
import shutil
import sys
import time

from ultralytics import YOLO


def export(place: str) -> None:
    """Write the model as ONNX."""
    shutil.move(YOLO("yolo11n.yaml").export(format="onnx", imgsz=320, simplify=False), place)


def main(model_file: str, clip: str, seconds: float) -> None:
    """Answer frames for `seconds`."""
    model = YOLO(model_file, task="detect")
    frames = 0
    began = computed = 0.0
    while True:
        for _ in model.predict(source=clip, stream=True, imgsz=320, verbose=False, device="cpu"):
            if frames == 0:
                print("first", flush=True)
                began, computed = time.perf_counter(), time.process_time()
            frames += 1
            if time.perf_counter() - began > seconds:
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
                return


if __name__ == "__main__":
    if sys.argv[1] == "export":
        export(sys.argv[2])
    else:
        main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
