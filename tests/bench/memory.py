"""Memory of a daemon and everything below it, as the kernel accounts for it.

PSS of a process is what it has alone, plus its share of what it maps together with others: summed over all processes of
a device nothing is counted twice.
"""

from __future__ import annotations

from pathlib import Path


def family(pid: int) -> list[int]:
    """`pid` and all its descendants that live."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        try:
            tasks = list(Path(f"/proc/{one}/task").iterdir())
            children = [int(word) for task in tasks for word in (task / "children").read_text().split()]
        except OSError:
            continue  # it ended meanwhile
        found.append(one)
        todo += children
    return found


def pss_mb(pid: int) -> float:
    """Proportional memory of one process in megabytes; 0 of one that is gone."""
    return sum(_rollup(pid, "Pss:")) * 1024 / 1e6


def held_mb(pid: int) -> float:
    """What of it is heap, stacks and rings, not pages of files: those are shared with whatever runs on the machine,
    so that each process that comes or goes there moves the figure."""
    return sum(_rollup(pid, "Pss_Anon:", "Pss_Shmem:")) * 1024 / 1e6


def _rollup(pid: int, *keys: str) -> list[int]:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) for line in lines if line.startswith(keys)]


def rss_mb(pid: int) -> float:
    """Resident memory of one process in megabytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def family_held_mb(pid: int) -> float:
    """What `pid` and all below it hold together, each page counted once."""
    return sum(map(held_mb, family(pid)))


def role_of(pid: int) -> str:
    """What a process of a device is: `daemon`, or the role of a worker."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        called = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"
    if called.startswith("edge-"):
        return called.removeprefix("edge-")  # forked from the zygote, whose words it still shows
    roles = ("host", "source", "model", "fused", "trial", "transform", "zygote")
    return next((word for word in words if word in roles), "daemon")
