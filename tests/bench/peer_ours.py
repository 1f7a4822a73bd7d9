"""This project's own run for the comparison with its peers: a source process and a model worker as on a device, the
clip as fast as the model takes it. Prints `first` at the first result and one JSON object at the end."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from agent import memfd, protocol  # noqa: E402
from agent.daemon.sources import SourceRuntime  # noqa: E402
from agent.daemon.supervisor import Supervisor, default_host_command  # noqa: E402
from agent.sourceconfig import SourceConfig  # noqa: E402
from tests.bench.memory import family, pss_mb  # noqa: E402
from tests.bench.pipeline import cpu_s  # noqa: E402

LOAD_TIMEOUT_S = 60.0
GRAPH = {
    "task": "detection",
    "labels": [str(number) for number in range(80)],
    "preprocess": {"resize": "letterbox", "color": "rgb", "mean": [0.0], "std": [255.0]},
    "postprocess": {"kind": "yolov8", "threshold": 0.25, "nms_iou": 0.7, "max_detections": 100},
}


async def main(model: Path, clip: str, seconds: float, delegate: str, threads: int) -> None:
    """Answer frames for `seconds`."""
    supervisor = Supervisor(listen=None, host_command=default_host_command(), on_lost=lambda: None)
    await supervisor.start()
    options = {"path": clip, "policy": "every", "loop": True, "queue_frames": 4, "fps": 0.0}
    source = SourceRuntime(
        SourceConfig("clip", "video", options), supervisor,
        on_dropped=lambda *_: None, on_restarted=lambda _: None, on_state=lambda _: None,
    )  # fmt: skip
    source.start()
    worker = await supervisor.spawn("model")
    count, first = 0, asyncio.Event()

    def said(packet: protocol.Packet) -> None:
        nonlocal count
        packet.close()
        if isinstance(packet.message, protocol.Result):
            count += 1
            first.set()

    worker.on_message = said
    fd = memfd.of_bytes("model", model.read_bytes())
    message = protocol.LoadModel("peer", "1.0.0", "model", "onnx", delegate, threads, {}, GRAPH, [], [])
    await worker.request(message, protocol.ModelLoaded, fds=(fd,), timeout_s=LOAD_TIMEOUT_S)
    os.close(fd)
    await source.attach("peer", worker, active=True, timeout_s=LOAD_TIMEOUT_S)
    await first.wait()
    print("first", flush=True)
    everything = family(os.getpid())
    began, computed, counted = time.perf_counter(), sum(map(cpu_s, everything)), count
    await asyncio.sleep(seconds)
    wall, cpu, frames = time.perf_counter() - began, sum(map(cpu_s, everything)) - computed, count - counted
    memory = sum(map(pss_mb, everything))
    await source.stop()
    await supervisor.stop()
    print(json.dumps({"frames": frames, "wall_s": wall, "cpu_s": cpu, "peak_rss_mb": memory}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4], int(sys.argv[5])))
