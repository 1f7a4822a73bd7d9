"""The one TOML file of a device, read once into frozen values. Unknown keys are errors that name the nearest known one.

It is not where secrets live (see `agent.daemon.keys`) nor where releases are chosen (the director's document decides).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent.configtable import Table
from agent.errors import ConfigError, Reason
from agent.governorconfig import GovernorConfig, parse_governor
from agent.lineconfig import LineConfig, following, parse_line
from agent.ruleconfig import MAX_RULES, CaptureConfig, RuleConfig, parse_capture, parse_rule
from agent.sourceconfig import NETWORK_KINDS, SourceConfig, parse_source
from ota.client.policy import parse_window
from ota.client.transports.address import parse_address

_SLOWEST_KBIT_S = 16.0
DEFAULT_PATH = Path("/etc/edge-agent/agent.toml")


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
    (0 for no limit) are what `ota.client.policy` is told; `https` is a second way to the repository, empty for none. A
    delegate that has not loaded within `load_timeout_s` may go on compiling beside another that serves, for
    `compile_timeout_s` in all.
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
    compile_timeout_s: float = 900.0


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
    rules: tuple[RuleConfig, ...] = ()
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    worker_python: Path | None = None

    @property
    def control_socket(self) -> Path:
        """Where the daemon answers the command line."""
        return self.run_dir / "control.sock"

    @property
    def source_socket(self) -> Path:
        """Where the host of the sources that need the network finds the daemon."""
        return self.run_dir / "source.sock"

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
    config = Config(
        path=path,
        state_dir=top.path("state_dir", "/var/lib/edge-agent"),
        run_dir=top.path("run_dir", "/run/edge-agent"),
        profile=top.text("profile", "auto"),
        workers=top.choice("workers", "process", ("process", "unit")),
        worker_python=top.path("worker_python", None) if top.has("worker_python") else None,
        sources=tuple(parse_source(t) for t in top.tables("source")),
        lines=following(tuple(parse_line(t) for t in top.tables("line")), top),
        rules=tuple(parse_rule(t) for t in top.tables("rule")),
        capture=parse_capture(top.table("capture")),
        governor=parse_governor(top.table("governor")),
        broker=_broker(top.table("broker")),
        telemetry=_telemetry(top.table("telemetry")),
        update=_update(top.table("update")),
    )
    top.finish()
    _check_whole(config, top)
    return config


def _check_whole(config: Config, top: Table) -> None:
    """What the tables must agree on.

    Raises:
        ConfigError: `bad_config`.
    """
    _check_rules(config, top)
    if config.worker_python is not None and config.workers == "unit":
        raise top.bad(
            'worker_python is for workers = "process"; a unit names its own interpreter',
            "see docs/guides/device.md: a drop-in for edge-worker.service",
        )
    names = [s.name for s in config.sources]
    for line in config.lines:
        if line.source not in names:
            raise top.bad(f"line {line.name!r}: source {line.source!r} is not among {names}", "name a [[source]] table")
        if line.fused:
            _check_fused(config, line, top)
    for what in (names, [line.name for line in config.lines]):
        if len(set(what)) != len(what):
            raise top.bad(f"two tables are called {max(what, key=what.count)!r}", "give each its own name")


def fuses(config: Config, source: SourceConfig, wished: bool) -> bool:
    """Whether the one line of `source` reads it in its own process: where that line, or `wished` the profile, says so.

    It can be where the source is local, and the line's alone.
    """
    lines = [line for line in config.lines if line.source == source.name]
    local = source.kind not in (*NETWORK_KINDS, "topic")
    return local and len(lines) == 1 and (wished or lines[0].fused)


def _check_fused(config: Config, line: LineConfig, top: Table) -> None:
    """A line that asks for one process must be able to have it."""
    if not fuses(config, next(s for s in config.sources if s.name == line.source), True):
        raise top.bad(
            f"line {line.name!r}: fused needs a local source that no other line looks at, {line.source!r} is not such",
            "leave fused out: source and model then run in processes of their own",
        )


def _check_rules(config: Config, top: Table) -> None:
    """What a rule and the rest of the file must agree on."""
    lines = [line.name for line in config.lines]
    for rule in config.rules:
        mine = [other.name for other in config.rules if other.line == rule.line]
        if rule.line not in lines:
            raise top.bad(f"rule {rule.name!r}: line {rule.line!r} is not among {lines}", "name a [[line]] table")
        if mine.count(rule.name) > 1:
            raise top.bad(f"two rules of line {rule.line!r} are called {rule.name!r}", "give each its own name")
        if len(mine) > MAX_RULES:
            raise top.bad(f"line {rule.line!r} has {len(mine)} rules", f"at most {MAX_RULES}")
        if rule.snapshot and not config.capture.operator_key:
            raise top.bad(
                f"rule {rule.name!r}: snapshot needs the key that pictures are sealed to",
                "set operator_key in [capture]; edge-ota capture-key REPO prints it",
            )


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
    for key in ("state_dir", "run_dir", "workers", "worker_python"):
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
    _check_reach(parsed, own)
    if parsed.capture.operator_key not in (b"", own.capture.operator_key):
        raise ConfigError(
            Reason.BAD_CONFIG,
            f"settings: [capture]: operator_key is another than {own.path} has",
            hint=f"who opens this device's pictures is said on the device: put the key into {own.path}",
        )
    return replace(
        parsed, state_dir=own.state_dir, run_dir=own.run_dir, workers=own.workers, worker_python=own.worker_python
    )


def _check_reach(wanted: Config, own: Config) -> None:
    """Settings come from the fleet: they may use, change and drop what the device's own file has, but bring neither a
    program that is run nor an address that is called."""
    known = {source.reach for source in own.sources}
    for source in wanted.sources:
        if source.reach and source.reach not in known:
            what = "command" if source.kind == "pipe" else "address"
            raise ConfigError(
                Reason.BAD_CONFIG,
                f"settings: source {source.name!r} brings a {what} that {own.path} does not have",
                hint=f"put that source into {own.path} on the device; settings may then use it",
            )


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


def _broker(table: Table) -> BrokerConfig:
    broker = BrokerConfig(
        host=table.text("host", ""),
        port=int(table.number("port", 0, 0, 65535)),
        ca=table.path("ca", None) if table.has("ca") else None,
    )
    table.finish()
    return broker


def _telemetry(table: Table) -> TelemetryConfig:
    telemetry = TelemetryConfig(
        results=table.choice("results", "all", ("all", "off")),
        interval_s=table.number("interval_s", 1.0, 0.1, 3600),
    )
    table.finish()
    return telemetry


def _update(table: Table) -> UpdateConfig:
    update = UpdateConfig(
        poll_s=table.number("poll_s", 3600, 1, 7 * 86400),
        probation_s=table.number("probation_s", 600, 0, 86400),
        probation_results=int(table.number("probation_results", 900, 1, 1e7)),
        probation_scale=table.number("probation_scale", 1.0, 0.0001, 100),
        load_timeout_s=table.number("load_timeout_s", 30, 1, 3600),
        run_timeout_s=table.number("run_timeout_s", 10, 0.1, 600),
        crash_limit=int(table.number("crash_limit", 5, 2, 100)),
        crash_window_s=table.number("crash_window_s", 600, 1, 86400),
        settings_probation_s=table.number("settings_probation_s", 120, 1, 3600),
        compile_timeout_s=table.number("compile_timeout_s", 900, 1, 86400),
        trial_memory_mb=int(table.number("trial_memory_mb", 1024, 16, 1 << 20)),
        metered=table.flag("metered", False),
        on_metered=table.choice("on_metered", "full", ("never", "deltas", "full")),
        windows=tuple(table.parsed("windows", parse_window)),
        rate_kbit_s=_rate(table),
        https=_https(table),
    )
    table.finish()
    return update


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
