"""Inside the machine: reads a V4L2 camera as the device would, and writes down what its source process says.

    camera.py LOG DEVICE [SECONDS]

One JSON object a line: {"at": seconds, "state", "reason", "detail", "frames", "reconnects"} for each state, and
{"at": seconds, "frame": number, "late_ms": …, "mean": …} for the first frame after each change.
"""

from __future__ import annotations

import json
import select
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "agent" / "worker")]

from workerdriver import Camera, Daemon, Reader  # noqa: E402

from agent import protocol  # noqa: E402


def main(log: Path, device: str, seconds: float) -> None:
    with log.open("w", buffering=1) as out:

        def note(**facts: Any) -> None:
            out.write(json.dumps({"at": round(time.monotonic(), 2), **facts}) + "\n")

        daemon = Daemon()
        camera = Camera.open(daemon, {"device": device, "size": "640x480", "timeout_s": 3}, "camera")
        note(opened=camera.opened.shape, fps=camera.opened.fps)
        reader = Reader(camera, 1)
        reader.ask()
        end, last, fresh = time.monotonic() + seconds, ("", ""), True
        while time.monotonic() < end:
            ready, _, _ = select.select([camera.sock, reader.sock], [], [], 1.0)
            if camera.sock in ready:
                packet = camera.receive()
                if packet is None:
                    note(gone=True)
                    break
                told = packet.message
                if isinstance(told, protocol.SourceState) and (told.state, told.reason) != last:
                    last, fresh = (told.state, told.reason), True
                    note(state=told.state, reason=told.reason, detail=told.detail, frames=told.frames,
                         reconnects=told.reconnects)  # fmt: skip
            if reader.sock in ready and (notice := reader.take()) is not None:
                seq, t_ns, slot = notice
                if fresh or seq % 100 == 0:
                    fresh = False
                    late_ms = round((time.monotonic_ns() - t_ns) / 1e6, 1)
                    note(frame=seq, late_ms=late_ms, mean=round(float(reader.frames[slot].mean()), 1))
                reader.give_back(slot)
        daemon.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 1000.0)
