"""Opens the sources that are sensors. Each kind is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.configtable import Table
from agent.sourceconfig import parse_options

if TYPE_CHECKING:
    from agent.worker.sources import LiveSource, Source


def open_sensor(kind: str, options: Mapping[str, Any]) -> Source | LiveSource:
    """Open the sensor of `kind` (iio, serial, csv, wav, topic) that `options` describe, as `agent.sensorconfig` has
    them.

    Raises:
        ConfigError: `bad_config`.
        SourceError: `source_missing` or `source_unreadable`.
    """
    checked = parse_options(kind, Table(options, f"{kind} source", Path("/")))
    if kind == "iio":
        from agent.worker.sources.iio import Iio

        return Iio(checked)
    if kind == "serial":
        from agent.worker.sources.serial import Serial

        return Serial(checked)
    if kind == "topic":
        from agent.worker.sources.topic import Topic

        return Topic(checked)
    from agent.worker.sources.replay import Csv, Replay, Wav

    path = str(checked["path"])
    recording = Wav(path) if kind == "wav" else Csv(path, checked["columns"], checked["rate_hz"])
    return Replay(recording, checked)
