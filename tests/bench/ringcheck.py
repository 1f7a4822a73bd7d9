"""`make ring`: frames with a checksum each, from one source process to two readers through the shipped ring.

The source is the shipped source process with a source of numbered frames, each reader is the shipped `RingReader` in a
process of its own, and all three are pinned to different cores as far as there are so many. Every frame is handed to
both readers (policy `every`). A frame that is torn, stale, twice, missing or out of order is counted; the exit status
says whether there was one. `--arm64` runs the same under qemu-aarch64 (`tests.bench.arm64`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent import protocol
from agent.worker.main import main as worker_main
from agent.worker.reader import RingReader
from agent.worker.sources import EVERY, Pace

FRAME_BYTES = 4096
QUEUE_FRAMES = 4
READERS = 2
HOLD_EVERY = 64
"""Every so many frames a reader keeps its lease for a moment and checks the frame again before it gives it back."""
HOLD_S = 0.0002
_HEAD = 12  # eight bytes sequence, four bytes checksum of all that follows


class Numbered:
    """A source of frames that carry their own number and checksum, no two alike."""

    blocks = False
    detail = ""
    dtype = "uint8"
    shape = (FRAME_BYTES,)
    pace = Pace(EVERY, 0.0, False, QUEUE_FRAMES)

    def __init__(self, frames: int) -> None:
        self._left = frames
        self._seq = 0
        self._noise = np.random.default_rng(1).integers(0, 256, 2 * FRAME_BYTES, np.uint8)

    def read_into(self, slot: np.ndarray[Any, Any]) -> bool:
        """See `agent.worker.sources.Source`."""
        if self._seq == self._left:
            return False
        start = self._seq % FRAME_BYTES
        slot[_HEAD:] = self._noise[start : start + FRAME_BYTES - _HEAD]
        slot[-8:] = np.frombuffer(self._seq.to_bytes(8, "little"), np.uint8)
        slot[:8] = slot[-8:]
        slot[8:_HEAD] = np.frombuffer(zlib.crc32(slot[_HEAD:]).to_bytes(4, "little"), np.uint8)
        self._seq += 1
        return True

    def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True)
class Tally:
    """What one reader saw: `wrong` counts frames whose checksum or number does not fit, `unordered` those that came
    after a later one, twice, or with others missing before them."""

    frames: int = 0
    wrong: int = 0
    unordered: int = 0
    cores: tuple[int, ...] = ()


def read(fd: int, frames: int, core: int) -> Tally:
    """Be a reader: take `frames` frames from the ring that comes over socket `fd`."""
    os.sched_setaffinity(0, {core})
    with socket.socket(fileno=fd) as sock:
        packet = protocol.receive(sock)
        assert packet is not None
        ring_fd, notices_fd = packet.take(2)
        reader = RingReader(packet.message, ring_fd, notices_fd)
        os.close(ring_fd)
        tally = Tally(cores=tuple(os.sched_getaffinity(0)))
        assert reader.ask()
        while tally.frames < frames and (lent := reader.receive()) is not None:
            tally.wrong += not _holds(lent.frame, lent.seq)
            tally.unordered += lent.seq != tally.frames
            if lent.seq % HOLD_EVERY == 0:
                time.sleep(HOLD_S)
                tally.wrong += not _holds(lent.frame, lent.seq)
            tally.frames += 1
            if not reader.give_back(lent):
                break
        reader.close()
    return tally


def _holds(frame: np.ndarray[Any, Any], seq: int) -> bool:
    head = frame[:_HEAD].tobytes()
    right_number = head[:8] == seq.to_bytes(8, "little")
    return right_number and head[8:] == zlib.crc32(frame[_HEAD:]).to_bytes(4, "little")


def check(frames: int, python: str = sys.executable) -> list[Tally]:
    """Run the whole thing; one tally a reader.

    Raises:
        EOFError: a process ended before its time.
    """
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = protocol.socket_pair()
    children = [_child(python, theirs, "source", "--frames", frames, "--core", cores[0])]
    opened, ring = _open(ours)
    geometry = protocol.AttachRing(opened.dtype, list(opened.shape), opened.slots, opened.slot_bytes)
    for number in range(READERS):
        sock, readers = protocol.socket_pair()
        core = cores[(number + 1) % len(cores)]
        children.append(_child(python, readers, "reader", "--frames", frames, "--core", core))
        source_end, reader_end = protocol.socket_pair()
        with sock, source_end, reader_end:
            protocol.send(ours, protocol.AttachReader(number + 1, f"line-{number}", True), (source_end.fileno(),))
            protocol.send(sock, geometry, (ring, reader_end.fileno()))
    os.close(ring)
    tallies = []
    for child in children[1:]:
        said, _ = child.communicate()
        if child.returncode != 0:
            raise EOFError(f"a reader ended with {child.returncode}")
        tallies.append(Tally(**json.loads(said)))
    ours.close()
    children[0].wait()
    return tallies


def _child(python: str, sock: socket.socket, *words: object) -> subprocess.Popen[str]:
    """One of the three processes; its end of `sock` is closed here."""
    role, *options = map(str, words)
    command = [python, "-m", "tests.bench.ringcheck", role, "--fd", str(sock.fileno()), *options]
    with sock:
        return subprocess.Popen(
            command, pass_fds=(sock.fileno(),), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )


def _open(sock: socket.socket) -> tuple[protocol.SourceOpened, int]:
    protocol.send(sock, protocol.OpenSource("numbers", "numbered", {}))
    while (packet := protocol.receive(sock)) is not None:
        if isinstance(packet.message, protocol.SourceOpened):
            return packet.message, packet.take(1)[0]
        if isinstance(packet.message, protocol.Fault):
            raise EOFError(packet.message.message)
    raise EOFError("the source ended")


def _serve_source(fd: int, frames: int, core: int) -> int:
    os.sched_setaffinity(0, {core})

    def numbered(options: Mapping[str, Any]) -> Numbered:
        return Numbered(frames)

    return worker_main(["source", "--fd", str(fd)], sources={"numbered": numbered})


def _report(frames: int) -> int:
    began = time.monotonic()
    tallies = check(frames)
    seconds = time.monotonic() - began
    machine = f"{os.uname().machine}, {len(os.sched_getaffinity(0))} cores"
    print(f"{frames} frames of {FRAME_BYTES} bytes to {READERS} readers in {seconds:.1f} s on {machine}")
    for number, tally in enumerate(tallies):
        print(f"  reader {number} on core {tally.cores}: {tally.frames} frames, {tally.wrong} with a wrong checksum"
              f" or number, {tally.unordered} out of order")  # fmt: skip
    return int(any(t.wrong or t.unordered or t.frames != frames for t in tallies))


def main() -> int:
    """Command line; also the entry of the three processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("role", nargs="?", choices=("check", "source", "reader"), default="check")
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--arm64", action="store_true", help="under qemu-aarch64; needs root, mmdebstrap, qemu-user")
    parser.add_argument("--fd", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "source":
        return _serve_source(args.fd, args.frames, args.core)
    if args.role == "reader":
        tally = read(args.fd, args.frames, args.core)
        print(json.dumps({slot: getattr(tally, slot) for slot in tally.__slots__}))
        return 0
    if args.arm64:
        from tests.bench import arm64

        return arm64.run("tests.bench.ringcheck", "--frames", str(args.frames))
    return _report(args.frames)


if __name__ == "__main__":
    raise SystemExit(main())
