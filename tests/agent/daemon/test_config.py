"""agent.toml: what it may say, and how a wrong one is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from agent import config, profile
from agent.daemon import enroll
from agent.errors import ConfigError, Reason

GOOD = """
state_dir = "state"
[[source]]
name = "belt"
kind = "video"
path = "clip.avi"
[[line]]
name = "parts"
source = "belt"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, GOOD))
    assert loaded.state_dir == tmp_path / "state"
    assert loaded.sources[0].options["path"] == str(tmp_path / "clip.avi")
    assert loaded.lines[0].source == "belt"


def test_defaults_are_the_production_values(tmp_path: Path) -> None:
    update = config.load(write(tmp_path, GOOD)).update
    assert (update.probation_s, update.probation_results, update.probation_scale) == (600, 900, 1.0)


RULE = """
[[rule]]
name = "gate"
line = "parts"
"""
KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def test_a_rule_has_defaults_and_ends_where_it_began(tmp_path: Path) -> None:
    [rule] = config.load(write(tmp_path, GOOD + RULE + "above = 0.7")).rules
    assert (rule.above, rule.below, rule.gap_s, rule.snapshot) == (0.7, 0.7, 0.5, False)


def test_a_snapshot_needs_the_key_that_it_is_sealed_to(tmp_path: Path) -> None:
    wanted = GOOD + RULE + "snapshot = true\n"
    with pytest.raises(ConfigError, match="snapshot needs the key"):
        config.load(write(tmp_path, wanted))
    assert config.load(write(tmp_path, wanted + f'[capture]\noperator_key = "{KEY}"')).capture.operator_key[31] == 31


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RULE.replace("parts", "cars"), "line 'cars' is not among"),
        (RULE + RULE, "two rules of line 'parts' are called 'gate'"),
        (RULE + "below = 0.6", "below = 0.6 is over above = 0.5"),
        (RULE + "zone = [[0, 0], [1, 1]]", "zone has 2 corners"),
        (RULE + "zone = [[0, 0], [1, 1], [0, 480]]", "zone is not in shares of the frame"),
        (RULE + "zone = [0, 1, 2]", "is not a pair of numbers"),
        (RULE + "fro_s = 3", "unknown key 'fro_s'"),
        (RULE + '[capture]\noperator_key = "c2hvcnQ="', "operator_key is no key"),
        ("".join(RULE.replace("gate", f"gate {i}") for i in range(33)), "has 33 rules"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, GOOD + text))
    assert message in caught.value.message
    assert caught.value.hint


def test_the_example_is_a_valid_file(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, config.example()))
    assert [line.name for line in loaded.lines] == ["parts"]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (GOOD.replace('kind = "video"', 'kind = "vidoe"'), "kind = 'vidoe' is not one of", "did you mean 'video'?"),
        (GOOD + "\n[update]\nprobation = 3\n", "unknown key 'probation'", "did you mean 'probation_s'?"),
        (GOOD.replace('source = "belt"', 'source = "bolt"'), "source 'bolt' is not among", "[[source]]"),
        (GOOD.replace('name = "parts"', 'name = "Parts!"'), "is not a line", "a-z"),
        (GOOD.replace('path = "clip.avi"', ""), "path is missing", "add path"),
        (GOOD + "\n[telemetry]\ninterval_s = 0\n", "interval_s = 0 is not between", "range"),
        (GOOD + "\n[telemetry]\ninterval_s = true\n", "interval_s = True is not a number", "reference"),
        (GOOD + GOOD.split("[[line]]")[0].split("[[source]]")[1].join(("\n[[source]]", "")), "two tables", "own name"),
        ("state_dir = ", "Invalid value", "config check"),
    ],
)
def test_a_wrong_file_is_refused_with_key_and_hint(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, text))
    assert caught.value.reason is Reason.BAD_CONFIG
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        config.load(tmp_path / "none.toml")
    assert "config example" in caught.value.hint


OWN = {"source": [{"name": "a", "kind": "video", "path": "/a"}], "line": [{"name": "l", "source": "a"}]}
SETTINGS = '[[source]]\nname = "a"\nkind = "video"\npath = "/b"\n[[line]]\nname = "l"\nsource = "a"\n'


def own(**changes: object) -> config.Config:
    return config.parse({**OWN, **changes}, Path("/etc/edge-agent/agent.toml"))


def test_settings_keep_where_the_state_lies_and_how_workers_run() -> None:
    device = own(state_dir="/data/state", run_dir="/data/run", workers="unit")
    made = config.parse_settings(SETTINGS, device)
    assert (made.state_dir, made.run_dir, made.workers) == (device.state_dir, device.run_dir, "unit")
    assert made.sources[0].options["path"] == "/b"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('state_dir = "/elsewhere"', "state_dir"),
        ('run_dir = "/elsewhere"', "run_dir"),
        ('workers = "unit"', "workers"),
        ("[broker]\nca = '/absent.pem'", "/absent.pem"),
        ("[broker]\nport = 99999", "port"),
        ("[toaster]", "toaster"),
        ("poll_s = ", "settings"),
        (f'[capture]\noperator_key = "{"A" * 43}="', "operator_key is another"),
    ],
)
def test_settings_that_reach_too_far_or_cannot_be_read_are_refused(line: str, named: str) -> None:
    text = SETTINGS + line if line.startswith("[") else f"{line}\n{SETTINGS}"
    with pytest.raises(ConfigError, match=named) as refused:
        config.parse_settings(text, own())
    assert refused.value.reason is Reason.BAD_CONFIG
    assert refused.value.hint


def test_settings_may_use_the_key_for_pictures_that_the_device_has_and_drop_it() -> None:
    key = f'[capture]\noperator_key = "{"A" * 43}="'
    device = own(capture={"operator_key": "A" * 43 + "="})
    assert config.parse_settings(SETTINGS + key, device).capture.operator_key == bytes(32)
    assert config.parse_settings(SETTINGS, device).capture.operator_key == b""


def test_the_broker_of_agent_toml_replaces_what_it_names_of_the_enrolment(tmp_path: Path) -> None:
    known = enroll.Enrolment(**dict.fromkeys((f.name for f in fields(enroll.Enrolment)), None))  # type: ignore[arg-type]
    known = replace(known, host="old", port=8883, ca=Path("/old.pem"))
    for table, expected in (
        ({}, ("old", 8883, Path("/old.pem"))),
        ({"host": "new"}, ("new", 8883, Path("/old.pem"))),
        ({"port": 1884, "ca": str(tmp_path / "ca.pem")}, ("old", 1884, tmp_path / "ca.pem")),
    ):
        found = enroll.with_broker(known, own(broker=table).broker)
        assert (found.host, found.port, found.ca) == expected


def test_an_exclusive_delegate_has_to_be_one_of_the_profile() -> None:
    data = {"name": "b", "title": "b", "recognition": "untested", "delegates": ["onnx:cpu"], "exclusive": ["onnx:cpu"]}
    assert profile.parse(data, "b.toml").exclusive == ("onnx:cpu",)
    with pytest.raises(ConfigError, match="litert:cpu") as refused:
        profile.parse({**data, "exclusive": ["litert:cpu"]}, "b.toml")
    assert refused.value.reason is Reason.BAD_PROFILE
