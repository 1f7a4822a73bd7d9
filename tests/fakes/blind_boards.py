"""Four delegates as boards' drivers really fail, written without sight of the code that detects misbehaviour.

The author had the protocols of `agent/worker/delegates`, the list of reasons and the registration of fakes, and nothing
of how a trial measures or judges. A fake that is not found says something about the trial, so none is changed to be
found. Each has right arithmetic: LiteRT computes the answer to an input once, and it is remembered, so that repeated
inputs cost as little CPU time as with real hardware. A run takes 6 ms, asleep.

- `boards-accumulator:npu`: the compiler chose 16-bit accumulators. Where the picture is bright enough (every patch of
  8 x 8 pixels with a mean of 230 or more of 255) they overflow, and the scores of that cell come out with the top bit
  flipped. Everything else is exact, every time. Should be: `golden_mismatch`.
- `boards-completion:npu`: every run starts a thread that waits for the completion interrupt, gets it, and then parks
  for ever in a queue that nobody reads. Answers are exact, no descriptor leaks, and memory grows by some KiB a run.
  Should be: `delegate_leaks`.
- `boards-padding:npu`: the border around the feature map is allocated and never cleared. Every 12th run gets pages that
  another job left dirty, and the outermost cells of every map are noise, another one each time; the inner cells are
  exact. Should be: `delegate_unsteady`, or `golden_mismatch` where a dirty run is one that is compared.
- `boards-fence:npu`: the driver has 48 fences and never returns one. The run after the last waits inside the library,
  with the interpreter lock held and all signals blocked in that thread. Should be: `worker_hung`.
"""

from __future__ import annotations

import ctypes
import queue
import signal
import threading
import time

import numpy as np

from agent.worker.delegates import Delegate, DelegateLoader, Options, Session
from agent.worker.tensor import Array, TensorSpec
from tests.fakes.delegates import Expected

RUN_S = 0.006
CELL = 8
BRIGHT = 230
DIRTY_EVERY = 12
FENCES = 48
STACK = 256 << 10


class _Board:
    """A driver without a fault, which the faulty ones derive from."""

    compiled = None

    def __init__(self, name: str, inner: Session) -> None:
        self._inner = inner
        self.inputs: tuple[TensorSpec, ...] = inner.inputs
        self.outputs: tuple[TensorSpec, ...] = inner.outputs
        self.tensors: tuple[Array, ...] = inner.tensors
        self.actual = name
        self.coverage = 1.0
        self.runs = 0
        self._known: dict[tuple[int, ...], tuple[Array, ...]] = {}

    def run(self) -> tuple[Array, ...]:
        self.runs += 1
        self.before()
        key = tuple(hash(tensor.tobytes()) for tensor in self.tensors)
        if key not in self._known:
            if len(self._known) == 256:
                self._known.clear()
            self._known[key] = tuple(output.copy() for output in self._inner.run())
        time.sleep(RUN_S)
        return self.after(tuple(output.copy() for output in self._known[key]))

    def before(self) -> None:
        """What the driver does when a job is queued."""

    def after(self, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """What the driver makes of the right answer."""
        return outputs


class _Accumulator(_Board):
    def after(self, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        picture = self.tensors[0]
        _, height, width, _ = picture.shape
        rows, columns = height // CELL, width // CELL
        patches = picture[0, : rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL, -1)
        levels = patches.mean(axis=(1, 3, 4), dtype=np.float32)
        overflown = levels + 128 >= BRIGHT
        scores = outputs[-1]
        if scores.shape[1:3] == overflown.shape:
            scores[0][overflown] ^= np.int8(-128)
        elif overflown.any():
            scores ^= np.int8(-128)
        return outputs


class _Completion(_Board):
    def before(self) -> None:
        done = threading.Event()
        nobody: queue.SimpleQueue[None] = queue.SimpleQueue()

        def wait_for_interrupt() -> None:
            done.set()
            nobody.get()

        usual = threading.stack_size(STACK)
        try:
            threading.Thread(target=wait_for_interrupt, name="npu-completion", daemon=True).start()
        finally:
            threading.stack_size(usual)
        done.wait()


class _Padding(_Board):
    def after(self, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        if self.runs % DIRTY_EVERY:
            return outputs
        noise = np.random.default_rng()
        for output in outputs:
            border = np.zeros(output.shape, bool)
            if output.ndim == 4:
                border[:, [0, -1]] = True
                border[:, :, [0, -1]] = True
            else:
                border[..., -1] = True
            output[border] = noise.integers(-128, 128, int(border.sum()), np.int8)
        return outputs


class _Fence(_Board):
    def before(self) -> None:
        if self.runs > FENCES:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            library = ctypes.PyDLL(None)  # unlike CDLL it keeps the interpreter lock
            while True:
                library.pause()


class _Driver:
    """A delegate whose sessions are of the class given."""

    runtime = "boardrt 2.4.1"
    driver = "board-npu 1.8.0"
    formats = frozenset({"tflite"})

    def __init__(self, name: str, kind: type[_Board]) -> None:
        from agent.worker.delegates.litert import LiteRT

        self.name = name
        self._kind = kind
        self._litert = LiteRT("litert:xnnpack")

    def load(self, fd: int, format: str, options: Options) -> Session:
        return self._kind(self.name, self._litert.load(fd, format, Options(threads=1)))


def _loader(name: str, kind: type[_Board]) -> DelegateLoader:
    def load() -> Delegate:
        return _Driver(name, kind)

    return load


_KINDS: dict[str, type[_Board]] = {
    "boards-accumulator:npu": _Accumulator,
    "boards-completion:npu": _Completion,
    "boards-padding:npu": _Padding,
    "boards-fence:npu": _Fence,
}

FAKES: dict[str, DelegateLoader] = {name: _loader(name, kind) for name, kind in _KINDS.items()}

_ANY = ("golden", "measure", "judge")
EXPECTED: dict[str, Expected] = {
    "boards-accumulator:npu": Expected("golden_mismatch", _ANY),
    "boards-completion:npu": Expected("delegate_leaks", _ANY),
    "boards-padding:npu": Expected(("delegate_unsteady", "golden_mismatch"), _ANY),
    "boards-fence:npu": Expected("worker_hung", _ANY),
}
