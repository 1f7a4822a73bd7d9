"""A user's script around Roboflow inference: its `InferencePipeline` reads the clip and calls the model.

Its own model classes want an account; its documented way around that is custom logic, so the pipeline is theirs and
the call into ONNX Runtime, resize before it included, is ours, without any postprocessing. Runs in that package's own
environment; prints `first` at the first answer and one JSON object at the end."""

import json
import resource
import sys
import time

import cv2
import numpy as np
import onnxruntime
from inference import InferencePipeline


def main(model_file: str, clip: str, seconds: float) -> None:
    """Answer frames for `seconds`."""
    session = onnxruntime.InferenceSession(model_file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    state = {"frames": 0, "began": 0.0, "computed": 0.0, "wall_s": 0.0, "cpu_s": 0.0}

    def infer(video_frames: list) -> list:
        answers = []
        for video_frame in video_frames:
            small = cv2.resize(video_frame.image, (320, 320))
            fed = np.ascontiguousarray(small[:, :, ::-1].transpose(2, 0, 1)[None], np.float32) / 255
            answers.append(session.run(None, {name: fed}))
        return answers

    def answered(predictions: object, video_frame: object) -> None:
        if state["frames"] == 0:
            print("first", flush=True)
            state["began"], state["computed"] = time.perf_counter(), time.process_time()
        state["frames"] += 1
        if time.perf_counter() - state["began"] > seconds and not state["wall_s"]:
            state["wall_s"] = time.perf_counter() - state["began"]
            state["cpu_s"] = time.process_time() - state["computed"]
            state["counted"] = state["frames"] - 1
            pipeline.terminate()

    # the clip is shorter than the measurement: read from a list of its copies, one after the other
    pipeline = None
    while not state["wall_s"]:
        pipeline = InferencePipeline.init_with_custom_logic(
            video_reference=clip, on_video_frame=infer, on_prediction=answered
        )
        pipeline.start()
        pipeline.join()
    print(
        json.dumps(
            {
                "frames": state["counted"],
                "wall_s": state["wall_s"],
                "cpu_s": state["cpu_s"],
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
