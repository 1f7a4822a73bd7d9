"""A host as shipped whose source processes know live sources with a fault each. Run as a program, never imported.

`flickers`: every second frame is a loss. `hangs`: after three frames a call never returns. `dies`: after three frames
something that nobody expected is raised in the waiting thread. `lies`: its frames are of a type that no reader takes.
`complains`: its process says over and over that something is wrong.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent import protocol
from agent.errors import Reason, SourceError
from agent.worker import entrance
from agent.worker import main as entry
from agent.worker.sources import LIVE, SOURCES, Pace


class Faulty:
    """Frames of one colour, 50 a second."""

    blocks: Literal[True] = True
    dtype, shape, detail = "uint8", (24, 32, 3), ""
    stale_s, hung_s = 0.3, 1.0
    pace = Pace(LIVE, 50.0, paced=False, queue_frames=2)

    def __init__(self, fault: str) -> None:
        self._fault, self._count = fault, 0
        if fault == "lies":
            self.dtype = "float64"
        self.feed: Callable[[int, Sequence[Any]], None] | None = None

    def wait_into(self, slot: Any) -> int | None:
        self._count += 1
        time.sleep(0.02)
        if self._fault == "flickers" and self._count % 2 == 0:
            raise SourceError(Reason.SOURCE_LOST, "gone for a moment")
        if self._count > 3 and self._fault == "hangs":
            time.sleep(10_000)
        if self._count > 3 and self._fault == "dies":
            raise ZeroDivisionError("a bug in a driver's binding")
        if self._fault == "complains":
            fault = protocol.Fault(Reason.SOURCE_UNREADABLE.value, "no", "")
            with socket.socket(fileno=os.dup(entrance.WORKER_FD)) as link:
                for _ in range(20):
                    protocol.send(link, fault)
        if slot is not None:
            slot[...] = self._count % 256
        return time.monotonic_ns()

    def reopen(self) -> None:
        """It is there."""

    def interrupt(self) -> None:
        """Nothing helps."""

    def close(self) -> None:
        """Nothing is open."""


def _opener(fault: str) -> Callable[[Mapping[str, Any]], Faulty]:
    return lambda _: Faulty(fault)


if __name__ == "__main__":
    faults = {name: _opener(name) for name in ("flickers", "hangs", "dies", "lies", "complains")}
    sys.exit(entry.main(sys.argv[1:], sources={**SOURCES, **faults}, entry=(os.path.abspath(__file__),)))
