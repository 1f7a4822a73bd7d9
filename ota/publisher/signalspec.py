"""[preprocess] of kind `signal` in a `spec.toml`: from a sensor's window to the input tensor, every default filled in.

Types and ranges alone; the formulas stand with the code that computes them and, for people, in FORMAT.md §2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ota.publisher.spectable import Table, boolean, choice, integer, list_of, mapping, number, text

MAX_WINDOW = 1 << 18
MAX_CHANNELS = 64
MAX_FEATURES = 16
MAX_VALUES = 1 << 18
MAX_BANDS = 4096
MAX_RATE_HZ = 1e6
STATISTICS = ("mean", "std", "rms", "peak", "crest", "kurtosis", "skewness", "zero_crossings")

Fields = dict[str, Any]

_KEYS = ("kind", "rate_hz", "window", "channels", "detrend", "features", "mean", "std", "clip")
_PART_KEYS = ("n_fft", "hop", "fmin_hz", "fmax_hz", "floor")
_LARGEST = 1e300


def signal_preprocess(raw: Mapping[str, Any], where: str) -> Fields:
    """The checked [preprocess] table `raw`; `where` names it in errors.

    Raises:
        PublishError: `bad_spec`, naming the key.
    """
    fields = Table(raw, where, _KEYS)
    rate_hz = fields.take("rate_hz", number(1e-3, MAX_RATE_HZ))
    window = fields.take("window", integer(2, MAX_WINDOW))
    listed = fields.take("features", list_of(mapping, 1, MAX_FEATURES))
    features = [_feature(one, f"{where}: features[{i}]", rate_hz, window) for i, one in enumerate(listed)]
    found = {
        "kind": "signal",
        "rate_hz": rate_hz,
        "window": window,
        "channels": fields.take("channels", integer(1, MAX_CHANNELS), 1),
        "detrend": fields.take("detrend", boolean, False),
        "features": features,
        "mean": fields.take("mean", list_of(number(-_LARGEST, _LARGEST), 1, MAX_VALUES), [0.0]),
        "std": fields.take("std", list_of(number(1e-12, _LARGEST), 1, MAX_VALUES), [1.0]),
    }
    clip = fields.take("clip", list_of(number(-_LARGEST, _LARGEST), 2, 2), [])
    if clip:
        if clip[0] >= clip[1]:
            raise fields.bad("clip", "not a lower and a higher number")
        found["clip"] = clip
    return found


def _feature(raw: Mapping[str, Any], where: str, rate_hz: float, window: int) -> Fields:
    kind = Table({"kind": raw.get("kind", "")}, where, ("kind",)).take("kind", choice(*_FEATURES))
    keys, read = _FEATURES[kind]
    return {"kind": kind, **read(Table(raw, where, ("kind", *keys)), rate_hz, window)}


def _raw(fields: Table, rate_hz: float, window: int) -> Fields:
    return {"planar": fields.take("planar", boolean, False)}


def _statistics(fields: Table, rate_hz: float, window: int) -> Fields:
    names = fields.take("names", list_of(text(20), 1, len(STATISTICS)), list(STATISTICS))
    for name in names:
        if name not in STATISTICS or names.count(name) > 1:
            raise fields.bad("names", f"{name!r} is not one of {', '.join(STATISTICS)}, each once")
    return {"names": names}


def _parts(fields: Table, rate_hz: float, window: int) -> Fields:
    n_fft = fields.take("n_fft", integer(2, window), window)
    half = number(0.0, rate_hz / 2)
    found = {
        "n_fft": n_fft,
        "hop": fields.take("hop", integer(1, window), n_fft),
        "fmin_hz": fields.take("fmin_hz", half, 0.0),
        "fmax_hz": fields.take("fmax_hz", half, rate_hz / 2),
        "floor": fields.take("floor", number(1e-300, 1e300), 1e-10),
    }
    if found["fmin_hz"] >= found["fmax_hz"]:
        raise fields.bad("fmax_hz", "not above fmin_hz")
    return found


def _fft(fields: Table, rate_hz: float, window: int) -> Fields:
    found = {
        **_parts(fields, rate_hz, window),
        "bands": fields.take("bands", integer(0, MAX_BANDS), 0),
        "spacing": fields.take("spacing", choice("linear", "log"), "linear"),
        "log": fields.take("log", boolean, True),
    }
    if found["bands"] and found["spacing"] == "log" and not found["fmin_hz"]:
        raise fields.bad("fmin_hz", "bands of log spacing begin above 0 Hz")
    return found


def _logmel(fields: Table, rate_hz: float, window: int) -> Fields:
    return {
        **_parts(fields, rate_hz, window),
        "mels": fields.take("mels", integer(1, MAX_BANDS), 64),
        "scale": fields.take("scale", choice("htk", "slaney"), "htk"),
    }


_FEATURES: Mapping[str, tuple[tuple[str, ...], Callable[[Table, float, int], Fields]]] = {
    "raw": (("planar",), _raw),
    "fft": ((*_PART_KEYS, "bands", "spacing", "log"), _fft),
    "logmel": ((*_PART_KEYS, "mels", "scale"), _logmel),
    "statistics": (("names",), _statistics),
}
"""Keys and reader of each feature."""
