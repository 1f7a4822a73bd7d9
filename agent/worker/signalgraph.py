"""What a release says of the way from a sensor's window to the input tensor: `graph.preprocess` of kind `signal`.

Parsed once into frozen values; the arithmetic is `agent.worker.signal`'s. The formulas stand in each class's docstring
and are the format's definition. Invariant: how many values a declaration gives follows from the declaration alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent.worker.graphkeys import Keys

KIND = "signal"
MAX_WINDOW = 1 << 18
MAX_CHANNELS = 64
MAX_FEATURES = 16
MAX_VALUES = 1 << 18
MAX_BANDS = 4096
MAX_RATE_HZ = 1e6
MAX_NUMBERS = 1 << 22
"""Most numbers in one buffer of a plan: 32 MiB."""
STATISTICS = ("mean", "std", "rms", "peak", "crest", "kurtosis", "skewness", "zero_crossings")


@dataclass(frozen=True, slots=True)
class RawSamples:
    """The samples themselves, x[n, c]: sample by sample, or channel by channel where `planar`."""

    planar: bool = False


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Amplitudes over frequency, per channel, averaged over the parts of the window (Welch 1967).

    The window is cut into parts of `n_fft` samples, one every `hop`, whole ones only. With the periodic Hann window
    w[n] = 0.5 - 0.5 cos(2 pi n / n_fft) and X[k] the DFT of w x, the power of a bin is P[k] = (2 |X[k]| / sum(w))^2, so
    that a sine of amplitude A in the middle of a bin has P = A^2; it is averaged over the parts. Bin k is at
    k rate / n_fft Hz. Of the bins from `fmin_hz` to `fmax_hz`, both included, each is a value (`bands` = 0) or they are
    pooled: `bands` bands with edges equally spaced in frequency (`spacing` linear) or in its logarithm (log); a band
    is the mean of P over the bins from its lower edge up to its upper one, which only the last band includes.
    A value is sqrt(P), or with `log` 10 log10(max(P, floor)). Order: channel, band.
    """

    n_fft: int
    hop: int
    bands: int
    spacing: str
    fmin_hz: float
    fmax_hz: float
    log: bool
    floor: float


@dataclass(frozen=True, slots=True)
class LogMel:
    """Logarithmic mel energies, per channel and part of the window.

    Parts, window and DFT as in `Spectrum`, with S[k] = |X[k]|^2 without a factor. `mels` + 2 points lie equally spaced
    in mel from `fmin_hz` to `fmax_hz`; filter m is the triangle over points m, m + 1 and m + 2, sampled at the bins'
    frequencies. `scale` htk: mel(f) = 2595 log10(1 + f / 700) and triangles of height 1 (Young et al., 'The HTK Book',
    section 5.4). `scale` slaney: mel(f) = 3 f / 200 below 1000 Hz, 15 + 27 ln(f / 1000) / ln(6.4) from there on, and
    triangles of area 1, height 2 / (f[m + 2] - f[m]) (Slaney, 'Auditory Toolbox', 1998). A value is
    10 log10(max(sum_k filter[m, k] S[k], floor)). Order: channel, part, filter.
    """

    n_fft: int
    hop: int
    mels: int
    fmin_hz: float
    fmax_hz: float
    scale: str
    floor: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """Numbers of each channel's N samples x, with d = x - mean(x) and m_j = mean(d^j).

    mean, of the samples as they come; std = sqrt(m_2); rms = sqrt(mean(x^2)); peak = max |x|; crest = peak / rms;
    kurtosis = m_4 / m_2^2 (3 for noise); skewness = m_3 / m_2^1.5; zero_crossings = the share of the N - 1 steps over
    which d changes its sign, 0 counting as positive. A quotient by zero is 0. All but `mean` see the samples after
    `detrend`. Order: channel, name.
    """

    names: tuple[str, ...]


Feature = RawSamples | Spectrum | LogMel | Statistics


@dataclass(frozen=True, slots=True)
class Signal:
    """From a window of samples to the input tensor.

    Windows are float32 [`window`, `channels`] at `rate_hz`. `detrend` first subtracts each channel's mean. The values
    of all features, one feature after the other, become (value - mean) / std, with one mean and std for all or one for
    each value, are limited to `clip` where it is given, and fill the tensor in its own order, quantized as it says.
    """

    rate_hz: float
    window: int
    channels: int
    detrend: bool
    features: tuple[Feature, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    clip: tuple[float, float] | None = None

    @property
    def values(self) -> int:
        """How many values one window gives."""
        return sum(value_count(feature, self) for feature in self.features)


def parts(n_fft: int, hop: int, window: int) -> int:
    """How many whole parts a window has."""
    return 1 + (window - n_fft) // hop


def bins(fmin_hz: float, fmax_hz: float, n_fft: int, rate_hz: float) -> range:
    """The bins from one frequency to another, both included."""
    step = rate_hz / n_fft
    # a bin whose frequency was written down rounded is still meant
    return range(math.ceil(fmin_hz / step - 1e-6), min(n_fft // 2, math.floor(fmax_hz / step + 1e-6)) + 1)


def value_count(feature: Feature, signal: Signal) -> int:
    """How many values a feature gives for one window."""
    if isinstance(feature, RawSamples):
        return signal.window * signal.channels
    if isinstance(feature, Statistics):
        return len(feature.names) * signal.channels
    if isinstance(feature, LogMel):
        return feature.mels * parts(feature.n_fft, feature.hop, signal.window) * signal.channels
    found = bins(feature.fmin_hz, feature.fmax_hz, feature.n_fft, signal.rate_hz)
    return (feature.bands or len(found)) * signal.channels


def parse_signal(preprocess: Mapping[str, Any]) -> Signal:
    """Parse `graph.preprocess` of kind `signal`. Unknown keys are ignored, as everywhere in signed metadata.

    Raises:
        ModelError: `model_unloadable`, naming the key.
    """
    keys = Keys(preprocess, "graph.preprocess")
    rate_hz = keys.number("rate_hz", 1e-3, MAX_RATE_HZ)
    window = keys.integer("window", 2, MAX_WINDOW)
    listed = preprocess.get("features")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_FEATURES:
        raise keys.bad("features", f"not a list of 1 to {MAX_FEATURES} features")
    channels = keys.integer("channels", 1, MAX_CHANNELS, 1)
    features = tuple(
        _feature(value, f"graph.preprocess.features[{i}]", rate_hz, window, channels) for i, value in enumerate(listed)
    )
    counted = Signal(rate_hz, window, channels, keys.flag("detrend", False), features, (0.0,), (1.0,))
    if not 0 < counted.values <= MAX_VALUES:
        raise keys.bad("features", f"give {counted.values} values, not 1 to {MAX_VALUES}")
    clip = keys.numbers("clip", (), counts=(0, 2))
    if clip and clip[0] >= clip[1]:
        raise keys.bad("clip", "not a lower and a higher number")
    return replace(
        counted,
        mean=keys.numbers("mean", (0.0,), counts=(1, counted.values)),
        std=keys.numbers("std", (1.0,), positive=True, counts=(1, counted.values)),
        clip=(clip[0], clip[1]) if clip else None,
    )


def _feature(value: Any, where: str, rate_hz: float, window: int, channels: int) -> Feature:
    keys = Keys(value, where)
    kind = keys.choice("kind", ("raw", "fft", "logmel", "statistics"), "")
    if kind == "raw":
        return RawSamples(keys.flag("planar", False))
    if kind == "statistics":
        names = value.get("names", list(STATISTICS))
        if not isinstance(names, list) or not names or len(set(map(str, names))) != len(names):
            raise keys.bad("names", "not a list of different names")
        for name in names:
            if name not in STATISTICS:
                raise keys.bad("names", f"{str(name)[:40]!r} is not one of {', '.join(STATISTICS)}")
        return Statistics(tuple(names))
    n_fft = keys.integer("n_fft", 2, window, window)
    hop = keys.integer("hop", 1, window, n_fft)
    if parts(n_fft, hop, window) * n_fft * channels > MAX_NUMBERS:
        raise keys.bad("hop", f"{parts(n_fft, hop, window)} parts of {n_fft} samples are too many")
    fmin_hz = keys.number("fmin_hz", 0, rate_hz / 2, 0)
    fmax_hz = keys.number("fmax_hz", 0, rate_hz / 2, rate_hz / 2)
    if fmin_hz >= fmax_hz:
        raise keys.bad("fmax_hz", f"{fmax_hz:g} is not above fmin_hz {fmin_hz:g}")
    floor = keys.number("floor", 1e-300, 1e300, 1e-10)
    if kind == "logmel":
        scale = keys.choice("scale", ("htk", "slaney"), "htk")
        mels = keys.integer("mels", 1, MAX_BANDS, 64)
        if mels * n_fft > MAX_NUMBERS:
            raise keys.bad("mels", f"{mels} filters over {n_fft} samples are too many")
        return LogMel(n_fft, hop, mels, fmin_hz, fmax_hz, scale, floor)
    bands = keys.integer("bands", 0, MAX_BANDS, 0)
    spacing = keys.choice("spacing", ("linear", "log"), "linear")
    if bands and spacing == "log" and fmin_hz <= 0:
        raise keys.bad("fmin_hz", "bands of log spacing begin above 0 Hz")
    if not bins(fmin_hz, fmax_hz, n_fft, rate_hz):
        raise keys.bad("fmin_hz", f"no bin of {rate_hz / n_fft:g} Hz lies between fmin_hz and fmax_hz")
    return Spectrum(n_fft, hop, bands, spacing, fmin_hz, fmax_hz, keys.flag("log", True), floor)
