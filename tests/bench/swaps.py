"""`make swaps`: a real device under twenty updates; memory of all its processes and lost frames, before and after.

Every update is a signed release of its own, tried, swapped in under a running camera and committed. Before the first
look one update brings the daemon what it keeps for every later one, and the model stands still for a moment, so that
the ring has had all its pages: it takes them when they are first needed, which depends on the machine's load. Exit
status 1 where memory grew by 2 MB, or where a frame was lost for another reason than that the machine was too slow.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.memory import family, held_mb, pss_mb, role_of
from tests.bench.setting import PARTS, Pressure
from tests.demo.fleet import Fleet, build_bad_release
from tests.demo.observer import Observer

LIMIT_MB = 2.0
SETTLE_S = 6.0
STILL_S = 0.5
BACKLOG = "backlog"
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
[telemetry]
interval_s = 0.2
[update]
probation_scale = 0.002
"""


@dataclass(frozen=True, slots=True)
class Memory:
    """PSS in megabytes by role, and what of it all processes hold as heap and ring; of several looks the least, because
    a look may fall into a moment's work."""

    by_role: dict[str, float]
    held_mb: float

    @property
    def total_mb(self) -> float:
        """Of all processes."""
        return sum(self.by_role.values())


def look(pid: int, times: int = 5) -> Memory:
    """Memory of the daemon `pid` and all below it."""
    looks = []
    for _ in range(times):
        by_role: dict[str, float] = {}
        processes = family(pid)
        for process in processes:
            role = role_of(process)
            by_role[role] = by_role.get(role, 0.0) + pss_mb(process)
        looks.append(Memory(by_role, sum(map(held_mb, processes))))
        time.sleep(0.2)
    return min(looks, key=lambda memory: memory.held_mb)


def go_through(fleet: Fleet, observer: Observer, count: int) -> tuple[Memory, Memory, list[tuple[int, str]]]:
    """A warm-up and `count` swaps; memory before and after, and the frames lost from the first swap on."""
    assert fleet.agent is not None
    _update(fleet, observer, 0)
    _fill_the_ring(fleet.agent.pid)
    time.sleep(SETTLE_S)
    before, first = look(fleet.agent.pid), observer.last_seq() + 1
    for number in range(1, count + 1):
        _update(fleet, observer, number)
    time.sleep(SETTLE_S)
    last = observer.last_seq()
    observer.answered_through(last, 60)
    return before, look(fleet.agent.pid), observer.drops_between(first, last)


def _fill_the_ring(daemon: int) -> None:
    (model,) = (pid for pid in family(daemon) if role_of(pid) == "model")
    os.kill(model, signal.SIGSTOP)
    time.sleep(STILL_S)
    os.kill(model, signal.SIGCONT)


def _update(fleet: Fleet, observer: Observer, number: int) -> None:
    version = f"2.0.{number}"
    build_bad_release(fleet.folder / "repo", version, PARTS / "1.0.0" / "int8.tflite", "litert:xnnpack")  # a good one
    fleet.publish("parts", version)
    fleet.grant("parts", version)
    ended = observer.update_ended(version, 90)
    if ended["outcome"] != "committed":
        raise RuntimeError(f"{version}: {ended['message']}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()
    pressure, began = Pressure(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="edge-swaps-"))
    fleet, observer = Fleet(folder), None
    try:
        clip = folder / "clip.avi"
        command = [sys.executable, str(PARTS / "clip.py"), str(clip), "--seconds", "2", "--fps", "30"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        fleet.make_repository()
        fleet.release(PARTS / "1.0.0" / "spec.toml")
        fleet.publish("parts", "1.0.0")
        port = fleet.start_broker()
        fleet.enroll(CONFIG.format(clip=clip))
        fleet.start_server()
        observer = Observer(fleet.keys, port, fleet.tenant, fleet.device)
        fleet.start_agent(MALLOC_ARENA_MAX="1")
        before, after, lost = go_through(fleet, observer, args.count)
    finally:
        if observer is not None:
            observer.close()
        fleet.stop()
        shutil.rmtree(folder, ignore_errors=True)
    grown = after.held_mb - before.held_mb
    print(f"{args.count} swaps on a real device at 30 fps in {time.monotonic() - began:.0f} s;"
          f" CPU pressure {pressure.percent:.0f} %")  # fmt: skip
    for role in sorted(before.by_role | after.by_role):
        print(f"  {role:8} {before.by_role.get(role, 0):7.2f} MB PSS before {after.by_role.get(role, 0):7.2f} after")
    both = (
        f"{before.total_mb:7.2f} MB PSS before {after.total_mb:7.2f} after: {after.total_mb - before.total_mb:+.2f} MB"
    )
    print(f"  all      {both}")
    print(f"  but for pages of files {before.held_mb:7.2f} MB before {after.held_mb:7.2f} after: {grown:+.2f} MB")
    late = [seq for seq, reason in lost if reason == BACKLOG]
    others = sorted({reason for _, reason in lost if reason != BACKLOG})
    print(f"  frames that found the queue full: {len(late)}; lost otherwise: {len(lost) - len(late)} {others or ''}")
    return int(grown >= LIMIT_MB or bool(others))


if __name__ == "__main__":
    raise SystemExit(main())
