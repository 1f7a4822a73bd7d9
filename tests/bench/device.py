"""A real daemon under a real broker: its memory and modules, an update by delta, what the swap cost; and how soon and
how heavy model workers are. One printed configuration, every goal beside its figure."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
import time
from typing import Any

from ota.publisher import spec
from tests.bench import starts
from tests.bench.memory import family, pss_mb, role_of, rss_mb
from tests.bench.pipeline import VWW, VWW_SPEC, candidate
from tests.bench.setting import Pressure, Setting
from tests.demo.fleet import PARTS, ROOT, Fleet
from tests.demo.footprint import FOREIGN, runtimes_mapped
from tests.demo.observer import Observer

UNIT = ROOT / "packaging" / "systemd" / "edge-agent.service"
WINDOW_FRAMES = 360
WAYS = ("executed", "zygote")
CONFIG = """\
state_dir = "state"
run_dir = "run"
[[source]]
name = "belt"
kind = "video"
path = "{clip}"
loop = true
[[line]]
name = "parts"
source = "belt"
delegates = ["litert:xnnpack"]
[update]
probation_scale = 0.016667
"""


def as_shipped() -> dict[str, str]:
    """The environment that the service gives the daemon."""
    lines = [line.removeprefix("Environment=") for line in UNIT.read_text().splitlines() if line.startswith("Environ")]
    return dict(line.split("=", 1) for line in lines)


def bench(setting: Setting) -> dict[str, Any]:
    """One device through an install and an update by delta, then its workers; prints and returns the figures."""
    folder, clip = setting.folder / "fleet", setting.clip
    folder.mkdir()
    fleet = Fleet(folder)
    observer = None
    try:
        fleet.make_repository()
        for version in ("1.0.0", "1.1.0"):
            fleet.release(PARTS / version / "spec.toml")
        fleet.publish("parts", "1.0.0")
        port = fleet.start_broker()
        fleet.enroll(CONFIG.format(clip=clip))
        fleet.start_server()
        observer = Observer(fleet.keys, port, fleet.tenant, fleet.device)
        figures = _measure(fleet, observer)
    finally:
        if observer is not None:
            observer.close()
        fleet.stop()
    return {**figures, **_workers(setting)}


def _measure(fleet: Fleet, observer: Observer) -> dict[str, Any]:
    pressure = Pressure()
    # compiled, as an installation is: a daemon that compiles itself at its start is 5 MB larger
    subprocess.run([sys.executable, "-m", "compileall", "-q", "agent", "ota"], cwd=ROOT, check=True)
    pid = fleet.start_agent(**as_shipped()).pid
    time.sleep(6)
    idle = rss_mb(pid)
    fleet.grant("parts", "1.0.0")
    first = observer.update_ended("1.0.0", 90)
    start = observer.last_seq() + 1
    observer.answered_through(start + WINDOW_FRAMES - 1, 60)
    whole = {}
    for process in family(pid):
        role = role_of(process)
        whole[role] = whole.get(role, 0.0) + pss_mb(process)
    published = time.monotonic()
    fleet.publish("parts", "1.1.0")
    fleet.grant("parts", "1.1.0")
    second = observer.update_ended("1.1.0", 90)
    took = time.monotonic() - published
    middle = start + WINDOW_FRAMES
    observer.answered_through(middle + WINDOW_FRAMES - 1, 60)
    after = rss_mb(pid)
    modules = set(fleet.modules())
    bad_files = runtimes_mapped(pid)
    figures = {
        "idle_rss_mb": idle,
        "after_update_rss_mb": after,
        "whole_pss_mb": whole,
        "pressure": pressure.percent,
        "modules": len(modules),
        "forbidden_modules": sorted(modules & FOREIGN),
        "forbidden_files": bad_files,
        "full_bytes": second["traffic"]["full_bytes"],
        "delta_bytes": second["traffic"]["delta_bytes"],
        "fetched_bytes": second["traffic"]["fetched_bytes"],
        "first_fetched_bytes": first["traffic"]["fetched_bytes"],
        "publish_to_commit_s": took,
        "probation_s": second["probation"]["seconds"],
        "drops_without_swap": observer.drops_between(start, middle),
        "drops_with_swap": observer.drops_between(middle, middle + WINDOW_FRAMES),
    }
    board = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {sys.version.split()[0]}"
    print(f"\none device: {board}; CPU pressure {figures['pressure']:.0f} %")
    print("  parts 1.0.0 on LiteRT, 640x480 MJPEG at 30 fps, MQTT over TLS; memory in MB")
    goal("daemon, connected and idle, RSS", idle, 45, "goal 40")
    goal("daemon after an update by delta, serving", after, 45)
    parts = ", ".join(f"{role} {mb:.1f}" for role, mb in sorted(whole.items()))
    goal(f"all processes, PSS ({parts})", sum(whole.values()), 100)
    print(f"  modules loaded                    {len(modules)}; of runtimes, numpy or OpenCV: "
          f"{figures['forbidden_modules'] or 'none'}, mapped files: {bad_files or 'none'}")  # fmt: skip
    share = figures["fetched_bytes"] / figures["full_bytes"]
    fetched = f"{figures['fetched_bytes']} of {figures['full_bytes']} bytes ({share:.1%})"
    print(f"  1.0.0 to 1.1.0 by delta           {fetched}")
    print(f"  publish to commit                 {took:.1f} s, of which probation {figures['probation_s']:.1f} s")
    print(f"  drops in {WINDOW_FRAMES} frames without swap  {figures['drops_without_swap']}")
    print(f"  drops in {WINDOW_FRAMES} frames over the swap {figures['drops_with_swap']}")
    return figures


def _workers(setting: Setting) -> dict[str, Any]:
    """What further small models weigh and how soon workers answer, executed and forked."""
    if not VWW.exists():
        print(f"  workers left out: {VWW} is absent")
        return {}
    described = spec.parse({**VWW_SPEC, "component": [{"file": VWW.name}]}, VWW.parent)
    model, pressure = candidate(setting.folder / "vww", described), Pressure()
    times = {way: asyncio.run(starts.starts(setting.clip, model, zygote=way == "zygote")) for way in WAYS}
    heavy = {way: asyncio.run(starts.weights(setting.clip, model, zygote=way == "zygote")) for way in WAYS}
    fused_mb = asyncio.run(starts.weights(setting.clip, model, zygote=False, fused=True))
    gaps = asyncio.run(starts.fused_gap(setting.clip, model))
    print(f"workers with vww_96_int8 on LiteRT, best of {starts.TIMES}; CPU pressure {pressure.percent:.0f} %")
    for way, (start_ms, killed_ms) in {"executed": (300, 400), "zygote": (50, 100)}.items():
        goal(f"{way}: asked for until its first result, ms", min(times[way]["start_ms"]), start_ms)
        goal(f"{way}: killed until the next one's result, ms", min(times[way]["killed_ms"]), killed_ms)
        further = (heavy[way][-1] - heavy[way][0]) / (len(heavy[way]) - 1)
        goal(f"{way}: each further small model, PSS MB", further, 15)
    print(f"  host, source and one model, PSS: {heavy['executed'][0]:.1f} MB; fused {fused_mb[0]:.1f} MB")
    print(f"  fused: nobody serves during a swap for {min(gaps)} to {max(gaps)} ms")
    return {
        "workers": times,
        "weights_mb": {**heavy, "fused": fused_mb},
        "fused_gap_ms": gaps,
        "workers_pressure": pressure.percent,
    }


def goal(what: str, value: float, limit: float, more: str = "") -> None:
    """One line of the table: figure, goal, and their ratio."""
    print(f"  {what:66}{value:8.1f}   at most {limit:g}{', ' + more if more else ''}: {value / limit:.2f}x")
