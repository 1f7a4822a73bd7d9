"""A daemon's end of the protocol, synchronous and small: starts a real host, asks it for workers, speaks to them."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from agent import memfd, protocol
from agent.worker import ring
from tests.workerpython import program

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 60.0


class Peer:
    """One socket to a host or a worker. Messages that were not asked for stay in `unasked`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unasked: list[Any] = []

    def send(self, message: Any, *fds: int) -> None:
        protocol.send(self.sock, message, fds)

    def receive(self, timeout_s: float = TIMEOUT_S) -> protocol.Packet | None:
        """The next packet; None at the end."""
        if not select.select([self.sock], [], [], timeout_s)[0]:
            raise TimeoutError(f"nothing came within {timeout_s} s")
        try:
            return protocol.receive(self.sock)
        except ConnectionResetError:
            return None

    def expect(self, kind: type[Any], timeout_s: float = TIMEOUT_S) -> Any:
        """The next message of `kind`; others before it go to `unasked`, a Fault that was not expected raises."""
        return self.expect_packet(kind, timeout_s).message

    def expect_packet(self, kind: type[Any], timeout_s: float = TIMEOUT_S) -> protocol.Packet:
        for index, message in enumerate(self.unasked):
            if isinstance(message, kind):
                return protocol.Packet(self.unasked.pop(index))
        end = time.monotonic() + timeout_s
        while True:
            packet = self.receive(max(0.0, end - time.monotonic()))
            if packet is None:
                raise EOFError(f"the other end closed before {kind.__name__}")
            if isinstance(packet.message, kind):
                return packet
            if isinstance(packet.message, protocol.Fault):
                raise AssertionError(packet.message)
            self.unasked.append(packet.message)

    def collect(self, seconds: float) -> list[Any]:
        """Every message that comes within a time, and those that came before."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                packet = self.receive(left)
            except TimeoutError:
                break
            if packet is None:
                break
            self.unasked.append(packet.message)
        taken, self.unasked = self.unasked, []
        return taken

    def close(self) -> None:
        self.sock.close()


class Worker(Peer):
    """A worker's socket, its number at the host and its process."""

    def __init__(self, sock: socket.socket, number: int, pid: int) -> None:
        super().__init__(sock)
        self.number = number
        self.pid = pid


class Daemon(Peer):
    """Starts a host as a child and keeps its socket."""

    def __init__(self, command: Sequence[str] = ("-m", "agent.worker.main")) -> None:
        ours, theirs = protocol.socket_pair()
        super().__init__(ours)
        self.process = subprocess.Popen(
            [*program(*command), "host", "--fd", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.workers: list[Worker] = []
        self.ready: protocol.HostReady = self.expect(protocol.HostReady)

    def spawn(self, role: str, *, nice: int = 0, memory_bytes: int = 0) -> Worker:
        ours, theirs = protocol.socket_pair()
        number = len(self.workers) + 1
        self.send(protocol.Spawn(number, role, nice, memory_bytes), theirs.fileno())
        theirs.close()
        started = self.expect(protocol.Started)
        worker = Worker(ours, number, started.pid)
        self.workers.append(worker)
        return worker

    def kill(self, worker: Worker, number: int = 9) -> None:
        self.send(protocol.Kill(worker.number, number))

    def wait_exit(self, worker: Worker, timeout_s: float = TIMEOUT_S) -> protocol.Exited:
        end = time.monotonic() + timeout_s
        while True:
            exited = self.expect(protocol.Exited, max(0.01, end - time.monotonic()))
            if exited.worker == worker.number:
                return exited
            self.unasked.append(exited)

    def stop(self) -> int:
        """Close everything; the host's exit status."""
        if self.process.returncode is not None:
            return self.process.returncode
        for worker in self.workers:
            worker.close()
        self.close()
        try:
            return self.process.wait(TIMEOUT_S)
        finally:
            self.process.kill()
            self.process.communicate()


def load_message(delegate: str, graph: dict[str, Any] | None = None, **changes: Any) -> protocol.LoadModel:
    """A LoadModel that takes the tensors from the model itself."""
    fields: dict[str, Any] = {
        "line": "test",
        "version": "1.0.0",
        "component": "model",
        "format": "onnx" if delegate.startswith("onnx") else "tflite",
        "delegate": delegate,
        "threads": 1,
        "options": {},
        "graph": graph if graph is not None else {"task": "raw"},
        "inputs": [],
        "outputs": [],
    }
    return protocol.LoadModel(**{**fields, **changes})


def load(worker: Worker, model: bytes, message: protocol.LoadModel) -> Any:
    """Send a model; the ModelLoaded or the Fault that answers."""
    fd = memfd.of_bytes("model", model)
    worker.send(message, fd)
    os.close(fd)
    packet = worker.receive()
    assert packet is not None, "the worker died while loading"
    return packet.message


def ask(worker: Worker, message: Any, *contents: bytes) -> Any:
    """Send a message with each of `contents` in a sealed memfd; the answer."""
    fds = [memfd.of_bytes("content", data) for data in contents]
    worker.send(message, *fds)
    for fd in fds:
        os.close(fd)
    packet = worker.receive()
    assert packet is not None, "the worker died"
    return packet.message


class Camera(Worker):
    """A source process that opened something, and the readers attached to it."""

    opened: protocol.SourceOpened
    ring: int

    @classmethod
    def open(cls, daemon: Daemon, options: dict[str, Any], kind: str = "video") -> Camera:
        worker = daemon.spawn("source")
        camera = cls(worker.sock, worker.number, worker.pid)
        camera.send(protocol.OpenSource("cam", kind, options))
        packet = camera.expect_packet(protocol.SourceOpened)
        camera.opened = packet.message
        (camera.ring,) = packet.take(1)
        return camera

    def geometry(self) -> protocol.AttachRing:
        o = self.opened
        return protocol.AttachRing(o.dtype, o.shape, o.slots, o.slot_bytes)

    def attach(self, reader: int, model: Worker, *, line: str = "line", active: bool = True) -> None:
        """Attach a model worker as a reader and wait until it is warm."""
        ours, theirs = protocol.socket_pair()
        self.send(protocol.AttachReader(reader, line, active), ours.fileno())
        model.send(self.geometry(), self.ring, theirs.fileno())
        ours.close()
        theirs.close()
        model.expect(protocol.RingAttached)

    def attach_socket(self, reader: int, *, line: str = "line", active: bool = True) -> socket.socket:
        """Attach a reader played by the test itself; its end of the notice socket."""
        ours, theirs = protocol.socket_pair()
        self.send(protocol.AttachReader(reader, line, active), theirs.fileno())
        theirs.close()
        return ours


class Reader:
    """A reader played by the test: takes notices, looks at frames, returns leases."""

    def __init__(self, camera: Camera, number: int, **kwargs) -> None:
        o = camera.opened
        self.frames = ring.map_ring(camera.ring, o.slots, o.slot_bytes, o.dtype, o.shape)
        self.sock = camera.attach_socket(number, **kwargs)
        self.sock.settimeout(TIMEOUT_S)
        self.seen: list[int] = []

    def ask(self) -> None:
        self.sock.send(protocol.CREDIT.pack(protocol.FIRST_CREDIT))

    def take(self) -> tuple[int, int, int] | None:
        """(seq, time, slot) of the next notice; None at the end."""
        data = self.sock.recv(64)
        if not data:
            return None
        seq, t_ns, slot, _ = protocol.NOTICE.unpack(data)
        self.seen.append(seq)
        return seq, t_ns, slot

    def give_back(self, slot: int) -> None:
        self.sock.send(protocol.CREDIT.pack(slot))

    def run(self, count: int, work_s: float = 0.0) -> list[tuple[int, int, int]]:
        """Answer `count` frames: (seq, time, number painted into the frame)."""
        answered = []
        while len(answered) < count and (notice := self.take()):
            seq, t_ns, slot = notice
            answered.append((seq, t_ns, frame_number(self.frames[slot])))
            time.sleep(work_s)
            self.give_back(slot)
        return answered


def frame_number(frame: np.ndarray[Any, Any]) -> int:
    """The number that `make_clip` painted into a frame as eight black or white bars."""
    columns = frame.shape[1] // 8
    return sum(1 << bit for bit in range(8) if frame[:, bit * columns : (bit + 1) * columns].mean() > 127)


def make_clip(path: Path, frames: int, size: tuple[int, int] = (160, 120), fps: float = 30.0) -> Path:
    """An MJPEG AVI whose frames carry their own number, 0 to 255."""
    width, height = size
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, size)
    assert writer.isOpened()
    for number in range(frames):
        frame = np.zeros((height, width, 3), np.uint8)
        columns = width // 8
        for bit in range(8):
            if number >> bit & 1:
                frame[:, bit * columns : (bit + 1) * columns] = 255
        writer.write(frame)
    writer.release()
    return path
