"""The technician's command: whatever the place is like, one line says what is wrong and one what to do."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import cli, client, config, logs
from agent.errors import ControlError, Reason


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration in a place short enough for a socket's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logs, "set_up", lambda level: None)  # it is for a process, and this one goes on
    path = tmp_path / "agent.toml"
    path.write_text('state_dir = "state"\nrun_dir = "run"\n')
    return path


@pytest.fixture
def deaf(settings: Path) -> Iterator[config.Config]:
    """A daemon that accepts and never answers."""
    loaded = config.load(settings)
    loaded.control_socket.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(loaded.control_socket.parent)
        listening.bind(loaded.control_socket.name)
        os.chdir(here)
        listening.listen()
        yield loaded


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ENOTCONN, errno.ESTALE])
def test_a_place_that_this_user_may_not_or_cannot_look_at_is_judged_by_whoever_installs(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: int
) -> None:
    """He may belong to the technicians, and the stick to the desktop's user; or it was pulled out that moment."""
    genuine = os.stat

    def stat(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if str(path).endswith("stick"):
            raise OSError(error, os.strerror(error))
        return genuine(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    assert cli.main(["sideload", "stick", "--config", str(settings)]) != 0
    first, second = told(capsys)
    assert first == "error: this device is not enrolled [not_enrolled]"
    assert second.startswith("hint: ")


def test_a_name_that_is_too_long_is_an_error_of_one_line(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sideload", "a" * 300, "--config", str(settings)]) != 0
    assert len(told(capsys)) == 2


@pytest.mark.parametrize(("place", "message"), [(["absent"], "absent does not exist"), ([], "no PATH is named")])
def test_what_is_not_there_is_told_before_anybody_is_asked(
    settings: Path, capsys: pytest.CaptureFixture[str], place: list[str], message: str
) -> None:
    assert cli.main(["sideload", *place, "--config", str(settings)]) != 0
    first, second = told(capsys)
    assert first == f"error: {message} [bad_usage]"
    assert "edge-ota bundle" in second


def test_a_name_that_no_request_can_carry_is_refused_with_a_way_out(
    deaf: config.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkdir(b"lab\xe9l")
    assert cli.main(["sideload", os.fsdecode(b"lab\xe9l"), "--config", str(deaf.path)]) != 0
    first, second = told(capsys)
    assert first.endswith("lab\\udce9l is a name that is not UTF-8 [bad_usage]")
    assert second == "hint: mount the stick elsewhere: /media/stick"


def test_a_daemon_that_takes_its_time_is_not_called_dead(deaf: config.Config) -> None:
    with pytest.raises(ControlError) as failure:
        client.ask(deaf, "POST", "/sideload", {}, timeout_s=0.1)
    assert failure.value.reason is Reason.DAEMON_UNREACHABLE
    assert "has not answered within 0.1 s" in failure.value.message
    assert "start it" not in failure.value.hint
