"""agent.toml: what it may say, and how a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import config
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
