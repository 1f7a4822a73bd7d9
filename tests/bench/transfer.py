"""20 MB to one device: MQTT through a real broker against HTTPS from a real web server, both over mutual TLS.

Every receiver is a process of its own that hashes every leaf and writes it to disk, as the daemon does; curl, which
does neither, stands beside them. Over loopback and over an emulated link; then what a SIGKILL and a power cut cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ota import payload as payloads
from ota.client.transfer import claimed
from ota.release import LEAF_BYTES, Payload
from tests.bench import emulated
from tests.bench.setting import Setting, pressure
from tests.fakes.blockserver import BlockServerProcess
from tests.fakes.blocksource import payload as make_payload
from tests.fakes.broker import Authority, Broker, Identity
from tests.fakes.webserver import WebServer

ROOT = Path(__file__).resolve().parents[2]
SIZE = 20_000_000
WINDOW_BYTES = 8 * LEAF_BYTES
# mosquitto's own default: its side of the connection waits for acknowledgements (Nagle)
NAGLE = {"set_tcp_nodelay": "false"}
WAYS = ("mqtt", "https")
ROUNDS = 5


@dataclass(frozen=True)
class Stand:
    """Broker, web server and one device, and the payload that both ways lead to."""

    folder: Path
    host: str
    authority: Authority
    broker: Broker
    web: WebServer
    device: Identity
    payload: Payload

    def receiver(self, way: str, state: Path) -> list[str]:
        """Command that fetches the payload over `way` into `state`."""
        address = f"{self.host}:{self.broker.port}" if way == "mqtt" else self._url
        described = self.folder / "payload.json"
        described.write_text(json.dumps(dataclasses.asdict(self.payload)))
        state.mkdir(exist_ok=True)
        files = [self.device.ca, self.device.certificate, self.device.key, str(described), str(state)]
        return [sys.executable, "-m", "tests.bench.receiver", way, address, *files]

    def curl(self, out: str = "/dev/null") -> list[str]:
        """Command that fetches the whole file in one request, and neither hashes nor keeps it."""
        files = ["--cacert", self.device.ca, "--cert", self.device.certificate, "--key", self.device.key]
        url = f"{self._url}/payloads/{self.payload.sha256}"
        return ["curl", "-sS", *files, "-o", out, "-w", "%{time_total}", url]

    def curl_kept(self) -> list[str]:
        """The same, then synced and hashed."""
        out = str(self.folder / "curl.part")
        return ["sh", "-ec", f"{shlex.join(self.curl(out))}; sync {shlex.quote(out)}; sha256sum {shlex.quote(out)}"]

    @contextlib.contextmanager
    def block_server(self, log: str) -> Iterator[BlockServerProcess]:
        """The shipped block server in a process of its own."""
        server = BlockServerProcess(self.broker, self.authority.issue("ota_service"), SIZE, self.folder / log)
        with server:
            server.wait_connected()
            yield server

    @property
    def _url(self) -> str:
        return f"https://{self.host}:{self.web.port}/edge"


@contextlib.contextmanager
def stand(folder: Path, host: str, listen: str) -> Iterator[Stand]:
    """Start broker and web server, listening on `listen` and reached as `host`."""
    authority = Authority(folder / "authority")
    server = authority.issue("server", hosts=["localhost", "127.0.0.1", host])
    sha256, data = make_payload(SIZE)
    repository = folder / "repository"
    (repository / "payloads").mkdir(parents=True)
    (repository / "payloads" / sha256).write_bytes(data)
    payload = Payload(sha256, SIZE, "raw", "cobblestone-256", "0" * 32, payloads.leaves(data))
    with (
        Broker(folder / "broker", server, host=listen, options=NAGLE) as broker,
        WebServer(folder / "web", repository, server, host=listen) as web,
    ):
        yield Stand(folder, host, authority, broker, web, authority.issue("cam-1"), payload)


def missing() -> str:
    """What this bench needs and the machine lacks, or empty."""
    lacking = [] if WebServer.available() else ["nginx-light"]
    lacking += [] if Broker.available() else ["mosquitto"]
    lacking += [] if shutil.which("curl") else ["curl"]
    return ", ".join(lacking)


def bench(setting: Setting) -> dict[str, Any]:
    """Measure, print, and return every round."""
    if missing():
        print(f"\ntransfer: left out, not installed: {missing()}")
        return {}
    kept: dict[str, Any] = {}
    with stand(setting.folder / "loopback", "127.0.0.1", "127.0.0.1") as place:
        kept["loopback"] = _compare(place, [], ROUNDS)
        _print("20 MB over loopback", kept["loopback"], 2.0, pressure())
        kept["killed"] = _killed(place, 3)
        kept["power_cut"] = _power_cut(place)
    if emulated.missing():
        print(f"  emulated link: left out: {emulated.missing()}")
        return kept
    with (
        emulated.Link(20e6, 0.050) as link,
        stand(setting.folder / "emulated", emulated.SERVER_ADDRESS, "0.0.0.0") as place,
    ):
        kept["emulated"] = _compare(place, link.device, ROUNDS // 2)
        _print("20 MB over 20 Mbit/s with 50 ms round trip", kept["emulated"], 1.05, pressure())
    return kept


def _compare(place: Stand, prefix: Sequence[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Interleaved rounds of both ways and of curl."""
    kept: dict[str, list[dict[str, float]]] = {way: [] for way in (*WAYS, "curl", "curl_kept")}
    with place.block_server("server.log"):
        for number in range(rounds):
            for way in WAYS:
                state = place.folder / f"{way}-{number}"
                kept[way].append(_figures([*prefix, *place.receiver(way, state)]))
                shutil.rmtree(state)
            kept["curl"].append({"seconds": float(_run([*prefix, *place.curl()]))})
            began = time.perf_counter()
            _run([*prefix, *place.curl_kept()])
            kept["curl_kept"].append({"seconds": time.perf_counter() - began})
    return kept


def _print(title: str, kept: dict[str, list[dict[str, float]]], goal: float, busy: str) -> None:
    least = {way: min(figures["seconds"] for figures in rounds) for way, rounds in kept.items()}
    print(f"\n{title}, mutual TLS, broker with Nagle, minima of {len(kept['mqtt'])} rounds; CPU pressure {busy}")
    print(f"  {'':34}{'seconds':>9}{'CPU s':>8}{'RSS +MB':>9}{'stall ms':>10}")
    for way, name in (("mqtt", "MQTT, hashed and written"), ("https", "HTTPS, hashed and written")):
        worst = [max(figures[key] for figures in kept[way]) for key in ("rss_growth_mb", "loop_stall_ms")]
        cpu_s = min(figures["cpu_s"] for figures in kept[way])
        print(f"  {name:34}{least[way]:9.3f}{cpu_s:8.3f}{worst[0]:9.1f}{worst[1]:10.1f}")
    print(f"  {'curl, one request, thrown away':34}{least['curl']:9.3f}")
    print(f"  {'curl, synced, sha256sum':34}{least['curl_kept']:9.3f}")
    ratios = [least["mqtt"] / least[other] for other in ("https", "curl", "curl_kept")]
    print(f"  MQTT / HTTPS {ratios[0]:.2f} (goal {goal}), MQTT / curl {ratios[1]:.2f}, kept {ratios[2]:.2f}")


def _killed(place: Stand, rounds: int) -> list[dict[str, float]]:
    """SIGKILL at a random moment of a transfer: what the second process fetches again."""
    rng = random.Random(7)
    kept = []
    for number in range(rounds):
        state = place.folder / f"killed-{number}"
        with place.block_server(f"killed-{number}.log") as server:
            leaves = _kill(place, state, rng.uniform(0.05, 0.15))
            second = _figures(place.receiver("mqtt", state))
            server.terminate()
            found = re.search(r"(\d+) bytes", server.log.read_text().rpartition("stopped")[2])
        served = int(found.group(1)) if found else 0
        kept.append({"leaves": leaves, "resumed_bytes": second["resumed_bytes"], "again_bytes": served - SIZE})
    worst = max(figures["again_bytes"] for figures in kept) / LEAF_BYTES
    print(f"\nSIGKILL in the middle, {rounds} times: served again at most {worst:.1f} leaves (goal: a window, 8)")
    return kept


def _power_cut(place: Stand) -> dict[str, float]:
    """As after a power cut: the map claims leaves that the disk lost; only those come again."""
    state = place.folder / "cut"
    with place.block_server("cut.log"):
        _kill(place, state, 0.12)
        part, bits = (state / "inbox" / f"{place.payload.sha256}.{kind}" for kind in ("part", "map"))
        leaves = claimed(place.payload, bits.read_bytes()) or []
        lost = random.Random(3).sample(leaves, min(5, len(leaves)))
        with part.open("r+b") as file:
            for index in lost:
                file.seek(index * LEAF_BYTES)
                file.write(bytes(LEAF_BYTES))
        figures = _figures(place.receiver("mqtt", state))
    again = figures["refetched_bytes"] / LEAF_BYTES
    print(f"power cut that lost {len(lost)} of {len(leaves)} leaves: {again:.1f} fetched again")
    return {"lost": len(lost), **figures}


def _kill(place: Stand, state: Path, after_s: float) -> int:
    """Start a receiver and SIGKILL it; leaves that its map then claims."""
    process = subprocess.Popen(place.receiver("mqtt", state), cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after_s)
    process.kill()
    process.wait()
    process.stdout.close()
    bits = state / "inbox" / f"{place.payload.sha256}.map"
    return len(claimed(place.payload, bits.read_bytes()) or []) if bits.exists() else 0


def _figures(command: Sequence[str]) -> dict[str, float]:
    figures: dict[str, float] = json.loads(_run(command).splitlines()[-1])
    return figures


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:4]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout
