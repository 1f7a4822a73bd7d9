"""A simulated rotating machine with a 3-axis accelerometer on its bearing housing, healthy or with one of five faults.

What it is: the line's data, all of it. A machine is drawn from a seed (speed, bearing, resonances, levels), a recording
from a machine, an operating point and a second seed, so every sample can be made again. What it is not: a measurement.
No real machine was recorded, and figures on this data say nothing about a real one beyond that the method can work.

Formulas. Unbalance: the centrifugal force m e w^2 (ISO 21940-11), so acceleration at one times the shaft frequency that
grows with its square. Bearing with n rolling elements of diameter d on pitch diameter D at contact angle a, shaft at f:
outer race n/2 f (1 - d/D cos a), inner race n/2 f (1 + d/D cos a); the blows come with a slip of one to two per cent,
those of the inner race are modulated by the shaft's turn through the load zone, and each rings the structure's
resonances (R. B. Randall and J. Antoni, 'Rolling element bearing diagnostics: a tutorial', Mechanical Systems and
Signal Processing 25, 2011, sections 2 and 3). Misalignment: one and two times the shaft frequency, two dominating
radially, with much of it axial; looseness: a long row of harmonics and half harmonics (ISO 13373-3, annexes).
Invariant: training, validation and held-out machines have disjoint seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Samples = NDArray[np.float32]

RATE_HZ = 3200.0
WINDOW = 1024
AXES = 3  # horizontal and vertical across the shaft, then along it
FAULTS = ("unbalance", "misalignment", "looseness", "outer_race", "inner_race")
HEALTHY = "healthy"
MACHINES = {"train": (0, 800), "validation": (1000, 60), "heldout": (2000, 100)}
"""First seed and number of machines of each part."""

_LEAD = 512  # samples before the recording, so that resonances already ring when it begins
_STEP = 0.0383  # m/s^2: one step of a 13-bit sensor over +-16 g
_GRAVITY = 9.81


@dataclass(frozen=True, slots=True)
class Machine:
    """What stays the same about one machine. Amplitudes in m/s^2 at full load and 25 Hz."""

    shaft_hz: float
    harmonics: Array  # [6 orders, 3 axes]
    blades: int
    blade_pass: Array  # [3 axes]
    elements: int
    ratio: float  # d / D cos a
    resonances: Array  # [3 modes, (Hz, damping, gain of each of 3 axes)]
    noise: Array  # [3 axes]
    tilt: Array  # gravity on each axis


@dataclass(frozen=True, slots=True)
class State:
    """An operating point: load 0..1, and a fault of a severity (1 is one that a listener would just hear)."""

    load: float
    fault: str = HEALTHY
    severity: float = 0.0


def machine(seed: int) -> Machine:
    """The machine of that seed."""
    rng = np.random.default_rng([seed, 1])
    orders = np.arange(1, 7)[:, None]
    modes = np.sort(rng.uniform([350, 700, 1050], [650, 1000, 1450]))
    tilt = rng.normal([0.0, 1.0, 0.0], 0.05)
    return Machine(
        shaft_hz=rng.uniform(20, 30),
        harmonics=0.5 * orders**-1.2 * rng.lognormal(0, 0.35, (6, AXES)) * (1, 1, 0.4),
        blades=int(rng.integers(5, 10)),
        blade_pass=0.25 * rng.lognormal(0, 0.3, AXES),
        elements=int(rng.integers(7, 13)),
        ratio=rng.uniform(0.16, 0.30) * np.cos(np.radians(rng.uniform(0, 15))),
        resonances=np.column_stack((modes, rng.uniform(0.02, 0.05, 3), rng.uniform(0.4, 1.2, (3, AXES)))),
        noise=0.12 * rng.lognormal(0, 0.2, AXES),
        tilt=_GRAVITY * tilt / np.linalg.norm(tilt))


def record(unit: Machine, state: State, seed: int, samples: int = WINDOW) -> Samples:
    """A recording, float32 [samples, 3] in m/s^2 at `RATE_HZ`."""
    rng = np.random.default_rng([seed, 2])
    count = samples + _LEAD
    # The speed sinks a little under load, differs from start to start, and wanders slowly.
    shaft_hz = unit.shaft_hz * (1 - 0.02 * state.load) * (1 + rng.normal(0, 0.008))
    wander = 0.002 * np.sin(2 * np.pi * rng.uniform(0.2, 1.0) * np.arange(count) / RATE_HZ + rng.uniform(0, 6.28))
    turns = np.cumsum(shaft_hz * (1 + wander)) / RATE_HZ + rng.uniform()
    push = 0.6 + 0.4 * state.load
    shaken = _rotation(unit, turns, shaft_hz, push, rng)
    if state.fault in ("unbalance", "misalignment", "looseness"):
        shaken += state.severity * _shaft_fault(state.fault, turns, shaft_hz, push, rng)
    struck = rng.normal(0, 1, (count, AXES)) * unit.noise * (0.5 + 0.5 * state.load)
    if state.fault in ("outer_race", "inner_race"):
        blows = _blows(unit, state.fault, turns, rng)
        struck += state.severity * 2.5 * push * blows[:, None] * (1.0, 0.8, 0.3)
    shaken += _ring(unit, struck)
    shaken += unit.tilt + rng.normal(0, 0.03, (count, AXES))
    return (np.round(shaken[_LEAD:] / _STEP) * _STEP).astype(np.float32)


def _rotation(unit: Machine, turns: Array, shaft_hz: float, push: float, rng: np.random.Generator) -> Array:
    """Harmonics of a healthy shaft and its blades passing."""
    shaken = np.zeros((len(turns), AXES))
    for order, amplitudes in enumerate(unit.harmonics, 1):
        grown = (shaft_hz / 25) ** 2 if order == 1 else push
        shaken += _waves(turns, order, amplitudes * grown * rng.normal(1, 0.1, AXES), rng)
    return shaken + _waves(turns, unit.blades, unit.blade_pass * push**2 * rng.normal(1, 0.15, AXES), rng)


def _waves(turns: Array, order: float, amplitudes: Array, rng: np.random.Generator) -> Array:
    return amplitudes * np.sin(2 * np.pi * (order * turns[:, None] + rng.uniform(0, 1, AXES)))


def _shaft_fault(fault: str, turns: Array, shaft_hz: float, push: float, rng: np.random.Generator) -> Array:
    if fault == "unbalance":
        # a turning force: a quarter turn between the radial axes, hardly any of it axial
        grown = (shaft_hz / 25) ** 2
        angle = 2 * np.pi * (turns + rng.uniform())
        return 0.8 * grown * np.column_stack((np.sin(angle), np.cos(angle), 0.1 * np.sin(angle)))
    if fault == "misalignment":
        return push * sum(_waves(turns, order, np.array(size), rng) for order, size in (
            (1, (0.15, 0.15, 0.4)), (2, (0.45, 0.45, 0.4)), (3, (0.15, 0.15, 0.1))))
    rattle = 1 + 0.3 * np.sin(2 * np.pi * (0.5 * turns + rng.uniform()))
    return push * rattle[:, None] * sum(
        _waves(turns, order, 0.12 * order**-0.5 * rng.lognormal(0, 0.3, AXES) * (1, 1, 0.5), rng)
        for order in (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10))


def _blows(unit: Machine, fault: str, turns: Array, rng: np.random.Generator) -> Array:
    """A train of unit blows, [samples]: the force of the rolling elements at the defect."""
    sign = -1 if fault == "outer_race" else 1
    per_turn = unit.elements / 2 * (1 + sign * unit.ratio)
    span = turns[-1] - turns[0]
    gaps = rng.normal(1, 0.012, int(span * per_turn) + 4) / per_turn
    at = turns[0] + np.cumsum(gaps) - rng.uniform(0, 1 / per_turn)
    at = at[(at > turns[0]) & (at < turns[-1])]
    # the inner race carries its defect through the load zone once a turn
    size = np.ones(len(at)) if fault == "outer_race" else np.maximum(0.15, 0.5 + 0.5 * np.cos(2 * np.pi * at))
    blows = np.zeros(len(turns))
    np.add.at(blows, np.searchsorted(turns, at), size * rng.normal(1, 0.1, len(at)))
    return blows


def _ring(unit: Machine, struck: Array) -> Array:
    """What the housing makes of forces: itself and three lightly damped modes, each a single degree of freedom."""
    count = len(struck)
    hertz = np.fft.rfftfreq(2 * count, 1 / RATE_HZ)
    response = np.full((len(hertz), AXES), 0.3, np.complex128)
    for mode_hz, damping, *gains in unit.resonances:
        ratio = hertz / mode_hz
        # an accelerance: r^2 / (1 - r^2 + 2 i z r), scaled to the gain at its peak
        response += (2 * damping * ratio**2 / (1 - ratio**2 + 2j * damping * ratio))[:, None] * np.array(gains)
    return np.fft.irfft(np.fft.rfft(struck, 2 * count, axis=0) * response, axis=0)[:count]
