"""The command line's side of the control socket: one request, the daemon's answer or its error as it was there.

The daemon never imports this.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent import config
from agent.daemon import reset
from agent.errors import AgentError, ControlError, Reason
from ota import strictjson
from ota.errors import OtaError
from ota.errors import Reason as OtaReason

CONTROL_TIMEOUT_S = 30.0
# for what takes as long as it takes: an update, a roll-back, sealing every file anew
WORK_TIMEOUT_S = 3600.0
STAND_IN_DIR = Path("/run/edge-sideload")  # edge-agent-sideload.socket
# two starts of the daemon, before and after a trial
SETTINGS_GRACE_S = 60.0
MAX_ANSWER_BYTES = 16 << 20


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask_text(
    loaded: config.Config,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    timeout_s: float = CONTROL_TIMEOUT_S,
) -> str:
    """The body of the daemon's answer.

    Raises:
        ControlError: `daemon_unreachable`, or the reason the daemon gave.
        OtaError: the reason the daemon gave.
    """
    connection = _UnixConnection(loaded.control_socket, timeout_s)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        text = response.read(MAX_ANSWER_BYTES + 1).decode("utf-8", "replace")
    except PermissionError as e:
        raise ControlError(
            Reason.DAEMON_UNREACHABLE, f"{loaded.control_socket}: permission denied", hint="use sudo"
        ) from e
    except TimeoutError as e:
        raise ControlError(
            Reason.DAEMON_UNREACHABLE,
            f"the daemon has not answered within {timeout_s:g} s",
            hint="it may still be at it: edge-agent status",
        ) from e
    except (OSError, http.client.HTTPException) as e:
        raise ControlError(
            Reason.DAEMON_UNREACHABLE,
            f"no daemon answers on {loaded.control_socket}",
            hint="systemctl status edge-agent, or start it: edge-agent run",
        ) from e
    finally:
        connection.close()
    if response.status >= 400:
        raise _control_error(text)
    return text


def ask(
    loaded: config.Config,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    timeout_s: float = CONTROL_TIMEOUT_S,
) -> Any:
    """The daemon's JSON answer; raises as `ask_text`, and OtaError `bad_json` for one that is none."""
    text = ask_text(loaded, method, path, body, timeout_s)
    return strictjson.loads(text.encode(), max_bytes=MAX_ANSWER_BYTES, what="the daemon's answer")


def apply_settings(loaded: config.Config, text: str) -> dict[str, Any]:
    """Put settings on trial and wait for the end of it; the daemon is away for moments meanwhile.

    Raises:
        AgentError: they cannot be used, or no daemon answers.
        OtaError: `settings_failed`: they were taken back; `busy`; other reasons the daemon gave.
    """
    begun = ask(loaded, "POST", "/config", {"text": text})
    deadline_s = time.monotonic() + begun["limit_s"] + SETTINGS_GRACE_S
    while True:
        time.sleep(1.0)
        try:
            shown: dict[str, Any] = ask(loaded, "GET", "/config")
        except ControlError:
            if time.monotonic() > deadline_s:
                raise
            continue
        if shown["trial"] == begun["sha256"]:
            if time.monotonic() > deadline_s:
                raise OtaError(OtaReason.BUSY, "the trial has not ended", hint="edge-agent config show tells when")
            continue
        if shown["in_force"] != f"settings {begun['sha256']}":
            raise OtaError(
                OtaReason.SETTINGS_FAILED,
                f"the settings were taken back: {shown['last'] or 'see the log'}",
                hint=f"{shown['in_force']} is in force again",
            )
        return {"outcome": "committed", "in_force": shown["in_force"]}


def _control_error(text: str) -> AgentError | OtaError:
    """The daemon's error, raised here as what it was there."""
    try:
        fields = strictjson.loads(text.encode(), max_bytes=MAX_ANSWER_BYTES, what="the daemon's answer")
        reason, message, hint = fields["reason"], fields["message"], fields["hint"]
    except (OtaError, KeyError, TypeError):
        return ControlError(Reason.DAEMON_UNREACHABLE, "the daemon answered something else than JSON")
    with contextlib.suppress(ValueError):
        return OtaError(OtaReason(reason), message, hint=hint)
    with contextlib.suppress(ValueError):
        return ControlError(Reason(reason), message, hint=hint)
    return ControlError(Reason.DAEMON_UNREACHABLE, f"{message} ({reason})", hint=hint)


def wait_until_gone(loaded: config.Config, timeout_s: float = 60.0) -> None:
    """Wait until the daemon has carried out a reset and released the state directory.

    Raises:
        ControlError: `daemon_unreachable` when it takes longer; the reset goes on all the same.
    """
    until_s = time.monotonic() + timeout_s
    while _resetting(loaded) or daemon_runs(loaded):
        if time.monotonic() >= until_s:
            raise ControlError(
                Reason.DAEMON_UNREACHABLE,
                f"the daemon has not ended within {timeout_s:g} s",
                hint="stop it: the next start finishes the reset",
            )
        time.sleep(0.1)


def located(path: Path) -> config.Config:
    """The configuration in `path`, or the shipped places for a user who may not read the shipped file.

    Raises:
        ConfigError: as `config.load`.
    """
    try:
        os.stat(path)
        readable = os.access(path, os.R_OK)
    except PermissionError:
        readable = False
    except OSError:
        readable = True  # `load` says what is wrong with it
    return config.parse({}, path) if path == config.DEFAULT_PATH and not readable else config.load(path)


def who_installs(loaded: config.Config) -> config.Config | None:
    """Where to ask for an installation from a stick: at the daemon, else at the unit that stands in for it when it is
    dead; None where there is neither, or where the device is not the one of the units."""
    if daemon_runs(loaded):
        return loaded
    stand_in = replace(loaded, run_dir=STAND_IN_DIR)
    return stand_in if loaded.path == config.DEFAULT_PATH and daemon_runs(stand_in) else None


def daemon_runs(loaded: config.Config) -> bool:
    """Whether a daemon listens on the control socket, be it one that this user may not ask: `ask` says that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(loaded.control_socket))
        except PermissionError:
            return True
        except OSError:
            return False
    return True


def _resetting(loaded: config.Config) -> bool:
    try:
        return reset.pending(loaded.state_dir)
    except PermissionError:
        return False  # an operator need not be allowed to look into it: the daemon's end has to do
