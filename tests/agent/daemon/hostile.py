"""A host as shipped whose workers are taken over: each does one nasty thing. Run as a program, never imported."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from agent import protocol
from agent.worker import main as entry

LOADED = {
    "t": "ModelLoaded", "actual": "litert:xnnpack", "coverage": 1.0, "load_ms": 1.0, "rss_bytes": 1, "runtime": "x",
    "driver": "", "compiled": "",
    "inputs": [], "outputs": [],
}  # fmt: skip
PASSED = {"t": "GoldenPassed", "vectors": 1, "worst": 0.0}
MEASURED = {"t": "Measured", "runs_ns": [1000] * 5, "cpu_ns": [1000] * 5, "waited_ns": [0] * 5, "rss_bytes": 1,
            "least_rss_bytes": 1}  # fmt: skip
ATTACHED = {"t": "RingAttached", "warm_ms": 1.0}
ANSWERS = {"LoadModel": LOADED, "RunGolden": PASSED, "Measure": MEASURED, "AttachRing": ATTACHED}


def fault(reason: str, message: str = "no") -> dict[str, object]:
    return {"t": "Fault", "reason": reason, "message": message, "hint": ""}


def worker(behaviour: str) -> None:
    sock = socket.socket(fileno=3)
    while (packet := protocol.receive(sock)) is not None:
        kind = type(packet.message).__name__
        packet.close()
        if kind == "StopWorker":
            return
        answer = dict(ANSWERS.get(kind, fault("bad_message")))
        if kind == "Measure":
            answer.update(dict.fromkeys(("runs_ns", "cpu_ns", "waited_ns"), [1000] * packet.message.runs))
        fds: list[int] = []
        if behaviour == "descriptors":
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(protocol.MAX_FDS)]
        elif behaviour == "no_runs" and kind == "Measure":
            answer["runs_ns"] = []
        elif behaviour == "huge_runs" and kind == "Measure":
            answer["runs_ns"] = [10**400] * 5
        elif behaviour == "slow" and kind == "LoadModel":
            answer["load_ms"] = 1e12
        elif behaviour == "nan" and kind == "LoadModel":
            answer["coverage"] = float("nan")
        elif behaviour == "surrogate" and kind == "RunGolden":
            answer = fault("golden_mismatch", "half \ud800 a\nline\x1b[2J" + "x" * 5000)
        elif behaviour == "excuse" and kind == "RunGolden":
            answer = fault("worker_unavailable")
        elif behaviour == "deaf" and kind == "RunGolden":
            time.sleep(600)
        elif behaviour == "garbage" and kind == "RunGolden":
            sock.send(b"\xff" * 100)
            time.sleep(600)
        elif behaviour == "cut" and kind == "RunGolden":
            sock.shutdown(socket.SHUT_RDWR)
            time.sleep(0.3)
            os._exit(3)
        socket.send_fds(sock, [json.dumps(answer).encode()], fds)
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    if sys.argv[2] == "host":
        sys.exit(entry.main(sys.argv[2:], entry=(os.path.abspath(__file__), sys.argv[1])))
    worker(sys.argv[1])
