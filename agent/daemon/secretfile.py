"""One secret in one file: read, or refused because somebody else could have read or written it.

A message names the file and what is wrong with it, never a byte of it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from agent.errors import CustodyError, Reason


def read(path: Path, low: int, high: int) -> bytes:
    """The bytes of a plain file of `low` to `high` bytes that is its owner's alone.

    Raises:
        CustodyError: `key_missing`, `key_unsafe`.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise CustodyError(
            Reason.KEY_MISSING, f"{path} does not exist", hint="enrol the device: edge-agent enroll --help"
        ) from e
    except OSError as e:
        raise CustodyError(
            Reason.KEY_UNSAFE, f"{path}: {e.strerror}", hint="a key is a plain file of mode 0600, not a link"
        ) from e
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        os.close(fd)
        raise CustodyError(Reason.KEY_UNSAFE, f"{path} is not a plain file", hint="remove it and enrol again")
    with os.fdopen(fd, "rb") as file:
        # systemd hands credentials over as root-owned files that only this unit can reach
        if facts.st_uid not in (os.geteuid(), 0):
            raise CustodyError(
                Reason.KEY_UNSAFE, f"{path} belongs to user {facts.st_uid}", hint="run as that user, or enrol again"
            )
        if facts.st_mode & 0o077 and facts.st_uid == os.geteuid():
            raise CustodyError(
                Reason.KEY_UNSAFE, f"{path} has mode {stat.S_IMODE(facts.st_mode):04o}", hint=f"chmod 0600 {path}"
            )
        try:
            data = file.read(high + 1)
        except OSError as e:
            raise CustodyError(
                Reason.KEY_UNSAFE, f"{path}: {e.strerror}", hint="check the device's storage; then enrol it anew"
            ) from e
    if not low <= len(data) <= high:
        raise CustodyError(Reason.KEY_UNSAFE, f"{path} holds {len(data)} bytes", hint="restore it, or enrol again")
    if not any(data):
        raise CustodyError(Reason.KEY_UNSAFE, f"{path} was overwritten with zeros", hint="enrol the device anew")
    return data


def check_folder(folder: Path) -> None:
    """Refuse a folder in which others could exchange files; one that does not exist is no risk.

    Raises:
        CustodyError: `key_unsafe`.
    """
    try:
        facts = os.lstat(folder)
    except FileNotFoundError:
        return  # the file in it is missing as well, which says more
    except OSError as e:
        raise CustodyError(Reason.KEY_UNSAFE, f"{folder}: {e.strerror}", hint="run as the user of the service") from e
    if not stat.S_ISDIR(facts.st_mode):
        raise CustodyError(Reason.KEY_UNSAFE, f"{folder} is not a folder", hint="a link to keys is not followed")
    if facts.st_uid != os.geteuid():
        raise CustodyError(
            Reason.KEY_UNSAFE, f"{folder} belongs to user {facts.st_uid}", hint="run as that user, or enrol again"
        )
    if facts.st_mode & 0o077:
        raise CustodyError(
            Reason.KEY_UNSAFE, f"{folder} has mode {stat.S_IMODE(facts.st_mode):04o}", hint=f"chmod 0700 {folder}"
        )
