"""Four delegates whose drivers fail between runs rather than in them, written without sight of the code that finds out.

Each loads, names its hardware, takes the whole graph, leaves no descriptor or thread behind and gives right answers to
the first inputs. The arithmetic is LiteRT's; an answer is computed once and then known, and a run sleeps 4 ms.

- `drivers-spill:npu`: the pool of contiguous memory is too small for the double buffers, so 5 jobs of every 12 find no
  room. The runtime hands such a job, without a word, to a process of its own that runs the plain kernels on the
  processor and ends with the job. It is detached, so the caller is never charged for it, and most runs (their median
  too) are the hardware's. On average it takes about as much of the processor as the processor's own path, or more.
  Should be: `delegate_fell_back`, or `delegate_partial`, as it is for some of the work.
- `drivers-retention:npu`: power management switches the block off when no job came for 150 ms, and one bank of weight
  memory has no retention. The first job after such a pause is computed with zeros there, and half of the channels come
  out flat; that reloads the weights, and the next job is right. Back to back nothing is ever wrong; a camera at five
  pictures a second gets nothing else. Should be: `delegate_unsteady`, or `golden_mismatch` where a pause came before an
  input that is compared.
- `drivers-drift:npu`: the array computes in analog and warms up, and the driver calibrates it at load alone. All
  outputs sink by one step per 4 runs. No answer differs by more than a step from that of a run just before, and the
  first ones are as good as exact; after 100 runs it is 25 steps, after a minute of video nothing is found any more.
  Should be: `delegate_unsteady`, or `golden_mismatch` where late runs are compared.
- `drivers-mappings:npu`: every job maps its four command buffers into the process and unmaps none. The pages are the
  device's and never touched here, so neither resident memory nor heap nor descriptors grow; only the list of mappings
  does, and at the kernel's usual limit of 65530 the process dies, in some minutes of video. Should be:
  `delegate_leaks`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from typing import Any, cast

import numpy as np

from agent.worker.delegates import Delegate, DelegateLoader, Options, Session
from tests.fakes.delegates import Beneath, Expected

RUNTIME = "corert 3.0.2"
RUN_S = 0.004
PERIOD = 12
SPILLED = 5
RETENTION_S = 0.15
STEP_EVERY = 4
BUFFERS = 4
BUFFER = 64 << 10


class Spill(Beneath):
    """The last `SPILLED` runs of every `PERIOD` are the processor's, in a process that lives for one run."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, Options(threads=1), name=name, plain=True)
        self._results = tuple(_shared(spec) for spec in self.outputs)

    def run(self) -> tuple[Any, ...]:
        """See `Session.run`."""
        self.count += 1
        if (self.count - 1) % PERIOD >= PERIOD - SPILLED:
            return self._spilled()
        time.sleep(RUN_S)
        return self.answer()

    def _spilled(self) -> tuple[Any, ...]:
        from agent.worker.delegates.model import refused

        done, mine = os.pipe()
        try:
            child = os.fork()
        except OSError as e:
            os.close(done)
            os.close(mine)
            raise refused(RUNTIME, RuntimeError(f"cannot queue a job: {e.strerror}")) from e
        if child == 0:
            self._detached(mine)
        os.close(mine)
        os.waitpid(child, 0)
        finished = os.read(done, 1)
        os.close(done)
        if not finished:
            raise refused(RUNTIME, RuntimeError("a job was lost"))
        return tuple(result.copy() for result in self._results)

    def _detached(self, done: int) -> None:
        """Compute what the inputs held at the fork, and end. Nothing of the caller's is kept open meanwhile."""
        try:
            os.setsid()
            if os.fork() == 0:
                _close_but(done)
                for shared, output in zip(self._results, self.session.run(), strict=True):
                    shared[...] = output
                os.write(done, b"+")
        finally:
            os._exit(0)


class Retention(Beneath):
    """Wrong after a pause of `RETENTION_S`, once."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name=name)
        self._ended: float | None = None

    def run(self) -> tuple[Any, ...]:
        """See `Session.run`."""
        lost = self._ended is not None and time.monotonic() - self._ended >= RETENTION_S
        answer = super().run()
        time.sleep(RUN_S)
        if lost:
            answer = tuple(output.copy() for output in answer)
            for spec, output in zip(self.outputs, answer, strict=True):
                output[..., : max(1, output.shape[-1] // 2)] = spec.zero_point or 0
        self._ended = time.monotonic()
        return answer


class Drift(Beneath):
    """Sinks by a step per `STEP_EVERY` runs."""

    def run(self) -> tuple[Any, ...]:
        """See `Session.run`."""
        steps = self.count // STEP_EVERY
        answer = super().run()
        time.sleep(RUN_S)
        return tuple(_lowered(output, steps) for output in answer)


class Mappings(Beneath):
    """Leaves `BUFFERS` mappings per run."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name=name)
        self._mapped: list[mmap.mmap] = []

    def run(self) -> tuple[Any, ...]:
        """See `Session.run`."""
        self._mapped.extend(mmap.mmap(-1, BUFFER) for _ in range(BUFFERS))  # shared ones, which are never merged
        time.sleep(RUN_S)
        return super().run()


def _shared(spec: Any) -> Any:
    """A zeroed array of `spec` that a fork shares."""
    like = spec.empty()
    return np.frombuffer(mmap.mmap(-1, max(like.nbytes, 1)), like.dtype, like.size).reshape(spec.shape)


def _close_but(kept: int) -> None:
    """Hold none of the caller's descriptors."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed them
            if int(name) != kept:
                os.close(int(name))


def _lowered(output: Any, steps: int) -> Any:
    """`output` less `steps` of its quantisation."""
    limits = np.iinfo(output.dtype)
    return np.clip(output.astype(np.int64) - steps, limits.min, limits.max).astype(output.dtype)


class Driver:
    """A runtime with a device, as it describes itself."""

    runtime = RUNTIME
    driver = "core-npu 5.15.148"
    formats = frozenset({"tflite"})

    def __init__(self, name: str, session: type[Any]) -> None:
        self.name = name
        self._session = session

    def load(self, fd: int, format: str, options: Options) -> Session:
        """See `Delegate.load`."""
        return cast(Session, self._session(fd, options, name=self.name))


def _loader(name: str, session: type[Any]) -> DelegateLoader:
    def load() -> Delegate:
        return Driver(name, session)

    return load


_SESSIONS: dict[str, type[Any]] = {
    "drivers-spill:npu": Spill,
    "drivers-retention:npu": Retention,
    "drivers-drift:npu": Drift,
    "drivers-mappings:npu": Mappings,
}
FAKES: dict[str, DelegateLoader] = {name: _loader(name, session) for name, session in _SESSIONS.items()}

_LATER = ("golden", "measure", "judge")
EXPECTED: dict[str, Expected] = {
    "drivers-spill:npu": Expected(("delegate_fell_back", "delegate_partial"), ("measure", "judge")),
    "drivers-retention:npu": Expected(("delegate_unsteady", "golden_mismatch"), _LATER),
    "drivers-drift:npu": Expected(("delegate_unsteady", "golden_mismatch"), _LATER),
    "drivers-mappings:npu": Expected("delegate_leaks", _LATER),
}
