"""The model worker, also as a trial: loads one model, proves it, measures it, and serves frames with it.

One thread; it waits for the daemon and, once a ring is attached, for frames. What a frame goes through is `pipeline`.
Invariants: one process loads one model; a frame's `Result` leaves before its credit, so a worker that dies in between
has answered it; a session that fails on a frame ends the process, because the frame must not vanish silently.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Mapping

import cv2

from agent import protocol
from agent.errors import AgentError, ModelError, Reason
from agent.worker import channel, follow, golden
from agent.worker.delegates import DelegateLoader, parse_options
from agent.worker.delegates.probe import probing
from agent.worker.footprint import rss_bytes
from agent.worker.graph import Graph, parse_graph
from agent.worker.images import MAX_IMAGE_BYTES
from agent.worker.measurement import Measurement, Timed
from agent.worker.pipeline import Answer, Pipeline
from agent.worker.reader import RingReader
from agent.worker.tensor import parse_specs
from agent.worker.watch import Watch
from agent.worker.windowfile import decode_frame

MAX_THREADS = 64
MAX_RUNS = 10_000


def run(link: channel.Channel, delegates: Mapping[str, DelegateLoader]) -> int:
    """Serve the daemon until it ends this worker; the exit status."""
    cv2.setNumThreads(1)
    worker = ModelWorker(link, delegates)
    while worker.turn():
        pass
    return worker.status


class ModelWorker:
    """One model, and the ring it reads once one is attached. `status` is the exit status it ends with.

    Args:
        join: makes the notice socket of the descriptor that comes for it.
    """

    def __init__(
        self,
        link: channel.Channel,
        delegates: Mapping[str, DelegateLoader],
        join: Callable[[int], socket.socket] = lambda fd: socket.socket(fileno=fd),
    ) -> None:
        self._link = link
        self._join = join
        self._delegates = delegates
        self._pipeline: Pipeline | None = None
        self._graph: Graph | None = None
        self._reader: RingReader | None = None
        self._sample: bytes | None = None
        self._atol: tuple[float, ...] = ()
        self._measurement: Measurement | None = None
        self._wish: protocol.SetRules | None = None
        self._watch: Watch | None = None
        self._crops: follow.Crops | None = None
        self.status = 0

    def turn(self) -> bool:
        """Wait for a message or a frame and act on it; False when the worker shall end."""
        ready, _, _ = select.select([self._link.fileno(), *self.frames_from()], [], [])
        if self._link.fileno() in ready:
            return self._link.serve_one(self.obey)
        return self.serve_frame()

    def frames_from(self) -> tuple[int, ...]:
        """The descriptor that is ready when a frame is there; none before a ring is attached."""
        return () if self._reader is None else (self._reader.fileno(),)

    # --- frames ------------------------------------------------------------------------------------------------------

    def serve_frame(self) -> bool:
        """Take a frame that is there, answer it and give it back; False when the worker shall end."""
        reader, pipeline = self._reader, self._pipeline
        if reader is None or pipeline is None:
            return True
        lent = reader.receive()
        if lent is None:
            self._finish(reader)
            return True
        if self._watch is not None and self._watch.holds_back(lent):
            if not reader.give_back(lent):
                self._finish(reader)
            return True
        started = time.monotonic_ns()
        try:
            if self._crops is None:
                answer = pipeline.run(lent.frame)
            else:
                answer = follow.answer(pipeline, self._crops, lent.frame, follow.read(lent.found))
        except AgentError as e:
            self._link.fault(e)
            self.status = 1
            return False
        result = _result(lent.seq, lent.t_ns, started, answer)
        self._link.send(result)
        if self._watch is not None:
            self._watch.answered(lent, result.items)
        if not reader.give_back(lent, follow.written(result.items) if lent.followed else b""):
            self._finish(reader)
        return True

    def _finish(self, reader: RingReader) -> None:
        reader.close()
        self._reader = None
        self._link.send(protocol.Finished(reader.answered, reader.last_seq))

    # --- requests ----------------------------------------------------------------------------------------------------

    def obey(self, packet: protocol.Packet) -> bool:
        """Do what the daemon asks; False when the worker shall end."""
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
        elif isinstance(message, protocol.SetCrops):
            self._crops = follow.parse_crops(message.crops)
        elif isinstance(message, protocol.SetRules):
            self._wish = message
        elif isinstance(message, protocol.ExportCompiled):
            self._export(self._pipeline)
        elif isinstance(message, protocol.AttachRing):
            self._attach(message, packet, self._pipeline)
        else:
            raise channel.unexpected(message, "model")
        return True

    def _load(self, message: protocol.LoadModel, packet: protocol.Packet) -> None:
        if self._pipeline is not None:
            raise AgentError(Reason.BAD_MESSAGE, "a model worker loads one model")
        fds = packet.take(2 if len(packet.fds) == 2 else 1)
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
            channel.adopt_orphans()  # what a library starts and detaches is still its doing
            with probing(message.delegate[:40]):
                delegate = load()
            if message.format not in delegate.formats:
                raise ModelError(
                    Reason.UNKNOWN_FORMAT,
                    f"{delegate.name} does not run {message.format[:20]!r}",
                    hint=f"it runs {', '.join(sorted(delegate.formats))}",
                )
            with probing(delegate.name):
                options = parse_options(message.threads, message.options, *fds[1:])
                session = delegate.load(fds[0], message.format, options)
            pipeline = Pipeline(session, graph, inputs, outputs)
            if graph.task != "raw":
                pipeline.blank()  # a declaration that does not fit must fail now, not on the first frame
        finally:
            for fd in fds:
                os.close(fd)
        self._pipeline, self._graph = pipeline, graph
        kept = session.compiled
        self._link.send(
            protocol.ModelLoaded(
                session.actual,
                round(session.coverage, 4),
                round((time.perf_counter_ns() - started) / 1e6, 3),
                rss_bytes(),
                delegate.runtime,
                delegate.driver,
                "" if kept is None else "imported" if kept.imported else "fresh",
                [spec.to_json() for spec in pipeline.inputs],
                [spec.to_json() for spec in pipeline.outputs],
            )
        )

    def _run_golden(
        self, message: protocol.RunGolden, packet: protocol.Packet, pipeline: Pipeline, graph: Graph
    ) -> None:
        (fd,) = packet.take(1)
        vectors = golden.load_vectors(_read_all(fd, golden.MAX_GOLDEN_BYTES))
        tolerance = golden.parse_tolerance(message.tolerance)
        worst = golden.check(pipeline, graph, message.component, vectors, tolerance)
        self._atol = tolerance.atol[message.component]
        self._sample = vectors[0].image
        self._link.send(protocol.GoldenPassed(len(vectors), round(worst, 4)))

    def _measure(self, message: protocol.Measure, pipeline: Pipeline) -> None:
        if not (0 <= message.warmups <= MAX_RUNS and 0 <= message.runs <= MAX_RUNS):
            raise AgentError(Reason.BAD_MESSAGE, f"{message.warmups} warm-ups and {message.runs} runs")
        if self._measurement is None and message.runs:
            once = self._whole_run(pipeline)
            self._measurement = Measurement(once, lambda: pipeline.last, pipeline.outputs, self._atol)
        timed = self._measurement if message.runs else None  # no runs: only whether it answers
        found = timed.runs(message.warmups, message.runs) if timed is not None else Timed([], [], [], 0)
        self._link.send(
            protocol.Measured(found.runs_ns, found.cpu_ns, found.waited_ns, rss_bytes(), found.least_rss_bytes)
        )

    def _whole_run(self, pipeline: Pipeline) -> Callable[[], object]:
        """What one frame costs: on a golden picture, a blank one, or without one for a model that takes none."""
        try:
            blank = pipeline.blank()
        except ModelError:
            return pipeline.infer
        frame = blank if self._sample is None else decode_frame(self._sample)
        return lambda: pipeline.run(frame)

    def _run_image(self, packet: protocol.Packet, pipeline: Pipeline) -> None:
        (fd,) = packet.take(1)
        arrived = time.monotonic_ns()
        frame = decode_frame(_read_all(fd, MAX_IMAGE_BYTES))
        started = time.monotonic_ns()
        self._link.send(_result(0, arrived, started, pipeline.run(frame)))

    def _export(self, pipeline: Pipeline) -> None:
        if pipeline.session.compiled is None:
            raise ModelError(Reason.MODEL_UNLOADABLE, "this runtime makes nothing of a model that could be kept")
        fd = pipeline.session.compiled.export()
        try:
            self._link.send(protocol.Exported(os.fstat(fd).st_size), (fd,))
        finally:
            os.close(fd)

    def _attach(self, message: protocol.AttachRing, packet: protocol.Packet, pipeline: Pipeline) -> None:
        if self._reader is not None:
            raise AgentError(Reason.BAD_MESSAGE, "a ring is attached already")
        started = time.perf_counter_ns()
        ring_fd, notices_fd = packet.take(2)
        try:
            reader = RingReader(message, ring_fd, notices_fd, self._join)
        except AgentError:
            os.close(notices_fd)
            raise
        finally:
            os.close(ring_fd)
        try:
            pipeline.run(reader.blank())
            self._watch = None if self._wish is None else Watch(self._link, self._wish, message.shape)
        except AgentError:
            reader.close()
            raise
        self._reader = reader
        self._link.send(protocol.RingAttached(round((time.perf_counter_ns() - started) / 1e6, 3)))
        if not reader.ask():
            self._finish(reader)


def _result(seq: int, t_frame_ns: int, started_ns: int, answer: Answer) -> protocol.Result:
    stages = (started_ns - t_frame_ns, answer.preprocess_ns, answer.inference_ns, answer.postprocess_ns)
    items = [item.to_json() for item in answer.items]
    return protocol.Result(seq, t_frame_ns, time.monotonic_ns(), [max(0, stage) // 1000 for stage in stages], items)


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
