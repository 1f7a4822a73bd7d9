"""From a sensor's window to the input tensor: the declaration of `agent.worker.signalgraph` compiled into a plan.

The counterpart of `agent.worker.preprocess` for windows of samples. Everything is computed in float64 whatever the
NumPy, so that its versions agree, and in buffers made once; `rfft` alone allocates where NumPy is older than 2.
Invariants: a plan writes every element of its tensor on every run; it never writes to the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason
from agent.worker.signalgraph import LogMel, RawSamples, Signal, Spectrum, Statistics, bins, parts, value_count
from agent.worker.tensor import Array, TensorSpec, require_scale

if TYPE_CHECKING:
    from agent.worker.preprocess import Inverse
    from agent.worker.sources import Frame

Real = NDArray[np.float64]
_Step = Callable[[Real, Real], None]
"""Computes a feature of [channels, window] samples into its flat values."""

_INTEGERS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}
_FLOATS = ("float32", "float16")


class SignalPlan:
    """Preprocessing of windows of one shape into one tensor.

    Args:
        declared: what the release asks for.
        spec: of the input tensor.
        tensor: the buffer to fill: `spec.shape`, `spec.dtype`, C-contiguous.
        shape: of the windows, float32 [samples, channels].

    Raises:
        ModelError: `model_shape` when windows, declaration and tensor do not fit each other.
    """

    inverse: Inverse | None = None  # there are no source pixels to go back to

    def __init__(self, declared: Signal, spec: TensorSpec, tensor: Array, shape: tuple[int, ...]) -> None:
        _check(declared, spec, tuple(shape))
        self.tensor = tensor
        self._samples = np.empty((declared.channels, declared.window))
        self._means = np.empty((declared.channels, 1))
        self._detrend = declared.detrend
        self._values = np.empty(declared.values)
        self._steps: list[tuple[_Step, Real]] = []
        start = 0
        for feature in declared.features:
            count = value_count(feature, declared)
            self._steps.append((_compile(feature, declared, self._means), self._values[start : start + count]))
            start += count
        # value -> (value - mean) / std -> steps of the tensor, as one product and one sum
        scale, zero = (spec.scale, spec.zero_point or 0) if spec.scale is not None else (1.0, 0)
        self._gain = _one_or_all(1 / (np.asarray(declared.std) * scale))
        self._offset = _one_or_all(zero - np.asarray(declared.mean) / (np.asarray(declared.std) * scale))
        self._integer = spec.dtype in _INTEGERS
        self._limits = _limits(declared, spec, scale, zero)
        self._flat = tensor.reshape(-1)

    def run(self, frame: Frame) -> None:
        """Fill the tensor from a window."""
        samples, values = self._samples, self._values
        np.copyto(samples, frame.T)
        np.mean(samples, axis=1, keepdims=True, out=self._means)
        if self._detrend:
            np.subtract(samples, self._means, out=samples)
        for step, target in self._steps:
            step(samples, target)
        np.multiply(values, self._gain, out=values)
        np.add(values, self._offset, out=values)
        if self._limits is not None:
            np.clip(values, *self._limits, out=values)
        if self._integer:
            np.rint(values, out=values)
        np.copyto(self._flat, values, casting="unsafe")


def _limits(declared: Signal, spec: TensorSpec, scale: float, zero: int) -> tuple[float, float] | None:
    """The smallest and largest step of the tensor, None where nothing limits it."""
    low, high = _INTEGERS.get(spec.dtype, (-math.inf, math.inf))
    if declared.clip is not None:
        low, high = max(low, declared.clip[0] / scale + zero), min(high, declared.clip[1] / scale + zero)
    return None if math.isinf(low) else (low, high)


def _one_or_all(numbers: Real) -> Real:
    """One number where all agree: NumPy is faster with it."""
    return numbers[:1] if (numbers == numbers.flat[0]).all() else numbers


def _check(declared: Signal, spec: TensorSpec, shape: tuple[int, ...]) -> None:
    if shape != (declared.window, declared.channels):
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"the source gives frames of {list(shape)}, the release wants windows of"
            f" [{declared.window}, {declared.channels}]",
            hint=f"give the source window = {declared.window} and {declared.channels} channels"
            f" at {declared.rate_hz:g} Hz",
        )
    if spec.dtype not in _INTEGERS and spec.dtype not in _FLOATS:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"input {spec.name[:60]!r} is {spec.dtype}, which takes no signal",
            hint="a signal's input is int8, uint8, int16, float16 or float32",
        )
    require_scale(spec)
    if math.prod(spec.shape) != declared.values:
        raise ModelError(
            Reason.MODEL_SHAPE,
            f"the features of [preprocess] give {declared.values} values, input {spec.name[:60]!r} of"
            f" shape {list(spec.shape)} takes {math.prod(spec.shape)}",
            hint="correct the features, or export the model for them",
        )


def _compile(feature: RawSamples | Spectrum | LogMel | Statistics, signal: Signal, means: Real) -> _Step:
    if isinstance(feature, RawSamples):
        return _raw(feature, signal)
    if isinstance(feature, Statistics):
        return _statistics(feature, signal, means)
    if isinstance(feature, LogMel):
        return _logmel(feature, signal)
    return _spectrum(feature, signal)


def _raw(feature: RawSamples, signal: Signal) -> _Step:
    def copy(samples: Real, target: Real) -> None:
        if feature.planar:
            np.copyto(target.reshape(samples.shape), samples)
        else:
            np.copyto(target.reshape(samples.shape[::-1]), samples.T)

    return copy


# --- spectra ---------------------------------------------------------------------------------------------------------


def hann(length: int) -> Real:
    """The periodic Hann window: 0.5 - 0.5 cos(2 pi n / length)."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)


class _Powers:
    """|X[k]|^2 of every part of every channel: [channels, parts, bins], the buffer valid until the next call."""

    def __init__(self, n_fft: int, hop: int, signal: Signal, gain: float) -> None:
        count = parts(n_fft, hop, signal.window)
        self._last = (count - 1) * hop + n_fft
        self._hop, self._n_fft = hop, n_fft
        self._into = int(np.__version__.split(".")[0]) >= 2  # rfft takes `out` from there on
        self._window = hann(n_fft) * gain
        self._parts = np.empty((signal.channels, count, n_fft))
        self._complex = np.empty((signal.channels, count, n_fft // 2 + 1), np.complex128)
        self._power = np.empty(self._complex.shape)
        self._squares = np.empty(self._complex.shape)

    def __call__(self, samples: Real) -> Real:
        cut = np.lib.stride_tricks.sliding_window_view(samples[:, : self._last], self._n_fft, axis=1)[:, :: self._hop]
        np.multiply(cut, self._window, out=self._parts)
        if self._into:
            np.fft.rfft(self._parts, axis=2, out=self._complex)
            found = self._complex
        else:
            found = np.fft.rfft(self._parts, axis=2)
        np.multiply(found.real, found.real, out=self._power)
        np.multiply(found.imag, found.imag, out=self._squares)
        return np.add(self._power, self._squares, out=self._power)


def _spectrum(feature: Spectrum, signal: Signal) -> _Step:
    chosen = bins(feature.fmin_hz, feature.fmax_hz, feature.n_fft, signal.rate_hz)
    powers = _Powers(feature.n_fft, feature.hop, signal, 2 / float(hann(feature.n_fft).sum()))
    mean = np.empty((signal.channels, feature.n_fft // 2 + 1))
    inside = mean[:, chosen.start : chosen.stop]
    pool = None
    if feature.bands:
        starts = _band_starts(feature, signal.rate_hz, chosen)
        lengths = np.diff([*starts, len(chosen)]).astype(np.float64)
        pool = (np.asarray(starts), lengths)

    def compute(samples: Real, target: Real) -> None:
        np.mean(powers(samples), axis=1, out=mean)
        values = target.reshape(signal.channels, -1)
        if pool is None:
            np.copyto(values, inside)
        else:
            np.add.reduceat(inside, pool[0], axis=1, out=values)
            np.divide(values, pool[1], out=values)
        if feature.log:
            _decibels(values, feature.floor)
        else:
            np.sqrt(values, out=values)

    return compute


def _band_starts(feature: Spectrum, rate_hz: float, chosen: range) -> list[int]:
    """Index, among the chosen bins, of each band's first one.

    Raises:
        ModelError: `model_shape` when a band is narrower than a bin.
    """
    if feature.spacing == "log":
        edges = np.geomspace(feature.fmin_hz, feature.fmax_hz, feature.bands + 1)
    else:
        edges = np.linspace(feature.fmin_hz, feature.fmax_hz, feature.bands + 1)
    step = rate_hz / feature.n_fft
    starts = [max(0, math.ceil(edge / step - 1e-6) - chosen.start) for edge in edges[:-1].tolist()]
    for band, (start, end) in enumerate(zip(starts, [*starts[1:], len(chosen)], strict=True)):
        if start >= end:
            raise ModelError(
                Reason.MODEL_SHAPE,
                f"band {band} from {edges[band]:g} to {edges[band + 1]:g} Hz holds no bin of {step:g} Hz",
                hint="ask for fewer bands, or for a longer n_fft",
            )
    return starts


def mel_filters(feature: LogMel, rate_hz: float) -> Real:
    """The filters of `LogMel`, [bins, mels]."""
    low, high = (_mel(np.array([f]), feature.scale)[0] for f in (feature.fmin_hz, feature.fmax_hz))
    points = _hertz(np.linspace(low, high, feature.mels + 2), feature.scale)
    frequencies = np.arange(feature.n_fft // 2 + 1) * (rate_hz / feature.n_fft)
    rising = (frequencies[:, None] - points[:-2]) / np.diff(points)[:-1]
    falling = (points[2:] - frequencies[:, None]) / np.diff(points)[1:]
    filters = np.maximum(0, np.minimum(rising, falling))
    if feature.scale == "slaney":
        filters *= 2 / (points[2:] - points[:-2])
    return np.asarray(filters, np.float64)


def _mel(hertz: Real, scale: str) -> Real:
    if scale == "htk":
        return np.asarray(2595 * np.log10(1 + hertz / 700), np.float64)
    above = 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4)
    return np.where(hertz < 1000, 3 * hertz / 200, above)


def _hertz(mel: Real, scale: str) -> Real:
    if scale == "htk":
        return np.asarray(700 * (10 ** (mel / 2595) - 1), np.float64)
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(np.log(6.4) * (np.maximum(mel, 15) - 15) / 27))


def _logmel(feature: LogMel, signal: Signal) -> _Step:
    powers = _Powers(feature.n_fft, feature.hop, signal, 1.0)
    filters = mel_filters(feature, signal.rate_hz)
    rows = signal.channels * parts(feature.n_fft, feature.hop, signal.window)

    def compute(samples: Real, target: Real) -> None:
        values = target.reshape(rows, feature.mels)
        np.matmul(powers(samples).reshape(rows, -1), filters, out=values)
        _decibels(values, feature.floor)

    return compute


def _decibels(values: Real, floor: float) -> None:
    np.maximum(values, floor, out=values)
    np.log10(values, out=values)
    np.multiply(values, 10.0, out=values)


# --- statistics ------------------------------------------------------------------------------------------------------


def _statistics(feature: Statistics, signal: Signal, means: Real) -> _Step:
    names = feature.names
    centred, power = (np.empty((signal.channels, signal.window)) for _ in range(2))
    positive = np.empty((signal.channels, signal.window), bool)
    changes = np.empty((signal.channels, signal.window - 1), bool)
    m1, m2, m3, m4, square, peak = np.empty((6, signal.channels))
    middle = np.empty((signal.channels, 1))
    found: dict[str, Any] = {"mean": means[:, 0], "rms": square, "peak": peak}

    def compute(samples: Real, target: Real) -> None:
        np.mean(samples, axis=1, keepdims=True, out=middle)
        np.subtract(samples, middle, out=centred)
        np.multiply(samples, samples, out=power)
        np.mean(power, axis=1, out=square)
        np.sqrt(square, out=square)
        np.absolute(samples, out=power)
        np.max(power, axis=1, out=peak)
        np.multiply(centred, centred, out=power)
        np.mean(power, axis=1, out=m2)
        if "skewness" in names:
            np.multiply(power, centred, out=power)
            np.mean(power, axis=1, out=m3)
            np.multiply(centred, centred, out=power)
        if "kurtosis" in names:
            np.multiply(power, power, out=power)
            np.mean(power, axis=1, out=m4)
        if "zero_crossings" in names:
            np.greater_equal(centred, 0, out=positive)
            np.not_equal(positive[:, 1:], positive[:, :-1], out=changes)
            np.mean(changes, axis=1, out=m1)
            found["zero_crossings"] = m1
        deviation = np.sqrt(m2)
        found["std"] = deviation
        found["crest"] = _quotient(peak, square)
        found["skewness"] = _quotient(m3, m2 * deviation)
        found["kurtosis"] = _quotient(m4, m2 * m2)
        values = target.reshape(signal.channels, len(names))
        for index, name in enumerate(names):
            values[:, index] = found[name]

    return compute


def _quotient(above: Real, below: Real) -> Real:
    """A number per channel; 0 where it is divided by 0."""
    return np.divide(above, below, out=np.zeros_like(below), where=below > 0)
