"""[preprocess] of kind signal in a spec: strict towards its writer, and what it becomes is what a worker takes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.worker import signalgraph
from ota.errors import PublishError, Reason
from ota.publisher import signalspec, spec
from ota.publisher.signalspec import signal_preprocess

MODELS = Path(__file__).resolve().parents[3] / "models"
WINDOW = {"kind": "signal", "rate_hz": 1000, "window": 256}


def checked(**changes: Any) -> dict[str, Any]:
    return signal_preprocess({**WINDOW, "features": [{"kind": "raw"}], **changes}, "spec.toml: [preprocess]")


def test_every_default_is_filled_in_so_that_the_signed_release_leaves_nothing_open() -> None:
    kinds = [{"kind": kind} for kind in ("raw", "fft", "logmel", "statistics")]
    assert checked(features=kinds) == {
        "kind": "signal",
        "rate_hz": 1000.0,
        "window": 256,
        "channels": 1,
        "detrend": False,
        "features": [
            {"kind": "raw", "planar": False},
            {
                "kind": "fft", "n_fft": 256, "hop": 256, "fmin_hz": 0.0, "fmax_hz": 500.0, "floor": 1e-10,
                "bands": 0, "spacing": "linear", "log": True,
            },
            {
                "kind": "logmel", "n_fft": 256, "hop": 256, "fmin_hz": 0.0, "fmax_hz": 500.0, "floor": 1e-10,
                "mels": 64, "scale": "htk",
            },
            {"kind": "statistics", "names": list(signalgraph.STATISTICS)},
        ],
        "mean": [0.0],
        "std": [1.0],
    }  # fmt: skip


FEATURES = st.one_of(
    st.fixed_dictionaries({"kind": st.just("raw")}, optional={"planar": st.booleans()}),
    st.fixed_dictionaries(
        {"kind": st.just("statistics")},
        optional={"names": st.lists(st.sampled_from(signalgraph.STATISTICS), min_size=1, unique=True)},
    ),
    st.fixed_dictionaries(
        {"kind": st.just("fft"), "fmin_hz": st.floats(1, 200), "fmax_hz": st.floats(250, 500)},
        optional={
            "n_fft": st.integers(64, 256), "hop": st.integers(1, 256), "bands": st.integers(0, 4),
            "spacing": st.sampled_from(["linear", "log"]), "log": st.booleans(), "floor": st.floats(1e-20, 1),
        },
    ),
    st.fixed_dictionaries(
        {"kind": st.just("logmel"), "fmin_hz": st.floats(0, 200), "fmax_hz": st.floats(250, 500)},
        optional={
            "n_fft": st.integers(64, 256), "mels": st.integers(1, 40), "scale": st.sampled_from(["htk", "slaney"]),
        },
    ),
)  # fmt: skip


@given(st.lists(FEATURES, min_size=1, max_size=5), st.integers(1, 6), st.booleans())
def test_what_the_publisher_takes_the_worker_takes_and_reads_the_same(
    features: list[dict[str, Any]], channels: int, detrend: bool
) -> None:
    made = checked(features=features, channels=channels, detrend=detrend, clip=[-1, 1])
    signal = signalgraph.parse_signal(made)
    assert (signal.channels, signal.detrend, signal.clip) == (channels, detrend, (-1.0, 1.0))
    assert signal == signalgraph.parse_signal({**WINDOW, "features": features, "channels": channels,
                                               "detrend": detrend, "clip": [-1, 1]})  # fmt: skip


def test_publisher_and_worker_have_the_same_limits() -> None:
    for name in ("MAX_WINDOW", "MAX_CHANNELS", "MAX_FEATURES", "MAX_VALUES", "MAX_BANDS", "MAX_RATE_HZ", "STATISTICS"):
        assert getattr(signalspec, name) == getattr(signalgraph, name), name


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"resize": "stretch"}, "resize: unknown key"),
        ({"rate": 5}, "rate: unknown key"),
        ({"window": 1}, "window: not a whole number from 2"),
        ({"features": []}, "features: not a list of 1"),
        ({"features": [{}]}, r"features\[0\]: kind"),
        ({"features": [{"kind": "raw", "bands": 3}]}, r"features\[0\]: bands: unknown key"),
        ({"features": [{"kind": "fft", "n_fft": 512}]}, "n_fft: not a whole number from 2 to 256"),
        ({"features": [{"kind": "fft", "fmax_hz": 600}]}, "fmax_hz: not from 0 to 500"),
        ({"features": [{"kind": "fft", "fmin_hz": 500}]}, "fmax_hz: not above fmin_hz"),
        ({"features": [{"kind": "fft", "bands": 3, "spacing": "log"}]}, "fmin_hz: bands of log spacing"),
        ({"features": [{"kind": "statistics", "names": ["rms", "rms"]}]}, "names: 'rms'"),
        ({"std": [0]}, "std: not from 1e-12"),
        ({"clip": [1, 1]}, "clip: not a lower and a higher"),
        ({"mean": ["0"]}, "mean: not a number"),
    ],
)
def test_a_mistake_is_refused_by_the_name_of_its_key(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(PublishError, match=why) as refused:
        checked(**changes)
    assert refused.value.reason is Reason.BAD_SPEC


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_the_shipped_line_is_such_a_spec(version: str) -> None:
    path = MODELS / "vibration" / version / "spec.toml"
    made = spec.load(path)
    assert made.graph["task"] == "anomaly"
    written = tomllib.loads(path.read_text())["preprocess"]
    assert signalgraph.parse_signal(made.graph["preprocess"]) == signalgraph.parse_signal(written)
    assert signalgraph.parse_signal(written).values == 195
