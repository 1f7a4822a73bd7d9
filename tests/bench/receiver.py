"""The receiving side of one transfer in a process of its own, put together as the daemon does it.

python -m tests.bench.receiver mqtt|https ADDRESS CA CERTIFICATE KEY PAYLOAD STATE [PROFILE]

PAYLOAD is a file with the payload as JSON; the figures go to standard output as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import sys
import time
from pathlib import Path

from agent.daemon.link import Identity, Link, LinkSettings, Orders
from agent.daemon.telemetry import Clocks, Telemetry
from agent.daemon.topics import Topics
from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.ports import Transport
from ota.client.transfer import Counts
from ota.client.transports.address import parse_address
from ota.client.transports.https import HttpsTransport
from ota.errors import OtaError
from ota.mqtt import Tls
from ota.release import Payload


def memory_kb(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {key}")


async def _stalls(worst: list[float]) -> None:
    """Longest time in which the loop did nothing else."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + 0.005
        await asyncio.sleep(0.005)
        worst[0] = max(worst[0], loop.time() - due)


async def _fetch(transport: Transport, payload: Payload, state: Path) -> dict[str, object]:
    # what the first document loads is the daemon's, not the transfer's
    with contextlib.suppress(OtaError):
        await transport.metadata("root", 9, 1000)
    inbox = Inbox(Fs(state), Limits(), random.Random())
    counts, worst = Counts(), [0.0]
    watch = asyncio.create_task(_stalls(worst))
    Path("/proc/self/clear_refs").write_text("5")
    before_kb = memory_kb("VmRSS")
    print(json.dumps({"started": True}), flush=True)
    cpu, began = time.process_time(), time.perf_counter()
    await inbox.fetch(payload, [transport], counts)
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    watch.cancel()
    return {
        "seconds": took_s,
        "cpu_s": cpu_s,
        "rss_growth_mb": (memory_kb("VmHWM") - before_kb) / 1024,
        "loop_stall_ms": worst[0] * 1000,
        **dataclasses.asdict(counts),
    }


async def _mqtt(address: str, tls: Tls, payload: Payload, state: Path) -> dict[str, object]:
    host, _, port = address.rpartition(":")
    link = Link(
        LinkSettings(host, int(port), Topics("edge", "cam-1"), tls),
        Identity("boot", "instance"),
        Orders(lambda command: None, lambda hint, delay_s: None),
        Telemetry(Clocks(time.time_ns, time.monotonic_ns, "boot")),
        rng=random.Random(),
        clock=time.monotonic,
        wall=time.time,
    )
    task = asyncio.create_task(link.run())
    async with asyncio.timeout(20):
        while link.status()["state"] != "connected":
            await asyncio.sleep(0.01)
    try:
        return await _fetch(link.transport, payload, state)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _https(address: str, tls: Tls, payload: Payload, state: Path) -> dict[str, object]:
    transport = HttpsTransport(parse_address(address), "cam-1", lambda: tls)
    try:
        return await _fetch(transport, payload, state)
    finally:
        transport.close()


def main(arguments: list[str]) -> int:
    """Fetch once."""
    way, address, ca, certificate, key, file, state = arguments[:7]
    fields = json.loads(Path(file).read_text())
    payload = Payload(**{**fields, "leaves": tuple(fields["leaves"])})
    work = {"mqtt": _mqtt, "https": _https}[way](address, Tls(ca, certificate, key), payload, Path(state))
    if len(arguments) > 7:
        import cProfile

        profile = cProfile.Profile()
        figures = profile.runcall(asyncio.run, work)
        profile.dump_stats(arguments[7])
    else:
        figures = asyncio.run(work)
    print(json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
