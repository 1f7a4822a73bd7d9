"""Windows of the simulated machines in fixed sets, and the tensors that a device makes of them.

Each window is named by its part, machine, state and number, and comes out the same every time. Preprocessing is the
device's own (`agent.worker.signal`), so that nothing is trained or measured on other numbers than a worker sees.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.worker.signal import SignalPlan
from agent.worker.signalgraph import parse_signal
from agent.worker.tensor import TensorSpec
from models.vibration import machine

SEVERITIES = (0.4, 3.0)


@dataclass(frozen=True, slots=True)
class Window:
    """One recording and what is true of it."""

    unit: int
    state: machine.State
    samples: machine.Samples


def windows(part: str, fault: str, each: int, loads: tuple[float, float]) -> Iterator[Window]:
    """`each` windows of every machine of a part, load uniform in `loads`, severity log-uniform in `SEVERITIES`."""
    first, number = machine.MACHINES[part]
    for unit in range(first, first + number):
        described = machine.machine(unit)
        for index in range(each):
            seed = zlib.crc32(f"{part} {fault} {unit} {index}".encode())
            rng = np.random.default_rng([seed, 3])
            severity = math.exp(rng.uniform(*map(math.log, SEVERITIES)))
            state = machine.State(rng.uniform(*loads), fault, 0.0 if fault == machine.HEALTHY else severity)
            yield Window(unit, state, machine.record(described, state, seed))


class Tensors:
    """The input tensor of windows, as a declaration makes it; float32 [values], not clipped."""

    def __init__(self, preprocess: Mapping[str, Any]) -> None:
        declared = parse_signal(preprocess)
        spec = TensorSpec("x", "float32", (declared.values,))
        self.values = declared.values
        self._tensor = spec.empty()
        self._plan = SignalPlan(declared, spec, self._tensor, (declared.window, declared.channels))

    def __call__(self, samples: machine.Samples) -> NDArray[np.float32]:
        self._plan.run(samples)
        return np.array(self._tensor)
