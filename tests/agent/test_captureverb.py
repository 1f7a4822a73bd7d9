"""`edge-agent capture` beside a daemon that is dead, and `edge-ota capture-open` at the operator's."""

from __future__ import annotations

import base64
import datetime
import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from agent import captureverb, cli, memfd
from agent.daemon.captures import FOLDER, Captures
from agent.ruleconfig import CaptureConfig
from ota.client.fsops import Fs
from ota.publisher import cli as publisher_cli

PICTURE = b"\xff\xd8 a picture"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fleet") / "repo"
    assert publisher_cli.main(["init", str(path)]) == 0
    return path


def operator_key(repository: Path, capsys: pytest.CaptureFixture[str]) -> bytes:
    capsys.readouterr()
    assert publisher_cli.main(["capture-key", str(repository), "--json"]) == 0
    key = base64.b64decode(json.loads(capsys.readouterr().out)["operator_key"])
    X25519PublicKey.from_public_bytes(key)
    return key


@pytest.fixture
def device(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """agent.toml of a device that kept one picture."""
    key = operator_key(repository, capsys)
    state = tmp_path / "state"
    state.mkdir()
    now = datetime.datetime.now(datetime.UTC)
    captures = Captures(Fs(state), CaptureConfig(key), "cam-1", clock=lambda: 0.0, now=lambda: now)
    fd = memfd.of_bytes("picture", PICTURE)
    assert captures.keep(fd, {"line": "person", "rule": "gate", "score": 0.9})
    os.close(fd)
    path = tmp_path / "agent.toml"
    path.write_text(f'state_dir = "{state}"\n')
    return path


def test_the_key_is_made_once_and_the_same_ever_after(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert operator_key(repository, capsys) == operator_key(repository, capsys)


def test_what_was_kept_is_listed_copied_once_and_opened_by_the_operator(
    device: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["capture", "list", "--config", str(device)]) == 0
    told = capsys.readouterr().out
    assert "line person  rule gate  score 0.9" in told
    assert "1 captures" in told

    stick = tmp_path / "stick"
    for copied in (1, 0):
        assert cli.main(["capture", "copy", "--to", str(stick), "--config", str(device), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["copied"] == copied
    [path] = stick.iterdir()

    pictures = tmp_path / "pictures"
    assert publisher_cli.main(["capture-open", str(repository), str(path), "--out", str(pictures)]) == 0
    assert "cam-1 person gate" in capsys.readouterr().out
    [picture] = pictures.iterdir()
    assert picture.read_bytes() == PICTURE


def test_of_many_captures_those_that_are_whole_are_opened_and_the_others_named(
    device: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [whole] = (tmp_path / "state" / FOLDER).iterdir()
    broken = tmp_path / "broken.cap"
    broken.write_bytes(whole.read_bytes()[:-3])
    out = tmp_path / "pictures"
    assert publisher_cli.main(["capture-open", str(repository), str(broken), str(whole), "--out", str(out)]) != 0
    told = capsys.readouterr()
    assert "broken.cap" in told.err
    assert "cam-1 person gate" in told.out
    assert len(list(out.iterdir())) == 1


def test_where_no_capture_can_be_written_the_reason_is_told_and_what_to_check(
    device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main(["capture", "copy", "--to", str(place), "--config", str(device)]) == 64
        assert "check the stick" in capsys.readouterr().err


def test_a_capture_that_made_room_while_others_were_copied_is_no_error(tmp_path: Path) -> None:
    assert captureverb._copy(tmp_path / "gone.cap", tmp_path / "stick") is None
    assert list((tmp_path / "stick").iterdir()) == []


def test_a_damaged_capture_is_shown_as_such_and_opens_for_nobody(
    device: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = (tmp_path / "state" / FOLDER).iterdir()
    path.write_bytes(b"\0" * 40)
    assert cli.main(["capture", "list", "--config", str(device), "--json"]) == 0
    assert "not a capture" in json.loads(capsys.readouterr().out)["captures"][0]["damaged"]
    assert publisher_cli.main(["capture-open", str(repository), str(path), "--out", str(tmp_path / "out")]) != 0
    assert "payload_corrupt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_device_that_kept_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'state_dir = "{tmp_path / "state"}"\n')
    assert cli.main(["capture", "list", "--config", str(path)]) == 0
    assert capsys.readouterr().out == "0 captures\n"
    assert cli.main(["capture", "copy", "--config", str(path)]) != 0
    assert "--to DIR" in capsys.readouterr().err
