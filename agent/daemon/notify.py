"""sd_notify(3) in the few lines it takes; silent where systemd does not listen."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Says READY, STOPPING and WATCHDOG to the service manager named in `environment`."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def send(self, *lines: str) -> None:
        """Send assignments such as `READY=1`; errors are ignored, as a missing manager is not a fault."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                return
