"""A link of a given rate and round trip between this host and a network namespace: two TUN devices and a process that
holds every packet back. Needs root, `ip` (iproute2) and /dev/net/tun; no netem.

python -m tests.bench.emulated FD FD BITS_PER_S ROUND_TRIP_S is that process.
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

SERVER_ADDRESS = "10.231.77.1"
DEVICE_ADDRESS = "10.231.77.2"
_ROOT = Path(__file__).resolve().parents[2]
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MTU = 1500
# what a router's queue holds: more is dropped
_QUEUE_S = 0.2


def missing() -> str:
    """What the host lacks for an emulated link, or empty."""
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("ip"):
        return "iproute2 is not installed"
    return "" if os.path.exists("/dev/net/tun") else "no /dev/net/tun"


class Link:
    """The link while it stands. Commands prefixed with `device` run at its far end.

    Args:
        bits_per_s: of IP packets, in each direction.
        round_trip_s: with empty queues.
    """

    def __init__(self, bits_per_s: float, round_trip_s: float) -> None:
        self._rate = bits_per_s
        self._round_trip_s = round_trip_s
        self._name = f"edgebench{os.getpid()}"
        self._bridge: subprocess.Popen[bytes] | None = None

    @property
    def device(self) -> list[str]:
        """Prefix of a command to run at the far end."""
        return ["ip", "netns", "exec", self._name]

    def __enter__(self) -> Link:
        _ip("netns", "add", self._name)
        here, there = f"eb{os.getpid() % 100000}h", f"eb{os.getpid() % 100000}d"
        ends = [_tun(here), _tun(there)]
        _ip("link", "set", there, "netns", self._name)
        _ip("addr", "add", SERVER_ADDRESS, "peer", DEVICE_ADDRESS, "dev", here)
        _ip("link", "set", here, "up")
        _ip("-n", self._name, "addr", "add", DEVICE_ADDRESS, "peer", SERVER_ADDRESS, "dev", there)
        _ip("-n", self._name, "link", "set", there, "up")
        _ip("-n", self._name, "link", "set", "lo", "up")
        figures = [str(self._rate), str(self._round_trip_s)]
        self._bridge = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.emulated", *map(str, ends), *figures], pass_fds=ends, cwd=_ROOT
        )
        for end in ends:
            os.close(end)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bridge is not None:
            self._bridge.kill()
            self._bridge.wait()
        _ip("netns", "del", self._name)


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    os.set_blocking(fd, False)
    return fd


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class _Direction:
    """One way: packets leave in order, no faster than the rate, and arrive half a round trip later."""

    def __init__(self, source: int, sink: int, bits_per_s: float, delay_s: float) -> None:
        self.source = source
        self._sink = sink
        self._seconds_per_byte = 8 / bits_per_s
        self._delay_s = delay_s
        self._free_s = 0.0
        self._waiting: collections.deque[tuple[float, bytes]] = collections.deque()

    def take(self, now_s: float) -> None:
        """Queue what has come; what the queue cannot hold is lost."""
        while True:
            try:
                packet = os.read(self.source, _MTU + 64)
            except (BlockingIOError, OSError):
                return
            start_s = max(now_s, self._free_s)
            if start_s - now_s > _QUEUE_S:
                continue
            self._free_s = start_s + len(packet) * self._seconds_per_byte
            self._waiting.append((self._free_s + self._delay_s, packet))

    def give(self, now_s: float) -> float:
        """Deliver what is due; seconds until the next is."""
        while self._waiting and self._waiting[0][0] <= now_s:
            try:
                os.write(self._sink, self._waiting.popleft()[1])
            except OSError:
                pass  # the far end is down: a lost packet
        return self._waiting[0][0] - now_s if self._waiting else 1.0


def main(arguments: list[str]) -> int:
    """Carry packets until killed."""
    one, other = int(arguments[0]), int(arguments[1])
    rate, delay_s = float(arguments[2]), float(arguments[3]) / 2
    ways = [_Direction(one, other, rate, delay_s), _Direction(other, one, rate, delay_s)]
    while True:
        wait_s = min(way.give(time.monotonic()) for way in ways)
        readable, _, _ = select.select([one, other], [], [], max(0.0, wait_s))
        for way in ways:
            if way.source in readable:
                way.take(time.monotonic())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
