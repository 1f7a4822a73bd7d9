"""Who may work on a state directory, and as whom."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.daemon.lock import become_owner, locked
from agent.errors import ControlError, Reason

LOCK_IT = """
import sys
from pathlib import Path
from agent.daemon.lock import locked
with locked(Path(sys.argv[1])):
    pass
"""


def test_a_second_process_is_told_that_one_works_here(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOCK_IT, str(tmp_path / "state")]
    with locked(tmp_path / "state"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "another process works on" in done.stderr
    subprocess.run(command, check=True)


def test_an_error_inside_is_not_taken_for_a_second_daemon(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), locked(tmp_path / "state"):
        raise BlockingIOError


def test_files_made_meanwhile_are_the_owners_alone_and_later_ones_are_not(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with locked(tmp_path / "state"):
            (tmp_path / "inside").touch()
        (tmp_path / "after").touch()
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("inside", "after")}
    assert modes == {"inside": 0o600, "after": 0o644}


def test_root_goes_on_as_the_user_the_directory_belongs_to(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 65534, 65534)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        become_owner(state)
        os.write(write, f"{os.geteuid()} {os.getegid()}".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100).decode().split()[0] == "65534"
    os.close(read)
    os.close(write)


def test_a_directory_of_ones_own_or_none_changes_nothing(tmp_path: Path) -> None:
    before = os.geteuid(), os.getegid()
    become_owner(tmp_path)
    become_owner(tmp_path / "none")
    assert (os.geteuid(), os.getegid()) == before


def test_a_directory_of_a_user_nobody_knows_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory away")
    os.chown(tmp_path, 54321, 54321)
    with pytest.raises(ControlError) as caught:
        become_owner(tmp_path)
    assert caught.value.reason is Reason.STATE_UNWRITABLE
