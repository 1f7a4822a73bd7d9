"""One process at a time works on a state directory: daemon, or one-shot command beside a dead daemon."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

from agent.errors import ControlError, Reason


@contextlib.contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Hold `state_dir` for this process alone; it is created when absent. Files made meanwhile are the owner's alone.

    Raises:
        ControlError: `state_unwritable`, or `daemon_running` when another process holds it.
    """
    umask = os.umask(0o077)
    try:
        with _flock(state_dir):
            yield
    finally:
        os.umask(umask)


@contextlib.contextmanager
def _flock(state_dir: Path) -> Iterator[None]:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise ControlError(
            Reason.STATE_UNWRITABLE, f"{state_dir}: {e.strerror}", hint="use sudo, or the user of the service"
        ) from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ControlError(
                Reason.DAEMON_RUNNING,
                f"another process works on {state_dir}: a daemon, or a stick that is being installed",
                hint="ask again in a minute; systemctl stop edge-agent ends a daemon",
            ) from e
        yield
    finally:
        os.close(fd)


def become_owner(state_dir: Path) -> None:
    """When root works on a service's state directory, go on as the user it belongs to: root's files in it would lock
    the service out.

    Raises:
        ControlError: `state_unwritable` when that user is unknown.
    """
    try:
        owner = state_dir.stat().st_uid
        if os.geteuid() != 0 or owner == 0:
            return
        account = pwd.getpwuid(owner)
    except FileNotFoundError:
        return
    except KeyError as e:
        raise ControlError(
            Reason.STATE_UNWRITABLE, f"{state_dir} belongs to nobody known here", hint="chown it to the service's user"
        ) from e
    os.initgroups(account.pw_name, account.pw_gid)
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
