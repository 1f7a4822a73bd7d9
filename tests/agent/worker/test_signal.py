"""A window's way into the tensor, against the formulas written down again in plain float64 NumPy."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import ModelError, Reason
from agent.worker.signal import SignalPlan, hann
from agent.worker.signalgraph import STATISTICS, parse_signal
from agent.worker.tensor import TensorSpec

RATE_HZ = 1000.0


def declared(*features: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {"kind": "signal", "rate_hz": RATE_HZ, "window": 128, "channels": 2, "features": list(features)}
    return {**base, **changes}


def run(preprocess: dict[str, Any], window: np.ndarray, spec: TensorSpec | None = None) -> np.ndarray:
    """What a plan makes of a window, float32 without quantization unless a spec says otherwise."""
    signal = parse_signal(preprocess)
    spec = spec or TensorSpec("x", "float32", (1, signal.values))
    tensor = spec.empty()
    # what an earlier run left must not matter
    tensor.reshape(-1)[:] = 77
    before = window.copy()
    SignalPlan(signal, spec, tensor, window.shape).run(window)
    assert np.array_equal(window, before), "a plan never writes to the window"
    return tensor


def noise(seed: int, window: int = 128, channels: int = 2, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((window, channels)) * rng.uniform(0.01, 50) + offset).astype(np.float32)


# --- the formulas, once more -----------------------------------------------------------------------------------------


def powers(x: np.ndarray, n_fft: int, hop: int) -> list[np.ndarray]:
    """|DFT|^2 of each Hann-weighted part of one channel, by the definition of the DFT."""
    n = np.arange(n_fft)
    w = 0.5 - 0.5 * np.cos(2 * np.pi * n / n_fft)
    found = []
    for start in range(0, len(x) - n_fft + 1, hop):
        part = x[start : start + n_fft] * w
        found.append(
            np.array([abs(np.sum(part * np.exp(-2j * np.pi * k * n / n_fft))) ** 2 for k in range(n_fft // 2 + 1)])
        )
    return found


def spectrum(x: np.ndarray, n_fft: int, hop: int, low: float, high: float) -> np.ndarray:
    gain = 2 / np.sum(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft))
    mean = np.mean(powers(x, n_fft, hop), axis=0) * gain**2
    at = np.arange(n_fft // 2 + 1) * RATE_HZ / n_fft
    return mean[(at >= low - 1e-6) & (at <= high + 1e-6)]


def pooled(values: np.ndarray, first_hz: float, step: float, edges: np.ndarray) -> list[float]:
    at = first_hz + step * np.arange(len(values))
    bands = []
    for i in range(len(edges) - 1):
        last = i == len(edges) - 2
        inside = (at >= edges[i] - 1e-6) & ((at <= edges[i + 1] + 1e-6) if last else (at < edges[i + 1] - 1e-6))
        bands.append(float(values[inside].mean()))
    return bands


def logmel(x: np.ndarray, n_fft: int, hop: int, mels: int, low: float, high: float, scale: str) -> np.ndarray:
    def mel(f: float) -> float:
        if scale == "htk":
            return 2595 * math.log10(1 + f / 700)
        return 3 * f / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)

    def hertz(m: float) -> float:
        if scale == "htk":
            return float(700 * (10 ** (m / 2595) - 1))
        return 200 * m / 3 if m < 15 else 1000 * math.exp(math.log(6.4) * (m - 15) / 27)

    points = [hertz(mel(low) + (mel(high) - mel(low)) * i / (mels + 1)) for i in range(mels + 2)]
    rows = []
    for power in powers(x, n_fft, hop):
        row = []
        for m in range(mels):
            left, top, right = points[m : m + 3]
            energy = 0.0
            for k, p in enumerate(power):
                f = k * RATE_HZ / n_fft
                weight = max(0.0, min((f - left) / (top - left), (right - f) / (right - top)))
                energy += p * weight * (2 / (right - left) if scale == "slaney" else 1)
            row.append(10 * math.log10(max(energy, 1e-10)))
        rows.append(row)
    return np.array(rows)


def statistics(x: np.ndarray, names: tuple[str, ...]) -> list[float]:
    d = x - x.mean()
    m2, m3, m4 = ((d**j).mean() for j in (2, 3, 4))
    signs = d >= 0
    known = {
        "mean": x.mean(), "std": math.sqrt(m2), "rms": math.sqrt((x**2).mean()), "peak": np.abs(x).max(),
        "crest": np.abs(x).max() / math.sqrt((x**2).mean()), "kurtosis": m4 / m2**2, "skewness": m3 / m2**1.5,
        "zero_crossings": (signs[1:] != signs[:-1]).sum() / (len(x) - 1),
    }  # fmt: skip
    return [float(known[name]) for name in names]


# --- each feature ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=20, deadline=None)
def test_raw_gives_the_samples_in_the_order_that_was_asked_for(seed: int, planar: bool) -> None:
    window = noise(seed)
    found = run(declared({"kind": "raw", "planar": planar}, mean=[2.0], std=[4.0]), window)
    wanted = (window.astype(np.float64).T if planar else window.astype(np.float64)).reshape(1, -1)
    assert found == pytest.approx((wanted - 2) / 4, rel=1e-6, abs=1e-7)


@given(st.integers(0, 2**32), st.sampled_from([(128, 128), (64, 32), (50, 13)]), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_fft_is_the_averaged_amplitude_spectrum(seed: int, cut: tuple[int, int], log: bool, detrend: bool) -> None:
    n_fft, hop = cut
    window = noise(seed, offset=3.0)
    feature = {"kind": "fft", "n_fft": n_fft, "hop": hop, "fmin_hz": 40.0, "fmax_hz": 400.0, "log": log}
    found = run(declared(feature, detrend=detrend), window).reshape(2, -1)
    for channel, values in enumerate(found):
        x = window[:, channel].astype(np.float64)
        power = spectrum(x - x.mean() if detrend else x, n_fft, hop, 40, 400)
        wanted = 10 * np.log10(np.maximum(power, 1e-10)) if log else np.sqrt(power)
        assert values == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("spacing", ["linear", "log"])
@given(seed=st.integers(0, 2**32), bands=st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_bands_are_the_means_of_their_bins_and_no_bin_is_in_two(spacing: str, seed: int, bands: int) -> None:
    window = noise(seed)
    feature = {"kind": "fft", "bands": bands, "spacing": spacing, "fmin_hz": 50.0, "fmax_hz": 500.0, "log": False}
    found = run(declared(feature), window).reshape(2, bands)
    space = np.geomspace if spacing == "log" else np.linspace
    step = RATE_HZ / 128
    for channel, values in enumerate(found):
        power = spectrum(window[:, channel].astype(np.float64), 128, 128, 50, 500)
        wanted = np.sqrt(pooled(power, math.ceil(50 / step) * step, step, space(50, 500, bands + 1)))
        assert values == pytest.approx(wanted, rel=1e-5)


def test_a_sine_in_the_middle_of_a_bin_has_its_own_amplitude() -> None:
    n = np.arange(128)
    window = np.stack([3.5 * np.sin(2 * np.pi * 16 * n / 128), np.zeros(128)], axis=1).astype(np.float32)
    found = run(declared({"kind": "fft", "log": False}), window).reshape(2, 65)
    assert found[0, 16] == pytest.approx(3.5, rel=1e-6)
    assert found[0, 20:].max() < 1e-5
    assert found[1].max() == 0


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=6, deadline=None)
def test_logmel_is_what_its_definition_says(scale: str, seed: int) -> None:
    window = noise(seed)
    feature = {"kind": "logmel", "n_fft": 64, "hop": 32, "mels": 9, "fmin_hz": 20.0, "fmax_hz": 480.0, "scale": scale}
    found = run(declared(feature), window).reshape(2, 3, 9)
    for channel in range(2):
        x = window[:, channel].astype(np.float64)
        assert found[channel] == pytest.approx(logmel(x, 64, 32, 9, 20, 480, scale), rel=1e-5, abs=1e-4)


def test_the_slaney_scale_is_linear_below_one_kilohertz_and_its_filters_have_area_one() -> None:
    from agent.worker.signal import mel_filters
    from agent.worker.signalgraph import LogMel

    filters = mel_filters(LogMel(4096, 4096, 12, 0.0, 1000.0, "slaney", 1e-10), 8000.0)
    tops = filters.argmax(axis=0) * 8000 / 4096
    assert np.diff(tops) == pytest.approx(np.full(11, 1000 / 13), abs=4)
    assert filters.sum(axis=0) * 8000 / 4096 == pytest.approx(np.ones(12), rel=1e-2)


@given(st.integers(0, 2**32), st.booleans(), st.permutations(STATISTICS), st.integers(1, len(STATISTICS)))
@settings(max_examples=40, deadline=None)
def test_statistics_are_their_definitions(seed: int, detrend: bool, order: list[str], count: int) -> None:
    names = tuple(order[:count])
    window = noise(seed, offset=9.81)
    found = run(declared({"kind": "statistics", "names": list(names)}, detrend=detrend), window).reshape(2, count)
    for channel, values in enumerate(found):
        x = window[:, channel].astype(np.float64)
        wanted = statistics(x - x.mean() if detrend else x, names)
        if detrend and "mean" in names:
            wanted[names.index("mean")] = float(x.mean())
        assert values == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_silent_sensor_gives_zeros_and_floors_instead_of_nothing() -> None:
    window = np.zeros((128, 2), np.float32)
    assert (run(declared({"kind": "statistics"}), window) == 0).all()
    assert (run(declared({"kind": "fft", "floor": 1e-6}), window) == -60).all()
    assert (run(declared({"kind": "logmel", "mels": 4, "n_fft": 128}), window) == -100).all()


# --- into the tensor -------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from(["int8", "uint8", "int16"]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_features_follow_each_other_normalized_clipped_and_quantized(seed: int, dtype: str, clip: bool) -> None:
    window = noise(seed)
    rng = np.random.default_rng(seed)
    features = [{"kind": "statistics", "names": ["rms", "kurtosis"]}, {"kind": "fft", "bands": 5}]
    plain = run(declared(*features), window).astype(np.float64).reshape(-1)
    mean, std = rng.normal(0, 10, 14), rng.uniform(0.5, 40, 14)
    changes: dict[str, Any] = {"mean": mean.tolist(), "std": std.tolist(), **({"clip": [-0.3, 0.9]} if clip else {})}
    spec = TensorSpec("x", dtype, (1, 1, 1, 14), 0.01, 3)
    found = run(declared(*features, **changes), window, spec).reshape(-1)
    values = (plain - mean) / std
    if clip:
        values = np.clip(values, -0.3, 0.9)
    limits = np.iinfo(dtype)
    wanted = np.clip(values / 0.01 + 3, limits.min, limits.max)
    # the plain values went through float32, so one on the border may fall on either side
    assert np.abs(found - wanted).max() <= 0.5 + 1e-2


def test_half_precision_and_plain_bytes_are_filled_too() -> None:
    window = np.full((128, 2), 12.4, np.float32)
    half = run(declared({"kind": "raw"}), window, TensorSpec("x", "float16", (1, 128, 2)))
    assert half.dtype == np.float16
    assert half[0, 5, 1] == np.float16(12.4)
    assert (run(declared({"kind": "raw"}), window, TensorSpec("x", "uint8", (1, 256))) == 12).all()


def test_a_plan_runs_without_allocating_anything_that_grows_with_the_window() -> None:
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("rfft of NumPy 1 cannot write into a buffer")
    features = [{"kind": "raw"}, {"kind": "fft", "bands": 8}, {"kind": "logmel", "mels": 8}, {"kind": "statistics"}]
    signal = parse_signal(declared(*features, window=1 << 16, detrend=True))
    spec = TensorSpec("x", "int8", (1, signal.values), 0.1, 0)
    plan = SignalPlan(signal, spec, spec.empty(), (1 << 16, 2))
    window = noise(1, window=1 << 16)
    plan.run(window)
    tracemalloc.start()
    plan.run(window)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # NumPy converts between widths through a buffer of its own, which is as long for any window
    assert peak < 100_000, "the window itself has 524288 bytes"


def test_the_hann_window_is_the_periodic_one() -> None:
    assert hann(4) == pytest.approx([0, 0.5, 1, 0.5])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rate_hz": 0}, "rate_hz"),
        ({"window": 1}, "window"),
        ({"window": 1 << 30}, "window"),
        ({"channels": 0}, "channels"),
        ({"features": []}, "features"),
        ({"features": [{"kind": "wavelet"}]}, r"features\[0\].kind"),
        ({"features": [{"kind": "statistics", "names": ["variance"]}]}, "names"),
        ({"features": [{"kind": "fft", "n_fft": 129}]}, "n_fft"),
        ({"features": [{"kind": "fft", "fmin_hz": 400.0, "fmax_hz": 300.0}]}, "fmax_hz"),
        ({"features": [{"kind": "fft", "fmax_hz": 501.0}]}, "fmax_hz"),
        ({"features": [{"kind": "fft", "bands": 4, "spacing": "log"}]}, "fmin_hz"),
        ({"features": [{"kind": "logmel", "mels": 0}]}, "mels"),
        ({"features": [{"kind": "fft", "n_fft": 1 << 17, "hop": 1}], "window": 1 << 18}, "hop"),
        ({"mean": [0.0, 1.0]}, "mean"),
        ({"std": [0.0]}, "std"),
        ({"clip": [1.0, 0.0]}, "clip"),
        ({"mean": [float("nan")]}, "mean"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_by_the_name_of_its_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named) as refused:
        parse_signal(declared({"kind": "raw"}, **changes))
    assert refused.value.reason is Reason.MODEL_UNLOADABLE


@pytest.mark.parametrize(
    ("feature", "spec", "shape", "why"),
    [
        ({"kind": "raw"}, TensorSpec("x", "float32", (1, 256)), (64, 2), r"\[64, 2\].*\[128, 2\]"),
        ({"kind": "raw"}, TensorSpec("x", "float32", (1, 255)), (128, 2), "256 values"),
        ({"kind": "raw"}, TensorSpec("x", "int32", (1, 256)), (128, 2), "takes no signal"),
        ({"kind": "raw"}, TensorSpec("x", "int8", (1, 256)), (128, 2), "scale"),
        ({"kind": "fft", "bands": 80}, TensorSpec("x", "float32", (1, 160)), (128, 2), "holds no bin"),
        ({"kind": "raw"}, TensorSpec("x", "float32", (1, 256)), (480, 640, 3), "windows of"),
    ],
)
def test_windows_declaration_and_tensor_that_do_not_fit_are_refused(
    feature: dict[str, Any], spec: TensorSpec, shape: tuple[int, ...], why: str
) -> None:
    with pytest.raises(ModelError, match=why) as refused:
        SignalPlan(parse_signal(declared(feature)), spec, spec.empty(), shape)
    assert refused.value.reason is Reason.MODEL_SHAPE
