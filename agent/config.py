"""The one TOML file of a device, read once into frozen values. Unknown keys are errors that name the nearest known one.

It is not where secrets live (see `agent.daemon.keys`) nor where releases are chosen (the director's document decides).
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import ConfigError, Reason
from agent.profile import DELEGATES
from ota.release import LINE_PATTERN

DEFAULT_PATH = Path("/etc/edge-agent/agent.toml")


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """One camera, file or sensor. `options` are checked here and handed to the source process as they are."""

    name: str
    kind: str
    options: Mapping[str, Any]


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
class TelemetryConfig:
    """`results`: `all` sends every result, `off` sends none; metrics and events are always sent."""

    results: str
    interval_s: float


@dataclass(frozen=True, slots=True)
class UpdateConfig:
    """Limits of an update. Probation asks for `probation_results` results and `probation_s` seconds, both scaled."""

    poll_s: float
    probation_s: float
    probation_results: int
    probation_scale: float
    load_timeout_s: float
    run_timeout_s: float
    trial_memory_mb: int
    metered: bool


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
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(
            Reason.BAD_CONFIG, f"{path}: {e}", hint="mend the file; edge-agent config check tests it"
        ) from e
    return parse(data, path)


def parse(data: Mapping[str, Any], path: Path) -> Config:
    """Check `data`, the parsed TOML of `path`; relative paths inside are taken from the folder of `path`.

    Raises:
        ConfigError: as `load`.
    """
    top = _Table(data, f"{path.name}", path.parent)
    telemetry = top.table("telemetry")
    update = top.table("update")
    config = Config(
        path=path,
        state_dir=top.path("state_dir", "/var/lib/edge-agent"),
        run_dir=top.path("run_dir", "/run/edge-agent"),
        profile=top.text("profile", "auto"),
        workers=top.choice("workers", "process", ("process", "unit")),
        sources=tuple(_source(t) for t in top.tables("source")),
        lines=tuple(_line(t) for t in top.tables("line")),
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
            trial_memory_mb=int(update.number("trial_memory_mb", 1024, 16, 1 << 20)),
            metered=update.flag("metered", False),
        ),
    )
    for table in (telemetry, update, top):
        table.finish()
    names = [s.name for s in config.sources]
    for line in config.lines:
        if line.source not in names:
            raise top.bad(f"line {line.name!r}: source {line.source!r} is not among {names}", "name a [[source]] table")
    for what in (names, [line.name for line in config.lines]):
        if len(set(what)) != len(what):
            raise top.bad(f"two tables are called {max(what, key=what.count)!r}", "give each its own name")
    return config


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


def _source(table: _Table) -> SourceConfig:
    kind = table.choice("kind", None, ("video",))
    name = table.text("name", None)
    options = {
        "path": str(table.path("path", None)),
        "policy": table.choice("policy", "live", ("live", "every")),
        "loop": table.flag("loop", False),
        "queue_frames": int(table.number("queue_frames", 4, 1, 64)),
        "fps": table.number("fps", 0, 0, 1000),
    }
    table.finish()
    return SourceConfig(name, kind, options)


def _line(table: _Table) -> LineConfig:
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


class _Table:
    """Typed access to one TOML table that remembers which keys were asked for."""

    def __init__(self, data: Mapping[str, Any], where: str, base: Path) -> None:
        self._data = data
        self._where = where
        self._base = base
        self._known: set[str] = set()

    def bad(self, why: str, hint: str) -> ConfigError:
        return ConfigError(Reason.BAD_CONFIG, f"{self._where}: {why}", hint=hint)

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        self._known.add(key)
        value = self._data.get(key, default)
        if value is None:
            # a misspelt key explains a missing one
            for near in difflib.get_close_matches(key, [k for k in self._data if k not in self._known], n=1):
                raise self.bad(f"unknown key {near!r}", f"did you mean {key!r}?")
            raise self.bad(f"{key} is missing", f"add {key} = …, {what}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.bad(f"{key} = {value!r} is not {what}", "see docs/reference/config.md")
        return value

    def text(self, key: str, default: str | None) -> str:
        return str(self._get(key, default, (str,), "a text"))

    def choices(self, key: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        value = self._get(key, [], (list,), "a list of texts")
        for item in value:
            if item not in allowed:
                raise self.bad(f"{key}: {item!r} is not one of {', '.join(allowed)}", _nearest(str(item), allowed))
        return tuple(value)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, default, (bool,), "true or false"))

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = float(self._get(key, default, (int, float), "a number"))
        if not low <= value <= high:
            raise self.bad(f"{key} = {value:g} is not between {low:g} and {high:g}", "choose a value in that range")
        return value

    def choice(self, key: str, default: str | None, allowed: tuple[str, ...]) -> str:
        value = self.text(key, default)
        if value not in allowed:
            raise self.bad(f"{key} = {value!r} is not one of {', '.join(allowed)}", _nearest(value, allowed))
        return value

    def path(self, key: str, default: str | None) -> Path:
        return (self._base / self.text(key, default)).absolute()

    def table(self, key: str) -> _Table:
        return _Table(self._get(key, {}, (dict,), "a table"), f"{self._where}: [{key}]", self._base)

    def tables(self, key: str) -> list[_Table]:
        value = self._get(key, [], (list,), "a list of tables")
        if not all(isinstance(item, dict) for item in value):
            raise self.bad(f"{key} is not a list of tables", f"write [[{key}]]")
        return [_Table(item, f"{self._where}: [[{key}]] {i + 1}", self._base) for i, item in enumerate(value)]

    def finish(self) -> None:
        """Refuse keys nobody asked for."""
        for key in self._data:
            if key not in self._known:
                raise self.bad(f"unknown key {key!r}", _nearest(key, tuple(sorted(self._known))))


def _nearest(word: str, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(allowed)}"
