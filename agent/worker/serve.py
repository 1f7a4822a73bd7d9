"""The model worker, also as a trial: loads one model, proves it, measures it, and serves frames with it.

One thread; it waits for the daemon and, once a ring is attached, for frames. What a frame goes through is `pipeline`.
Invariants: one process loads one model; a frame's `Result` leaves before its credit, so a worker that dies in between
has answered it; a session that fails on a frame ends the process, because the frame must not vanish silently.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Mapping

import cv2
import numpy as np

from agent import protocol
from agent.errors import AgentError, ModelError, Reason
from agent.worker import channel, golden
from agent.worker.delegates import DelegateLoader, parse_options
from agent.worker.graph import Graph, parse_graph
from agent.worker.images import MAX_IMAGE_BYTES, decode_image
from agent.worker.pipeline import Answer, Pipeline
from agent.worker.reader import BLANK_GREY, RingReader
from agent.worker.tensor import parse_specs

MAX_THREADS = 64
MAX_RUNS = 10_000
BLANK_SIZE = (480, 640)


def run(link: channel.Channel, delegates: Mapping[str, DelegateLoader]) -> int:
    """Serve the daemon until it ends this worker; the exit status."""
    cv2.setNumThreads(1)
    worker = _ModelWorker(link, delegates)
    while worker.turn():
        pass
    return worker.status


def rss_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _ModelWorker:
    def __init__(self, link: channel.Channel, delegates: Mapping[str, DelegateLoader]) -> None:
        self._link = link
        self._delegates = delegates
        self._pipeline: Pipeline | None = None
        self._graph: Graph | None = None
        self._reader: RingReader | None = None
        self._sample: bytes | None = None
        self.status = 0

    def turn(self) -> bool:
        """Wait for a message or a frame and act on it; False when the worker shall end."""
        waiting = [self._link.fileno()] if self._reader is None else [self._link.fileno(), self._reader.fileno()]
        ready, _, _ = select.select(waiting, [], [])
        if self._link.fileno() in ready:
            return self._link.serve_one(self._obey)
        return self._serve_frame()

    # --- frames ------------------------------------------------------------------------------------------------------

    def _serve_frame(self) -> bool:
        reader, pipeline = self._reader, self._pipeline
        if reader is None or pipeline is None:
            return True
        lent = reader.receive()
        if lent is None:
            self._finish(reader)
            return True
        started = time.monotonic_ns()
        try:
            answer = pipeline.run(lent.frame)
        except AgentError as e:
            self._link.fault(e)
            self.status = 1
            return False
        self._link.send(_result(lent.seq, lent.t_ns, started, answer))
        if not reader.give_back(lent):
            self._finish(reader)
        return True

    def _finish(self, reader: RingReader) -> None:
        reader.close()
        self._reader = None
        self._link.send(protocol.Finished(reader.answered, reader.last_seq))

    # --- requests ----------------------------------------------------------------------------------------------------

    def _obey(self, packet: protocol.Packet) -> bool:
        message = packet.message
        if isinstance(message, protocol.LoadModel):
            self._load(message, packet)
        elif isinstance(message, protocol.StopWorker):
            return False
        elif self._pipeline is None or self._graph is None:
            raise AgentError(Reason.BAD_MESSAGE, f"{type(message).__name__} before LoadModel")
        elif isinstance(message, protocol.RunGolden):
            self._run_golden(message, packet, self._pipeline, self._graph)
        elif isinstance(message, protocol.Measure):
            self._measure(message, self._pipeline)
        elif isinstance(message, protocol.RunImage):
            self._run_image(packet, self._pipeline)
        elif isinstance(message, protocol.AttachRing):
            self._attach(message, packet, self._pipeline)
        else:
            raise channel.unexpected(message, "model")
        return True

    def _load(self, message: protocol.LoadModel, packet: protocol.Packet) -> None:
        if self._pipeline is not None:
            raise AgentError(Reason.BAD_MESSAGE, "a model worker loads one model")
        (fd,) = packet.take(1)
        try:
            started = time.perf_counter_ns()
            if not 1 <= message.threads <= MAX_THREADS:
                raise AgentError(Reason.BAD_MESSAGE, f"{message.threads} threads")
            load = self._delegates.get(message.delegate)
            if load is None:
                raise ModelError(
                    Reason.UNKNOWN_DELEGATE,
                    f"delegate {message.delegate[:40]!r} is unknown",
                    hint=f"known delegates: {', '.join(self._delegates)}",
                )
            graph = parse_graph(message.graph)
            inputs, outputs = parse_specs(message.inputs, "an input"), parse_specs(message.outputs, "an output")
            delegate = load()
            if message.format not in delegate.formats:
                raise ModelError(
                    Reason.UNKNOWN_FORMAT,
                    f"{delegate.name} does not run {message.format[:20]!r}",
                    hint=f"it runs {', '.join(sorted(delegate.formats))}",
                )
            session = delegate.load(fd, message.format, parse_options(message.threads, message.options))
            pipeline = Pipeline(session, graph, inputs, outputs)
            if graph.task != "raw":
                pipeline.plan(*BLANK_SIZE)  # a declaration that does not fit must fail now, not on the first frame
        finally:
            os.close(fd)
        self._pipeline, self._graph = pipeline, graph
        self._link.send(
            protocol.ModelLoaded(
                session.actual,
                round(session.coverage, 4),
                round((time.perf_counter_ns() - started) / 1e6, 3),
                rss_bytes(),
                delegate.runtime,
                "",
                "",
                [spec.to_json() for spec in pipeline.inputs],
                [spec.to_json() for spec in pipeline.outputs],
            )
        )

    def _run_golden(
        self, message: protocol.RunGolden, packet: protocol.Packet, pipeline: Pipeline, graph: Graph
    ) -> None:
        (fd,) = packet.take(1)
        vectors = golden.load_vectors(_read_all(fd, golden.MAX_GOLDEN_BYTES))
        worst = golden.check(pipeline, graph, message.component, vectors, golden.parse_tolerance(message.tolerance))
        self._sample = vectors[0].image
        self._link.send(protocol.GoldenPassed(len(vectors), round(worst, 4)))

    def _measure(self, message: protocol.Measure, pipeline: Pipeline) -> None:
        if not (0 <= message.warmups <= MAX_RUNS and 0 <= message.runs <= MAX_RUNS):
            raise AgentError(Reason.BAD_MESSAGE, f"{message.warmups} warm-ups and {message.runs} runs")
        once = self._whole_run(pipeline)
        for _ in range(message.warmups):
            once()
        runs_ns, cpu_ns = [], []
        for _ in range(message.runs):
            computed, started = time.process_time_ns(), time.perf_counter_ns()
            once()
            runs_ns.append(time.perf_counter_ns() - started)
            cpu_ns.append(time.process_time_ns() - computed)
        self._link.send(protocol.Measured(runs_ns, cpu_ns, rss_bytes()))

    def _whole_run(self, pipeline: Pipeline) -> Callable[[], object]:
        """What one frame costs: on a golden picture, a blank one, or without a picture for a model that takes none."""
        try:
            pipeline.plan(*BLANK_SIZE)
        except ModelError:
            return pipeline.session.run
        frame = _blank(*BLANK_SIZE) if self._sample is None else decode_image(self._sample)
        return lambda: pipeline.run(frame)

    def _run_image(self, packet: protocol.Packet, pipeline: Pipeline) -> None:
        (fd,) = packet.take(1)
        arrived = time.monotonic_ns()
        frame = decode_image(_read_all(fd, MAX_IMAGE_BYTES))
        started = time.monotonic_ns()
        self._link.send(_result(0, arrived, started, pipeline.run(frame)))

    def _attach(self, message: protocol.AttachRing, packet: protocol.Packet, pipeline: Pipeline) -> None:
        if self._reader is not None:
            raise AgentError(Reason.BAD_MESSAGE, "a ring is attached already")
        started = time.perf_counter_ns()
        ring_fd, notices_fd = packet.take(2)
        try:
            reader = RingReader(message, ring_fd, notices_fd)
            pipeline.run(reader.blank())
        except AgentError:
            os.close(notices_fd)
            raise
        finally:
            os.close(ring_fd)
        self._reader = reader
        self._link.send(protocol.RingAttached(round((time.perf_counter_ns() - started) / 1e6, 3)))
        if not reader.ask():
            self._finish(reader)


def _blank(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    if not (0 < height <= 1 << 14 and 0 < width <= 1 << 14):
        raise AgentError(Reason.BAD_MESSAGE, f"frames of {width}x{height}")
    return np.full((height, width, 3), BLANK_GREY, np.uint8)


def _result(seq: int, t_frame_ns: int, started_ns: int, answer: Answer) -> protocol.Result:
    stages = (started_ns - t_frame_ns, answer.preprocess_ns, answer.inference_ns, answer.postprocess_ns)
    return protocol.Result(
        seq, t_frame_ns, time.monotonic_ns(), [max(0, stage) // 1000 for stage in stages], answer.items
    )


def _read_all(fd: int, limit: int) -> bytes:
    """The whole of a descriptor's file, copied out so that nobody can change it under us; closes it.

    Raises:
        AgentError: `bad_message` beyond `limit` bytes.
    """
    try:
        length = os.fstat(fd).st_size
        if length > limit:
            raise AgentError(Reason.BAD_MESSAGE, f"a file of {length} bytes, more than {limit}")
        data = b""
        while len(data) < length and (chunk := os.pread(fd, length - len(data), len(data))):
            data += chunk
        return data
    finally:
        os.close(fd)
