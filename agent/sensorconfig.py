"""The options of sources that are sensors: windows of samples instead of pictures.

Checked on either side of the privilege boundary, like those of `agent.sourceconfig`, which calls this. Importable on
Python 3.10 with the standard library alone.
"""

from __future__ import annotations

import re
import termios
from collections.abc import Callable, Mapping
from typing import Any

from agent.configtable import Table

MAX_WINDOW = 1 << 18
MAX_WINDOW_NUMBERS = 1 << 22
"""Samples times channels of one window: 16 MiB."""
MAX_CHANNELS = 64
MAX_RATE_HZ = 1e6
MAX_POLLED_HZ = 2000.0
TOPIC_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
BAUDS: Mapping[int, int] = {
    int(name[1:]): getattr(termios, name)
    for name in dir(termios)
    if re.fullmatch(r"B[1-9][0-9]+", name) and int(name[1:]) >= 300
}
"""Speeds that this system's termios knows, by baud."""
_CHANNEL = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)


def _iio(table: Table) -> dict[str, Any]:
    inputs = table.texts("inputs")
    if not 0 < len(inputs) <= MAX_CHANNELS:
        raise table.bad("inputs is empty", 'list channels as in_…_raw names them: inputs = ["accel_x", "accel_y"]')
    for name in inputs:
        if not _CHANNEL.fullmatch(name):
            raise table.bad(f"inputs: {name[:40]!r} is no channel", "write accel_x for the file in_accel_x_raw")
    device = table.text("device", None)
    if not device or "/" in device:
        raise table.bad(f"device = {device!r} is no device", "write its number, iio:device0, or its name, adxl345")
    return {
        "device": device,
        "inputs": list(inputs),
        "rate_hz": table.number("rate_hz", None, 0.001, MAX_POLLED_HZ),
        **_window(table, len(inputs)),
        **_live(table),
        "timeout_s": table.number("timeout_s", 5, 1, 3600),
    }


def _serial(table: Table) -> dict[str, Any]:
    baud = int(table.number("baud", 115200, 1, 1e8))
    if baud not in BAUDS:
        raise table.bad(f"baud = {baud} is unknown", f"known: {', '.join(map(str, sorted(BAUDS)))}")
    channels = int(table.number("channels", 1, 1, MAX_CHANNELS))
    keys = table.texts("keys")
    if keys and len(keys) != channels:
        raise table.bad(f"keys names {len(keys)} members, channels is {channels}", "name one for each channel")
    return {
        "path": str(table.path("path", None)),
        "baud": baud,
        "channels": channels,
        "keys": list(keys),
        "rate_hz": table.number("rate_hz", None, 0.001, MAX_RATE_HZ),
        **_window(table, channels),
        **_live(table),
        "gap_s": table.number("gap_s", 0.25, 0.001, 3600),
    }


def _csv(table: Table) -> dict[str, Any]:
    return {
        "path": str(table.path("path", None)),
        "columns": list(table.texts("columns")),
        "rate_hz": table.number("rate_hz", None, 0.001, MAX_RATE_HZ),
        **_window(table, 1),
        **_played(table),
    }


def _wav(table: Table) -> dict[str, Any]:
    return {"path": str(table.path("path", None)), **_window(table, 1), **_played(table)}


def _topic(table: Table) -> dict[str, Any]:
    topic = table.text("topic", None)
    if not TOPIC_PATTERN.fullmatch(topic):
        raise table.bad(
            f"topic = {topic[:60]!r} is no name",
            "give the last level alone, a-z 0-9 _ and -: samples for it are published below the device's own in/",
        )
    channels = int(table.number("channels", 1, 1, MAX_CHANNELS))
    return {
        "topic": topic,
        "channels": channels,
        "rate_hz": table.number("rate_hz", None, 0.001, MAX_RATE_HZ),
        **_window(table, channels),
        **_live(table),
        "gap_s": table.number("gap_s", 1, 0.001, 3600),
    }


def _window(table: Table, channels: int) -> dict[str, Any]:
    window = int(table.number("window", None, 1, MAX_WINDOW))
    if window * channels > MAX_WINDOW_NUMBERS:
        raise table.bad(f"a window of {window} samples of {channels} channels is too large", "use a shorter one")
    # 0: windows follow each other without a gap and without an overlap
    hop = int(table.number("hop", 0, 0, MAX_WINDOW))
    return {"window": window, "hop": hop or window}


def _live(table: Table) -> dict[str, Any]:
    return {
        "queue_frames": int(table.number("queue_frames", 4, 1, 64)),
        "stale_s": table.number("stale_s", 2, 0.1, 86400),
    }


def _played(table: Table) -> dict[str, Any]:
    return {
        "policy": table.choice("policy", "live", ("live", "every")),
        "loop": table.flag("loop", False),
        "queue_frames": int(table.number("queue_frames", 4, 1, 64)),
    }


SENSORS: Mapping[str, Callable[[Table], dict[str, Any]]] = {
    "iio": _iio,
    "serial": _serial,
    "csv": _csv,
    "wav": _wav,
    "topic": _topic,
}
