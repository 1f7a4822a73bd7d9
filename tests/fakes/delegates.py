"""Delegates that fail or pretend, each in one way, and healthy ones with habits that look suspicious.

How a fake is registered, here and in every file `tests/fakes/blind_*.py`: the file has

- `FAKES: dict[str, DelegateLoader]`: by delegate name, what imports the "runtime" and returns the delegate. A name that
  ends in `:npu` is hardware to the agent; `:cpu` would be the processor itself.
- `EXPECTED: dict[str, Expected]`: by the same names, the reason and the stage (`load`, `golden`, `measure`, `judge`) of
  the verdict that a trial must reach; `HEALTHY` for one that must pass.

Such a file is loaded into real workers by `tests/fakes/entry.py` and tried by `tests/agent/daemon/test_detector.py`
beside the real delegates, on the shipped line `parts` (a TFLite detector, int8 in and out), with a load limit of 8 s,
a compile limit of 25 s, a run limit of 6 s, a budget of p95 250 ms, and 1 GiB of heap. The test imports
the module too, so nothing may happen on import. `Beneath` gives right answers at hardly any CPU time.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.errors import ModelError, Reason
from agent.worker.delegates import Delegate, DelegateLoader, Options


@dataclass(frozen=True)
class Expected:
    """What a trial must say; a tuple where the kernel decides which of several comes first."""

    reason: str | tuple[str, ...]
    stage: str | tuple[str, ...]


HEALTHY = Expected("", "")


class Beneath:
    """A LiteRT session that computes each answer once and then knows it, as hardware would: without the processor."""

    actual = ""
    coverage = 1.0
    compiled = None

    def __init__(self, fd: int, options: Options, *, name: str, plain: bool = False) -> None:
        from agent.worker.delegates.litert import LiteRT

        self.session = LiteRT("litert:cpu" if plain else "litert:xnnpack").load(fd, "tflite", options)
        self.inputs, self.outputs, self.tensors = self.session.inputs, self.session.outputs, self.session.tensors
        self.actual = name
        self.known: dict[bytes, tuple[Any, ...]] = {}
        self.count = 0

    def compute(self) -> tuple[Any, ...]:
        """The answer, computed now."""
        return tuple(output.copy() for output in self.session.run())

    def answer(self) -> tuple[Any, ...]:
        """The right answer to what the inputs hold."""
        key = b"".join(tensor.tobytes() for tensor in self.tensors)
        if key not in self.known:
            self.known[key] = self.compute()
        return self.known[key]

    def run(self) -> tuple[Any, ...]:
        """See `Session.run`."""
        self.count += 1
        return self.answer()


class Fake:
    """A delegate whose sessions are `session(fd, options, name=…)`."""

    runtime = "fake 1.0"
    driver = ""
    formats = frozenset({"tflite"})

    def __init__(self, name: str, session: Callable[..., Any]) -> None:
        self.name = name
        self._session = session

    def load(self, fd: int, format: str, options: Options) -> Any:
        """See `Delegate.load`."""
        return self._session(fd, options, name=self.name)


def loader(name: str, session: Callable[..., Any]) -> DelegateLoader:
    """What FAKES holds for a fake that differs in its session."""

    def load() -> Delegate:
        return Fake(name, session)

    return load


# --- at the door -----------------------------------------------------------------------------------------------------


def absent() -> Delegate:
    """Its library is not installed."""
    raise ModelError(Reason.RUNTIME_MISSING, "libfakenpu.so.1 is not there")


def broken_library() -> Delegate:
    """Its library is there and its driver is not."""
    raise OSError(errno.ENXIO, "No such device or address", "/dev/fakenpu0")


def old_firmware(fd: int, options: Options, *, name: str) -> Any:
    """The vendor's library raises an exception of its own."""
    raise RuntimeError("firmware 3.1 or later is needed\n  at npu_open+0x40")


def open_elsewhere(fd: int, options: Options, *, name: str) -> Any:
    """Somebody else has the device open."""
    raise OSError(errno.EBUSY, "Device or resource busy", "/dev/fakenpu0")


def hangs_at_load(fd: int, options: Options, *, name: str) -> Any:
    """Waits for firmware that does not answer."""
    time.sleep(3600)


def crashes_at_load(fd: int, options: Options, *, name: str) -> Any:
    """Its library has a wild pointer."""
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def takes_all_memory(fd: int, options: Options, *, name: str) -> Any:
    """Wants 20 GB for its buffers."""
    return np.ones(20 << 30, np.uint8)


class CompilesLong(Beneath):
    """Ready after longer than a load may take."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name=name)
        time.sleep(9.5)


# --- at work ---------------------------------------------------------------------------------------------------------


class Wrong(Beneath):
    """Computes something else."""

    def run(self) -> tuple[Any, ...]:
        return tuple(np.roll(output, 1, axis=-1) for output in super().run())


class NotANumber(Beneath):
    """Half precision overflowed."""

    def run(self) -> tuple[Any, ...]:
        return tuple(np.full(output.shape, np.nan, np.float32) for output in super().run())


class HangsAtRun(Beneath):
    """Loads, and never answers."""

    def run(self) -> tuple[Any, ...]:
        time.sleep(3600)
        return ()


class HangsLater(Beneath):
    """Answers for a while."""

    def run(self) -> tuple[Any, ...]:
        if self.count >= 20:
            time.sleep(3600)
        return super().run()


class CrashesAtRun(Beneath):
    """The driver ends the process."""

    def run(self) -> tuple[Any, ...]:
        os.abort()


class OnlyOnTheProcessor(Beneath):
    """Says that it is hardware and hands everything to the processor."""

    def run(self) -> tuple[Any, ...]:
        return self.compute()


class OnTheSlowKernels(OnlyOnTheProcessor):
    """The same, on kernels that are slower than those that the processor would be used with."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name=name, plain=True)


class SaysSo(Beneath):
    """Says itself that another delegate runs."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name="litert:cpu")


class Partly(Beneath):
    """Leaves four nodes in ten to the processor."""

    coverage = 0.6


class Slow(Beneath):
    """Right, and much slower than its publisher promised."""

    def run(self) -> tuple[Any, ...]:
        time.sleep(0.3)
        return super().run()


class Leaks(Beneath):
    """Keeps a buffer of every run."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name=name)
        self._kept: list[Any] = []

    def run(self) -> tuple[Any, ...]:
        self._kept.append(np.ones(256 * 1024, np.uint8))
        return super().run()


class TurnsWrong(Beneath):
    """Right until it is warm."""

    def run(self) -> tuple[Any, ...]:
        answer = super().run()
        return answer if self.count < 24 else tuple(np.roll(output, 1, axis=-1) for output in answer)


class NowAndThenWrong(Beneath):
    """One answer in seven is another one's."""

    def run(self) -> tuple[Any, ...]:
        answer = super().run()
        return answer if self.count < 16 or self.count % 7 else tuple(np.roll(o, 1, axis=-1) for o in answer)


class EndsItsFirstOwner(Beneath):
    """A second opener aborts the first, as on a USB stick that one process alone may have."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name=name)
        owner = owner_file(os.getppid())
        try:
            with open(owner, encoding="ascii") as file:
                os.kill(int(file.read()), signal.SIGABRT)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            pass  # it is the first
        with open(owner, "w", encoding="ascii") as file:
            file.write(str(os.getpid()))


def owner_file(host: int) -> str:
    """Where the process that has the stick open is written down, for the workers of one host."""
    return f"/tmp/edge-fake-stick-{host}"


# --- healthy, with habits --------------------------------------------------------------------------------------------


class Sleeps(Beneath):
    """Waits for its hardware as it should."""

    def run(self) -> tuple[Any, ...]:
        time.sleep(0.002)
        return super().run()


class Spins(Beneath):
    """Its driver waits by spinning, and the hardware is faster than the processor."""

    def run(self) -> tuple[Any, ...]:
        until = time.perf_counter_ns() + 20_000
        while time.perf_counter_ns() < until:
            pass
        return super().run()


class WarmsUp(Beneath):
    """Its first run takes long, and its buffers grow over the first runs."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name=name)
        self._pools: list[Any] = []

    def run(self) -> tuple[Any, ...]:
        if self.count == 0:
            time.sleep(0.3)
        if len(self._pools) < 12:
            self._pools.append(np.ones(1 << 20, np.uint8))
        return super().run()


class Jitters(Beneath):
    """The last bit of its answers is not always the same, and 95 of 100 nodes run on it."""

    coverage = 0.95

    def run(self) -> tuple[Any, ...]:
        return tuple(
            np.clip(output.astype(np.int16) + self.count % 2, -128, 127).astype(output.dtype)
            for output in super().run()
        )


class Saws(Beneath):
    """Memory grows for some runs and is given back."""

    def __init__(self, fd: int, options: Options, *, name: str) -> None:
        super().__init__(fd, options, name=name)
        self._kept: list[Any] = []

    def run(self) -> tuple[Any, ...]:
        self._kept.append(np.ones(1 << 20, np.uint8))
        if len(self._kept) > 9:
            self._kept.clear()
        return super().run()


FAKES: dict[str, DelegateLoader] = {
    "absent:npu": absent,
    "broken:npu": broken_library,
    **{
        name: loader(name, session)
        for name, session in {
            "firmware:npu": old_firmware,
            "elsewhere:npu": open_elsewhere,
            "hangs:npu": hangs_at_load,
            "crashes:npu": crashes_at_load,
            "hoards:npu": takes_all_memory,
            "compiles:npu": CompilesLong,
            "wrong:npu": Wrong,
            "nan:npu": NotANumber,
            "hangsrun:npu": HangsAtRun,
            "hangslater:npu": HangsLater,
            "crashesrun:npu": CrashesAtRun,
            "quiet:npu": OnlyOnTheProcessor,
            "quietslow:npu": OnTheSlowKernels,
            "sayscpu:npu": SaysSo,
            "partly:npu": Partly,
            "slow:npu": Slow,
            "leaks:npu": Leaks,
            "turns:npu": TurnsWrong,
            "nowandthen:npu": NowAndThenWrong,
            "stick:npu": EndsItsFirstOwner,
            "sleeps:npu": Sleeps,
            "spins:npu": Spins,
            "warms:npu": WarmsUp,
            "jitters:npu": Jitters,
            "saws:npu": Saws,
        }.items()
    },
}
EXPECTED: dict[str, Expected] = {
    "absent:npu": Expected("runtime_missing", "load"),
    "broken:npu": Expected("delegate_broken", "load"),
    "firmware:npu": Expected("delegate_broken", "load"),
    "elsewhere:npu": Expected("delegate_busy", "load"),
    "hangs:npu": Expected("worker_hung", "load"),
    "crashes:npu": Expected("worker_crashed", "load"),
    "hoards:npu": Expected("worker_out_of_memory", "load"),
    "compiles:npu": HEALTHY,
    "wrong:npu": Expected("golden_mismatch", "golden"),
    "nan:npu": Expected("output_not_finite", "golden"),
    "hangsrun:npu": Expected("worker_hung", "golden"),
    "hangslater:npu": Expected("worker_hung", ("golden", "measure")),
    "crashesrun:npu": Expected("worker_crashed", "golden"),
    "quiet:npu": Expected("delegate_fell_back", "judge"),
    "quietslow:npu": Expected("delegate_fell_back", "judge"),
    "sayscpu:npu": Expected("delegate_fell_back", "load"),
    "partly:npu": Expected("delegate_partial", "load"),
    "slow:npu": Expected("over_budget", "judge"),
    "leaks:npu": Expected("delegate_leaks", "judge"),
    "turns:npu": Expected("delegate_unsteady", ("measure", "golden")),
    "nowandthen:npu": Expected("delegate_unsteady", ("measure", "golden")),
    "stick:npu": HEALTHY,
    "sleeps:npu": HEALTHY,
    "spins:npu": HEALTHY,
    "warms:npu": HEALTHY,
    "jitters:npu": HEALTHY,
    "saws:npu": HEALTHY,
}
