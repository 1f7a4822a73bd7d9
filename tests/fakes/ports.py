"""Ports for servers of tests, chosen before the server starts, and kept by one that goes and comes back."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_LOWEST = 10_000
_RANDOM = random.SystemRandom()  # test processes start with one seed


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listened on a moment ago, and that the kernel gives to no connection meanwhile: one below those
    that it takes its own from."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = _RANDOM.randrange(_LOWEST, max(first, _LOWEST + 1000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
