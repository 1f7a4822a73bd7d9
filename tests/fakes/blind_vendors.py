"""Four drivers as vendors ship them, written without sight of what finds them out.

Each is quiet: it loads, names its hardware, takes the whole graph, and answers the first pictures rightly.

- `blindlag:npu`: after 16 submissions the driver takes the stream for a video and replays its command list with two
  buffers, but waits for the wrong one: from then on each answer belongs to the input before. Boxes trail the picture by
  a frame, and the last frame of a burst is never answered. To be refused for its answers, whenever they differ.
- `blindserver:npu`: the runtime starts a server that owns the device, detached from the caller as such servers are. It
  finds no firmware, runs the reference kernels on the processor, and reports the device's name all the same. The
  caller is idle meanwhile. To be refused as a fall-back: it costs more processor than the processor's own path, and
  takes it from whatever else the board does.
- `blindcap:npu`: sums are kept in 16 bits that saturate, so no score passes 0.75. What is found, where, and as what
  stays right, and an evening picture hardly differs; only sure detections lose their certainty, and a rule that asks
  for 0.8 never fires. To be refused for its answers to the golden pictures.
- `blindfence:npu`: each submission leaves a fence open, one file descriptor and no memory to speak of. At the usual
  limit of 1024 it dies within a minute of video. To be refused as leaking, or because the descriptors ran out first.

Expected reasons follow from that: what a person has to be told, not how it is found.
"""

from __future__ import annotations

import mmap
import os
import select
from typing import Any

import numpy as np

from agent.worker.delegates import Delegate, DelegateLoader, Options, Session
from tests.fakes.delegates import Beneath, Expected

RUNTIME = "vendornpu 2.1.0"
BURST = 16
CAP = 0.75
IDLE_S = 120.0


class Lag(Beneath):
    """Right for `BURST` runs, then one input late."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name=name)
        self.finished: tuple[Any, ...] = ()

    def run(self) -> tuple[Any, ...]:
        """See `Session.run`."""
        self.count += 1
        before, self.finished = self.finished, self.answer()
        return before if self.count > BURST else self.finished


class Cap(Beneath):
    """Probabilities saturate at `CAP`; other outputs are right."""

    def compute(self) -> tuple[Any, ...]:
        """The answer, with every output whose steps are probabilities cut off."""
        return tuple(
            np.minimum(values, round(CAP / spec.scale) + (spec.zero_point or 0)).astype(values.dtype)
            if spec.scale is not None and spec.scale <= 1 / 255
            else values
            for spec, values in zip(self.outputs, super().compute(), strict=True)
        )


class Fence(Beneath):
    """Leaves one descriptor open per run."""

    def run(self) -> tuple[Any, ...]:
        """See `Session.run`."""
        from agent.worker.delegates.model import refused

        try:
            os.eventfd(0)
        except OSError as e:
            raise refused(RUNTIME, RuntimeError(f"cannot create a fence: {e.strerror}")) from e
        return super().run()


class Server:
    """A session whose work a detached process does, on the processor. Buffers are shared; pipes say when."""

    coverage = 1.0
    compiled = None

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        from agent.worker.delegates.litert import LiteRT
        from agent.worker.delegates.model import refused

        kernels = LiteRT("litert:cpu")
        described = kernels.load(fd, "tflite", options)
        self.inputs, self.outputs, self.actual = described.inputs, described.outputs, name
        self.tensors = tuple(_shared(spec) for spec in self.inputs)
        self._results = tuple(_shared(spec) for spec in self.outputs)
        asked, self._ask = os.pipe()
        self._done, done = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                if os.fork() == 0:
                    _close_but(asked, done, fd)
                    self._serve(kernels, fd, options, asked, done)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(asked)
        os.close(done)
        if os.read(self._done, 1) != b"+":
            raise refused(RUNTIME, RuntimeError("the server does not start"))

    def _serve(self, kernels: Any, fd: int, options: Options, asked: int, done: int) -> None:
        """Answer until the caller is gone, or silent for `IDLE_S`."""
        session = kernels.load(fd, "tflite", options)
        os.write(done, b"+")
        while select.select([asked], [], [], IDLE_S)[0] and os.read(asked, 1):
            for mine, theirs in zip(session.tensors, self.tensors, strict=True):
                mine[...] = theirs
            for theirs, mine in zip(self._results, session.run(), strict=True):
                theirs[...] = mine
            os.write(done, b"+")

    def run(self) -> tuple[Any, ...]:
        """See `Session.run`."""
        from agent.worker.delegates.model import refused

        try:
            os.write(self._ask, b"?")
        except OSError as e:
            raise refused(RUNTIME, RuntimeError("the server is gone")) from e
        if os.read(self._done, 1) != b"+":
            raise refused(RUNTIME, RuntimeError("the server is gone"))
        return self._results

    def __del__(self) -> None:
        """Let the server end."""
        for end in ("_ask", "_done"):
            if end in self.__dict__:
                os.close(self.__dict__.pop(end))


def _shared(spec: Any) -> Any:
    """A zeroed array of `spec` that a fork shares."""
    like = spec.empty()
    return np.frombuffer(mmap.mmap(-1, max(like.nbytes, 1)), like.dtype, like.size).reshape(spec.shape)


def _close_but(*kept: int) -> None:
    """Hold none of the caller's descriptors, its channel and its standard streams least of all."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:  # the one that listed them
                continue


class Vendor:
    """A runtime with a device, as it describes itself."""

    runtime = RUNTIME
    driver = "vnpu 6.4.11"
    formats = frozenset({"tflite"})

    def __init__(self, name: str, session: type[Any]) -> None:
        self.name = name
        self._session = session

    def load(self, fd: int, format: str, options: Options) -> Session:
        """See `Delegate.load`."""
        loaded: Session = self._session(fd, options, name=self.name)
        return loaded


def _loader(name: str, session: type[Any]) -> DelegateLoader:
    def load() -> Delegate:
        return Vendor(name, session)

    return load


_SESSIONS: dict[str, type[Any]] = {
    "blindlag:npu": Lag,
    "blindserver:npu": Server,
    "blindcap:npu": Cap,
    "blindfence:npu": Fence,
}
FAKES: dict[str, DelegateLoader] = {name: _loader(name, session) for name, session in _SESSIONS.items()}

EXPECTED: dict[str, Expected] = {
    "blindlag:npu": Expected(("golden_mismatch", "delegate_unsteady"), ("golden", "measure", "judge")),
    "blindserver:npu": Expected("delegate_fell_back", ("measure", "judge")),
    "blindcap:npu": Expected("golden_mismatch", "golden"),
    "blindfence:npu": Expected(("delegate_leaks", "model_unloadable"), ("measure", "judge")),
}
