"""The one TOML file of a device, read once into frozen values. Unknown keys are errors that name the nearest known one.

It is not where secrets live (see `agent.daemon.keys`) nor where releases are chosen (the director's document decides).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.configtable import Table
from agent.errors import ConfigError, Reason
from agent.profile import DELEGATES
from agent.sourceconfig import SourceConfig, parse_source
from ota.client.policy import parse_window
from ota.client.transports.address import parse_address
from ota.release import LINE_PATTERN

_SLOWEST_KBIT_S = 16.0
DEFAULT_PATH = Path("/etc/edge-agent/agent.toml")


@dataclass(frozen=True, slots=True)
class LineConfig:
    """One model line and the source it looks at.

    `explore`: whether components that are not needed may be fetched to measure them (`never`, `unmetered`, `always`).
    """

    name: str
    source: str
    threads: int
    explore: str
    delegates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Where the broker is, instead of what the enrolment says: empty, 0 and None leave that as it is."""

    host: str = ""
    port: int = 0
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """`results`: `all` sends every result, `off` sends none; metrics and events are always sent."""

    results: str
    interval_s: float


@dataclass(frozen=True, slots=True)
class UpdateConfig:
    """Limits of an update. Probation asks for `probation_results` results and `probation_s` seconds, both scaled.

    `crash_limit` crashes of a committed release within `crash_window_s` roll it back; new settings that do not bring
    link and frames within `settings_probation_s` are taken back. `metered`, `on_metered`, `windows` and `rate_kbit_s`
    (0 for no limit) are what `ota.client.policy` is told; `https` is a second way to the repository, empty for none.
    """

    poll_s: float
    probation_s: float
    probation_results: int
    probation_scale: float
    load_timeout_s: float
    run_timeout_s: float
    crash_limit: int
    crash_window_s: float
    settings_probation_s: float
    trial_memory_mb: int
    metered: bool
    on_metered: str = "full"
    windows: tuple[str, ...] = ()
    rate_kbit_s: float = 0.0
    https: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    """Everything `agent.toml` says."""

    path: Path
    state_dir: Path
    run_dir: Path
    profile: str
    workers: str
    sources: tuple[SourceConfig, ...]
    lines: tuple[LineConfig, ...]
    telemetry: TelemetryConfig
    update: UpdateConfig
    broker: BrokerConfig = BrokerConfig()

    @property
    def control_socket(self) -> Path:
        """Where the daemon answers the command line."""
        return self.run_dir / "control.sock"

    @property
    def worker_socket(self) -> Path:
        """Where the host of the workers finds the daemon."""
        return self.run_dir / "worker.sock"


def load(path: Path) -> Config:
    """Read `path`.

    Raises:
        ConfigError: `bad_config`, naming the key and what is allowed.
    """
    try:
        data = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError as e:
        raise ConfigError(
            Reason.BAD_CONFIG, f"{path} does not exist", hint="edge-agent config example > agent.toml writes one"
        ) from e
    except (OSError, ValueError, RecursionError) as e:  # tomllib: also for integers of thousands of digits
        raise ConfigError(
            Reason.BAD_CONFIG, f"{path}: {e}", hint="mend the file; edge-agent config check tests it"
        ) from e
    return parse(data, path)


def parse(data: Mapping[str, Any], path: Path) -> Config:
    """Check `data`, the parsed TOML of `path`; relative paths inside are taken from the folder of `path`.

    Raises:
        ConfigError: as `load`.
    """
    top = Table(data, f"{path.name}", path.parent)
    telemetry = top.table("telemetry")
    update = top.table("update")
    broker = top.table("broker")
    config = Config(
        path=path,
        state_dir=top.path("state_dir", "/var/lib/edge-agent"),
        run_dir=top.path("run_dir", "/run/edge-agent"),
        profile=top.text("profile", "auto"),
        workers=top.choice("workers", "process", ("process", "unit")),
        sources=tuple(parse_source(t) for t in top.tables("source")),
        lines=tuple(_line(t) for t in top.tables("line")),
        broker=BrokerConfig(
            host=broker.text("host", ""),
            port=int(broker.number("port", 0, 0, 65535)),
            ca=broker.path("ca", None) if broker.has("ca") else None,
        ),
        telemetry=TelemetryConfig(
            results=telemetry.choice("results", "all", ("all", "off")),
            interval_s=telemetry.number("interval_s", 1.0, 0.1, 3600),
        ),
        update=UpdateConfig(
            poll_s=update.number("poll_s", 3600, 1, 7 * 86400),
            probation_s=update.number("probation_s", 600, 0, 86400),
            probation_results=int(update.number("probation_results", 900, 1, 1e7)),
            probation_scale=update.number("probation_scale", 1.0, 0.0001, 100),
            load_timeout_s=update.number("load_timeout_s", 30, 1, 3600),
            run_timeout_s=update.number("run_timeout_s", 10, 0.1, 600),
            crash_limit=int(update.number("crash_limit", 5, 2, 100)),
            crash_window_s=update.number("crash_window_s", 600, 1, 86400),
            settings_probation_s=update.number("settings_probation_s", 120, 1, 3600),
            trial_memory_mb=int(update.number("trial_memory_mb", 1024, 16, 1 << 20)),
            metered=update.flag("metered", False),
            on_metered=update.choice("on_metered", "full", ("never", "deltas", "full")),
            windows=tuple(update.parsed("windows", parse_window)),
            rate_kbit_s=_rate(update),
            https=_https(update),
        ),
    )
    for table in (telemetry, update, broker, top):
        table.finish()
    names = [s.name for s in config.sources]
    for line in config.lines:
        if line.source not in names:
            raise top.bad(f"line {line.name!r}: source {line.source!r} is not among {names}", "name a [[source]] table")
    for what in (names, [line.name for line in config.lines]):
        if len(set(what)) != len(what):
            raise top.bad(f"two tables are called {max(what, key=what.count)!r}", "give each its own name")
    return config


def parse_settings(text: str, own: Config) -> Config:
    """Check settings that are to take the place of `own`, the device's own file; what they leave out has its default,
    but for where the state lies and how workers run, which stay the device's own.

    Raises:
        ConfigError: `bad_config`, as `load`, also when they want to move the state, the sockets or the workers.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(Reason.BAD_CONFIG, f"settings: {e}", hint="mend the settings") from e
    parsed = parse(data, own.path)
    for key in ("state_dir", "run_dir", "workers"):
        if key in data and getattr(parsed, key) != getattr(own, key):
            raise ConfigError(
                Reason.BAD_CONFIG,
                f"settings: {key} = {data[key]!r} is not for settings to change, it is {getattr(own, key)}",
                hint=f"leave {key} out; change it in {own.path} on the device",
            )
    if parsed.broker.ca is not None and not os.access(parsed.broker.ca, os.R_OK):
        raise ConfigError(
            Reason.BAD_CONFIG, f"settings: [broker]: ca {parsed.broker.ca} cannot be read", hint="bring the file first"
        )
    return replace(parsed, state_dir=own.state_dir, run_dir=own.run_dir, workers=own.workers)


_EXAMPLE = """\
# Edge runtime agent: one file for the whole device. `edge-agent config check` tests it.
# state_dir = "/var/lib/edge-agent"
# workers = "unit"            # "unit": edge-worker.service; "process": children of the daemon

[[source]]
name = "front"
kind = "video"                # a video file
path = "/srv/front.mp4"
policy = "live"               # "live": wall-clock pace, newest frame wins; "every": no frame is skipped
loop = true

[[line]]
name = "parts"                # the model line that the fleet publishes
source = "front"
"""


def example() -> str:
    """A commented file to start from."""
    return _EXAMPLE


def _line(table: Table) -> LineConfig:
    name = table.text("name", None)
    if not LINE_PATTERN.fullmatch(name):
        raise table.bad(f"name {name!r} is not a line", "use a-z, 0-9 and -, at most 32 characters")
    line = LineConfig(
        name=name,
        source=table.text("source", None),
        threads=int(table.number("threads", 1, 1, 64)),
        explore=table.choice("explore", "unmetered", ("never", "unmetered", "always")),
        delegates=table.choices("delegates", tuple(DELEGATES)),
    )
    table.finish()
    return line


def _rate(table: Table) -> float:
    rate = table.number("rate_kbit_s", 0, 0, 1e7)
    if 0 < rate < _SLOWEST_KBIT_S:
        raise table.bad(f"rate_kbit_s = {rate:g} is too slow to ever end", f"use 0 or at least {_SLOWEST_KBIT_S:g}")
    return rate


def _https(table: Table) -> str:
    text = table.text("https", "")
    if text:
        try:
            parse_address(text)
        except ValueError as e:
            raise table.bad(f"https: {e}", 'write https = "https://host:port/path"') from e
    return text
