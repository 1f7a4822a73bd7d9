"""The reference is complete and says what the code says; links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from agent import config
from agent.configtable import Table
from agent.errors import ConfigError
from agent.errors import Reason as AgentReason
from agent.errors import exit_code as agent_exit_code
from agent.ruleconfig import RuleConfig, parse_rule
from agent.sourceconfig import parse_options
from ota.errors import Reason as OtaReason
from ota.errors import exit_code as ota_exit_code
from tests.docs.documents import REFERENCE, ROOT, blocks, documents

RESERVED = "reserved: not raised by this version"


def _rows(text: str) -> list[list[str]]:
    """Cells of every table row below a header."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    return [row for row in rows if not set("".join(row)) <= set("-: ")]


@pytest.fixture(scope="module")
def make_cli() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli_under_test", REFERENCE / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_md_is_what_its_script_makes_of_the_parsers(make_cli: ModuleType) -> None:
    hint = "python docs/reference/make_cli.py > docs/reference/cli.md"
    assert (REFERENCE / "cli.md").read_text() == make_cli.document(), hint


def test_every_exit_code_of_a_reason_is_explained(make_cli: ModuleType) -> None:
    assert make_cli.used_exit_codes() == set(make_cli.EXIT_CODES) - {0, 130}


# --- reasons.md ------------------------------------------------------------------------------------------------------


def _reasons() -> dict[str, list[str]]:
    rows = [row for row in _rows((REFERENCE / "reasons.md").read_text()) if row[0] != "reason"]
    names = [row[0].strip("`") for row in rows]
    assert len(set(names)) == len(names), "a reason stands twice"
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_reason_is_documented_with_its_exit_code() -> None:
    codes: dict[str, list[str]] = {}
    for reason in AgentReason:
        codes.setdefault(reason.value, []).append(str(agent_exit_code(reason)))
    for other in OtaReason:
        codes.setdefault(other.value, []).append(str(ota_exit_code(other)))
    documented = _reasons()
    assert documented.keys() == codes.keys()
    for name, (exit_codes, meaning, advice) in documented.items():
        assert exit_codes == ", ".join(dict.fromkeys(codes[name])), name
        assert meaning, name
        assert advice, name


def test_a_reason_is_called_reserved_exactly_when_no_module_raises_it() -> None:
    used: set[str] = set()
    for path in (p for package in ("agent", "ota") for p in (ROOT / package).rglob("*.py") if p.name != "errors.py"):
        used |= {name.lower() for name in re.findall(r"Reason\.([A-Z][A-Z_]+)\b", path.read_text())}
    documented = _reasons()
    assert {name for name, row in documented.items() if row[1] == RESERVED} == documented.keys() - used


# --- config.md -------------------------------------------------------------------------------------------------------


_TABLE = re.compile(r"`(?:\[\[?(\w+)\]?\]|kind = \"(\w+)\")`")
# what a source of each kind cannot be without
LEAST: dict[str, dict[str, object]] = {
    "video": {"path": "/a"},
    "folder": {"path": "/a"},
    "camera": {"device": "/dev/video0"},
    "rtsp": {"url": "rtsp://a/"},
    "http": {"url": "http://a/"},
    "pipe": {"command": ["a"], "format": "mjpeg"},
    "iio": {"device": "adxl345", "inputs": ["accel_x"], "rate_hz": 100, "window": 4, "hop": 4},
    "serial": {"path": "/dev/ttyUSB0", "rate_hz": 100, "window": 4, "hop": 4},
    "topic": {"topic": "pump", "rate_hz": 100, "window": 4, "hop": 4},
    "csv": {"path": "/a", "rate_hz": 100, "window": 4, "hop": 4},
    "wav": {"path": "/a", "window": 4, "hop": 4},
}


def _table(match: re.Match[str]) -> str:
    """`line` for `[[line]]`, `source rtsp` for the options of that kind."""
    return match[1] or f"source {match[2]}"


def _documented_config() -> dict[str, dict[str, str]]:
    """Default by key by table (`""`, `source`, `source video`, `line`, `telemetry`, `update`)."""
    found: dict[str, dict[str, str]] = {"": {}}
    table = ""
    for line in (REFERENCE / "config.md").read_text().splitlines():
        if match := _TABLE.match(line):
            table = _table(match)
            found[table] = {}
        for row in _rows(line):
            if row[0] != "key":
                found[table][row[0].strip("`")] = row[1].strip("`")
    return found


def test_config_md_lists_exactly_the_keys_of_agent_toml() -> None:
    documented = _documented_config()
    example = config.parse(tomllib.loads(config.example()), Path("/etc/edge-agent/agent.toml"))

    def fields(value: object) -> set[str]:
        return {field.name for field in dataclasses.fields(value)}  # type: ignore[arg-type]

    tables = {"sources", "lines", "rules", "capture", "broker", "telemetry", "update", "governor"}
    kinds = {f"source {kind}" for kind in LEAST}
    assert documented.keys() - kinds == {"", "source", "line", "rule"} | tables - {"sources", "lines", "rules"}
    assert documented[""].keys() == fields(example) - tables - {"path"}
    assert documented["rule"].keys() == fields(_rule())
    assert documented["capture"].keys() == fields(example.capture)
    for kind, least in LEAST.items():
        options = parse_options(kind, Table(least, "source", Path("/")))
        assert documented["source"].keys() | documented[f"source {kind}"].keys() == {"name", "kind", *options}, kind
    assert documented["line"].keys() == fields(example.lines[0])
    assert documented["broker"].keys() == fields(example.broker)
    assert documented["telemetry"].keys() == fields(example.telemetry)
    assert documented["update"].keys() == fields(example.update)
    assert documented["governor"].keys() == fields(example.governor)


def _rule() -> RuleConfig:
    return parse_rule(Table({"name": "gate", "line": "l"}, "rule", Path("/")))


def test_config_md_gives_the_defaults_that_hold() -> None:
    documented = _documented_config()
    minimal = {"source": [{"name": "a", "kind": "video", "path": "/a"}], "line": [{"name": "l", "source": "a"}]}
    parsed = config.parse(minimal, Path("/etc/edge-agent/agent.toml"))

    def written(value: object) -> str:
        if value in (None, (), [], b""):
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)

    source, line = parsed.sources[0], parsed.lines[0]
    for key in ("state_dir", "run_dir", "profile", "workers"):
        assert documented[""][key] == str(getattr(parsed, key))
    assert documented["source"]["queue_frames"] == written(source.options["queue_frames"])
    for kind, least in LEAST.items():
        options = parse_options(kind, Table(least, "source", Path("/")))
        for key in documented[f"source {kind}"].keys() - least.keys():
            assert documented[f"source {kind}"][key] == written(options[key]), f"{kind} {key}"
    for key in ("threads", "explore"):
        assert documented["line"][key] == written(getattr(line, key))
    for table, value in (
        *(("broker", parsed.broker), ("telemetry", parsed.telemetry), ("update", parsed.update)),
        *(("governor", parsed.governor), ("capture", parsed.capture), ("rule", _rule())),
    ):
        for key, default in documented[table].items():
            if (table, key) in (("rule", "name"), ("rule", "line"), ("rule", "below")):
                continue  # needed, or that of another key
            assert default == written(getattr(value, key)), f"[{table}] {key}"


def _ranges() -> list[tuple[str, str, float, float]]:
    found = []
    table = ""
    for line in (REFERENCE / "config.md").read_text().splitlines():
        if match := _TABLE.match(line):
            table = _table(match)
        if match := re.match(r"\| `(\w+)` \|[^|]*\| ([\d.]+) to ([\d.]+) \|", line):
            found.append((table, match[1], float(match[2]), float(match[3])))
    return found


def test_config_md_gives_the_ranges_that_hold() -> None:
    def parse(table: str, key: str, value: float) -> config.Config:
        table, _, kind = table.partition(" ")
        source = {"name": "a", "kind": kind or "video", **LEAST[kind or "video"]}
        tables = {
            "source": [source],
            "line": [{"name": "l", "source": "a"}],
            "telemetry": {},
            "update": {},
            "broker": {},
            "governor": {},
            "capture": {},
            "rule": [{"name": "gate", "line": "l"}],
        }
        where = tables[table]
        (where[0] if isinstance(where, list) else where)[key] = value
        return config.parse(tables, Path("/etc/edge-agent/agent.toml"))

    assert len(_ranges()) > 8
    for table, key, low, high in _ranges():
        for value in (low, high):
            parse(table, key, int(value) if value.is_integer() else value)
        for value in (low / 2 if low else -1, 2 * high):
            with pytest.raises(ConfigError, match=key):
                parse(table, key, value)


def test_every_toml_table_for_a_device_in_the_documents_is_accepted() -> None:
    shown = [
        block
        for path in documents()
        for block in blocks(path)
        if block.info in ("toml", "toml example") and "[[line]]" in block.text
    ]
    assert shown
    for block in shown:
        config.parse(tomllib.loads(block.text), Path("/etc/edge-agent/agent.toml"))


# --- telemetry.md ----------------------------------------------------------------------------------------------------


def test_every_kind_of_event_and_reason_of_a_drop_is_documented() -> None:
    text = (REFERENCE / "telemetry.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "agent").rglob("*.py"))
    kinds = set(re.findall(r"""(?:telemetry\.event|on_event)\(\s*"(\w+)\"""", code))
    assert {"update", "verdicts", "command"} <= kinds
    documented = {row[0].strip("`") for row in _rows(text) if len(row) == 3} | {"update", "verdicts"}
    assert kinds <= documented, kinds - documented
    assert {"## evt: update", "## evt: verdicts"} <= set(text.splitlines())
    drops = re.findall(r'^[A-Z_]+ = "(\w+)"$', (ROOT / "agent/worker/dispatch.py").read_text(), re.MULTILINE)
    assert {"backlog", "worker_lost"} <= set(drops)
    for reason in drops:
        assert f"`{reason}`" in text or reason in ("live", "every"), reason


# --- links -----------------------------------------------------------------------------------------------------------


def _anchors(path: Path) -> set[str]:
    """Anchors of a Markdown document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), target
