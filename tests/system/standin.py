"""Stands in the daemon's place where a test is about the units alone: a key and sockets of its modes, READY, no more.

Runs under the shipped edge-agent.service. Standard library only.
"""

from __future__ import annotations

import grp
import os
import socket
import time
from pathlib import Path

STATE = Path(os.environ["STATE_DIRECTORY"])
RUN = Path(os.environ["RUNTIME_DIRECTORY"])


def listen(name: str, kind: int, group: str) -> socket.socket:
    path = RUN / name
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, kind)
    server.bind(str(path))
    os.chown(path, -1, grp.getgrnam(group).gr_gid)
    path.chmod(0o660)
    server.listen()
    return server


def main() -> None:
    keys = STATE / "keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    key = os.open(keys / "device.key", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(key, b"planted")
    os.close(key)
    servers = [
        listen("worker.sock", socket.SOCK_SEQPACKET, "edge-worker"),
        listen("source.sock", socket.SOCK_SEQPACKET, "edge-source"),
        listen("control.sock", socket.SOCK_STREAM, "edge-agent"),
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
        while servers:
            notify.sendto(b"WATCHDOG=1", os.environ["NOTIFY_SOCKET"])
            time.sleep(5)


if __name__ == "__main__":
    main()
