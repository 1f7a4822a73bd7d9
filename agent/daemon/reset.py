"""Factory reset: after it nothing in the state directory can be read that an owner put there.

`begin` writes the intent durably, `finish` carries it out and may be cut short anywhere: whoever opens the state
directory next calls `finish` first. Keys are overwritten (`ota.client.keyring.wipe`), everything sealed under them is
thereby closed for good, and then every file is removed; on flash older copies of a block may outlive an overwrite.
What does not lie there is not this module's: agent.toml, credentials sealed by systemd, copies that somebody made.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from agent.daemon import enroll
from agent.errors import AgentError, ControlError, Reason
from ota import strictjson
from ota.client import keyring
from ota.client.fsops import Fs
from ota.errors import OtaError, StoreError

MARK = "reset.json"
LAST = "last-reset.json"
_KEPT = frozenset({"lock", MARK, LAST})
_MAX_BYTES = 4096


def begin(state_dir: Path, *, owner: bool) -> None:
    """From now on this device will be reset, whatever happens.

    Args:
        owner: it changes hands: not even a record of the reset names the old owner.

    Raises:
        StoreError: the disk cannot be written; nothing will happen.
    """
    about: dict[str, Any] = {"v": 1, "wall_s": int(time.time()), "device": "", "tenant": ""}
    if not owner:
        try:
            enrolment = enroll.load(state_dir)
        except (AgentError, OtaError):
            enrolment = None  # a damaged enrolment is a reason to reset, not one against it
        if enrolment is not None:
            about |= {"device": enrolment.device, "tenant": enrolment.tenant}
    Fs(state_dir).write_atomic(MARK, strictjson.canonical(about))


def pending(state_dir: Path) -> bool:
    """Whether a reset was begun and not finished."""
    return (state_dir / MARK).exists()


def finish(state_dir: Path) -> bool:
    """Carry out a reset that was begun; False when none was. The caller holds the state directory's lock.

    Raises:
        ControlError: `state_unwritable`: something could not be removed; it is tried again the next time.
        StoreError: a key could not be destroyed.
    """
    if not pending(state_dir):
        return False
    fs = Fs(state_dir)
    about = fs.read(MARK, _MAX_BYTES) or b"{}"
    # what cannot be overwritten is removed all the same, and told; the next attempt then meets it no longer
    failed: StoreError | None = None
    try:
        keyring.wipe(fs)
    except StoreError as e:
        failed = e
    try:
        with os.scandir(state_dir) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if name not in _KEPT:
                _remove(state_dir / name)
    except OSError as e:
        raise ControlError(
            Reason.STATE_UNWRITABLE,
            f"cannot remove {e.filename}: {e.strerror}",
            hint="run edge-agent reset again as the user of the service",
        ) from e
    if failed is not None:
        raise failed
    # both syncs of the directory matter: the first one makes the removals durable before the intent may go
    fs.write_atomic(LAST, about)
    fs.remove(MARK)
    fs.write_atomic(LAST, about)
    return True


def last(state_dir: Path) -> dict[str, Any] | None:
    """What is known of the last reset, once: the record is removed. None when there is none."""
    fs = Fs(state_dir)
    data = fs.read(LAST, _MAX_BYTES)
    if data is None:
        return None
    fs.remove(LAST)
    try:
        about = strictjson.loads(data, max_bytes=_MAX_BYTES, what=LAST)
    except OtaError:
        return {}
    return {key: about.get(key) for key in ("wall_s", "device", "tenant")} if isinstance(about, dict) else {}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        import shutil  # memory that the daemon does not need otherwise

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
