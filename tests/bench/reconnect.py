"""How soon a camera's first frame comes after its return: a real RTSP server, killed and stalled at random moments.

    reconnect.py [--count 20] [--seed 7]

Prints one line a way of being away, with the seconds from the return to the first frame that a reader got, and the CPU
pressure of the machine beside it. Exit status 1 when one took longer than five seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "agent" / "worker")]

from workerdriver import Camera, Daemon, Reader  # noqa: E402

from tests.fakes.rtspcamera import RtspCamera  # noqa: E402

LIMIT_S = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20, metavar="N", help="times each way (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of moments and absences (default: %(default)s)")
    args = parser.parse_args()
    rng, daemon, gate = random.Random(args.seed), Daemon(), RtspCamera()
    gate.start()
    camera = Camera.open(daemon, {"url": gate.url}, "rtsp")
    reader, frames = Reader(camera, 1), [0]
    reader.ask()

    def read() -> None:
        with contextlib.suppress(ConnectionResetError):  # the source has ended before it heard of the last frame
            while (notice := reader.take()) is not None:
                frames[0] += 1
                reader.give_back(notice[2])

    threading.Thread(target=read, daemon=True).start()
    seconds: dict[str, list[float]] = {"killed": [], "stalled": []}
    for _ in range(args.count):
        for how, found in seconds.items():
            time.sleep(rng.uniform(1, 2))
            away_s = rng.choice((rng.uniform(0.1, 3), rng.uniform(3, 9)))
            leave, come = (gate.kill, gate.start) if how == "killed" else (gate.stall, gate.go_on)
            leave()
            time.sleep(away_s)
            come()
            began, seen = time.monotonic(), frames[0]
            while frames[0] == seen:
                time.sleep(0.005)
            found.append(time.monotonic() - began)
            camera.collect(0.01)
    gate.kill()
    camera.close()
    daemon.stop()
    for how, found in seconds.items():
        found.sort()
        print(f"{how:8} n {len(found)}  p50 {found[len(found) // 2]:.2f} s  p90 {found[int(len(found) * 0.9)]:.2f} s"
              f"  longest {found[-1]:.2f} s")  # fmt: skip
    print(f"cpu pressure: {Path('/proc/pressure/cpu').read_text().splitlines()[0]}")
    return int(max(map(max, seconds.values())) > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
