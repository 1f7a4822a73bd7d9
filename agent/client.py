"""The command line's side of the control socket: one request, the daemon's answer or its error as it was there.

The daemon never imports this.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent import config
from agent.errors import AgentError, ControlError, Reason
from ota.errors import OtaError
from ota.errors import Reason as OtaReason

CONTROL_TIMEOUT_S = 30.0


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
        text = response.read().decode()
    except PermissionError as e:
        raise ControlError(
            Reason.DAEMON_UNREACHABLE, f"{loaded.control_socket}: permission denied", hint="use sudo"
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
    """The daemon's JSON answer; raises as `ask_text`."""
    return json.loads(ask_text(loaded, method, path, body, timeout_s))


def _control_error(text: str) -> AgentError | OtaError:
    """The daemon's error, raised here as what it was there."""
    try:
        fields = json.loads(text)
        reason, message, hint = fields["reason"], fields["message"], fields["hint"]
    except (ValueError, KeyError, TypeError):
        return ControlError(Reason.DAEMON_UNREACHABLE, "the daemon answered something else than JSON")
    with contextlib.suppress(ValueError):
        return OtaError(OtaReason(reason), message, hint=hint)
    with contextlib.suppress(ValueError):
        return ControlError(Reason(reason), message, hint=hint)
    return ControlError(Reason.DAEMON_UNREACHABLE, f"{message} ({reason})", hint=hint)


def daemon_runs(loaded: config.Config) -> bool:
    """Whether a daemon listens on the control socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(loaded.control_socket))
        except OSError:
            return False
    return True
