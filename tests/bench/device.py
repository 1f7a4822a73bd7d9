"""A real daemon under a real broker: its memory and modules, an update by delta, and what the swap cost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.demo.fleet import PARTS, ROOT, Fleet
from tests.demo.footprint import FOREIGN, runtimes_mapped
from tests.demo.observer import Observer

UNIT = ROOT / "packaging" / "systemd" / "edge-agent.service"
WINDOW_FRAMES = 360
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
[update]
probation_scale = 0.016667
"""


def as_shipped() -> dict[str, str]:
    """The environment that the service gives the daemon."""
    lines = [line.removeprefix("Environment=") for line in UNIT.read_text().splitlines() if line.startswith("Environ")]
    return dict(line.split("=", 1) for line in lines)


def rss_mb(pid: int) -> float:
    """Resident memory in megabytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def bench(folder: Path, clip: Path, pressure: Callable[[], str]) -> dict[str, Any]:
    """Run one device through an install and an update by delta; prints and returns the figures."""
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
        return _measure(fleet, observer, pressure)
    finally:
        if observer is not None:
            observer.close()
        fleet.stop()


def _measure(fleet: Fleet, observer: Observer, pressure: Callable[[], str]) -> dict[str, Any]:
    # compiled, as an installation is: a daemon that compiles itself at its start is 5 MB larger
    subprocess.run([sys.executable, "-m", "compileall", "-q", "agent", "ota"], cwd=ROOT, check=True)
    pid = fleet.start_agent(**as_shipped()).pid
    time.sleep(6)
    idle = rss_mb(pid)
    fleet.grant("parts", "1.0.0")
    first = observer.update_ended("1.0.0", 90)
    start = observer.last_seq() + 1
    observer.answered_through(start + WINDOW_FRAMES - 1, 60)
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
    print(f"\nthe daemon; CPU pressure {pressure()}")
    print(f"  resident, connected and idle      {idle:.1f} MB")
    print(f"  resident after an update by delta {after:.1f} MB, serving at 30 fps")
    print(f"  modules loaded                    {len(modules)}; of runtimes, numpy or OpenCV: "
          f"{figures['forbidden_modules'] or 'none'}, mapped files: {bad_files or 'none'}")  # fmt: skip
    share = figures["fetched_bytes"] / figures["full_bytes"]
    fetched = f"{figures['fetched_bytes']} of {figures['full_bytes']} bytes ({share:.1%})"
    print(f"  1.0.0 to 1.1.0 by delta           {fetched}")
    print(f"  publish to commit                 {took:.1f} s, of which probation {figures['probation_s']:.1f} s")
    print(f"  drops in {WINDOW_FRAMES} frames without swap  {figures['drops_without_swap']}")
    print(f"  drops in {WINDOW_FRAMES} frames over the swap {figures['drops_with_swap']}")
    return figures
