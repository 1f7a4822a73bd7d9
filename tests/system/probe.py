"""What a process could do from where it stands: run in the worker's place, and as root beside it for comparison.

Usage: probe.py OUT LISTENER_PORT [--stay]. Tries each forbidden thing, writes {attempt: "ok …" or the error's name} to
OUT (whole, by rename) and may then stay, as a worker would. Standard library only; nothing is changed on the device.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

STATE = Path("/var/lib/edge-agent")
RUN = Path("/run/edge-agent")


def attempt(act: Callable[[], object]) -> str:
    try:
        return f"ok {act()}"
    except OSError as e:
        return errno.errorcode.get(e.errno or 0, type(e).__name__)


def open_socket(family: int, kind: int = socket.SOCK_DGRAM) -> str:
    with socket.socket(family, kind):
        return "opened"


def connect(path: str, kind: int) -> str:
    with socket.socket(socket.AF_UNIX, kind) as s:
        s.settimeout(2)
        s.connect(path)
        return "connected"


def connect_tcp(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        return "connected"


def foreign_processes() -> int:
    """How many processes of other users this one sees."""
    seen = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                seen += entry.stat().st_uid != os.getuid()
            except OSError:
                continue
    return seen


def create(folder: str) -> str:
    path = Path(folder) / "probe-was-here"
    path.touch()
    path.unlink()
    return "created"


def main(out: Path, port: int) -> None:
    attempts: dict[str, Callable[[], object]] = {
        "read_key": lambda: (STATE / "keys/device.key").read_bytes(),
        "list_state": lambda: sorted(os.listdir(STATE)),
        "read_config": lambda: Path("/etc/edge-agent/agent.toml").read_text(),
        "list_run": lambda: sorted(os.listdir(RUN)),
        "control_socket": lambda: connect(str(RUN / "control.sock"), socket.SOCK_STREAM),
        "worker_socket": lambda: connect(str(RUN / "worker.sock"), socket.SOCK_SEQPACKET),
        "bus": lambda: connect("/run/dbus/system_bus_socket", socket.SOCK_STREAM),
        "inet": lambda: open_socket(socket.AF_INET),
        "inet6": lambda: open_socket(socket.AF_INET6),
        "netlink": lambda: open_socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "packet": lambda: open_socket(socket.AF_PACKET),
        "connect": lambda: connect_tcp(port),
        "camera": lambda: os.open("/dev/video0", os.O_RDONLY) and sorted(p.name for p in Path("/dev").glob("video*")),
        "accelerator": lambda: os.open("/dev/dri/renderD128", os.O_RDWR),
        "source_socket": lambda: connect(str(RUN / "source.sock"), socket.SOCK_SEQPACKET),
        "create_etc": lambda: create("/etc"),
        "create_usr": lambda: create("/usr"),
        "create_opt": lambda: create("/opt/edge-agent"),
        "create_var": lambda: create("/var/lib"),
        "create_home": lambda: create("/root"),
    }
    found: dict[str, object] = {name: attempt(act) for name, act in attempts.items()}
    found["uid"] = os.getuid()
    found["cwd"] = os.getcwd()
    found["foreign_processes"] = foreign_processes()
    found["core_limit"] = resource.getrlimit(resource.RLIMIT_CORE)
    partial = out.with_suffix(".new")
    partial.write_text(json.dumps(found))
    partial.rename(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    if "--stay" in sys.argv:
        signal.pause()
