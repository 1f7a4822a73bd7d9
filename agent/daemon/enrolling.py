"""Who enrols works on the state directory alone, on keys in files, and never on a device that was expelled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from agent.daemon import reset, revoked
from agent.daemon.keys import FileKeys
from agent.daemon.lock import locked
from agent.errors import ConfigError, Reason


@contextlib.contextmanager
def opened(state_dir: Path) -> Iterator[FileKeys]:
    """The keys of the device in `state_dir`, held for this process alone; a reset that was begun is finished first.

    Raises:
        ControlError: `daemon_running`, `state_unwritable`.
        ConfigError: `device_revoked`.
    """
    with locked(state_dir):
        reset.finish(state_dir)
        if revoked.is_marked(state_dir):
            raise ConfigError(
                Reason.DEVICE_REVOKED, "this device was revoked by its operator", hint="first edge-agent reset --yes"
            )
        yield FileKeys(state_dir / "keys")
