"""What a loaded model's process holds and has others do: memory, descriptors, threads, mappings, and the CPU time of
helpers.

A vendor's library may leave its work to a server that it starts and detaches. Such a process comes back as a child of
this one where the worker adopts orphans (`channel.adopt_orphans`); a server that was running before is not seen.
"""

from __future__ import annotations

import os
from pathlib import Path


def rss_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def holdings() -> dict[str, int]:
    """How many descriptors, threads and mappings this process has. The kernel has a limit for each of them."""
    with open("/proc/self/maps", "rb") as file:
        mappings = file.read().count(b"\n")
    tasks = len(os.listdir("/proc/self/task"))
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": tasks, "mappings": mappings}


def helpers_cpu_ns() -> int:
    """CPU time of all living descendants of this process, in nanoseconds; 0 where the kernel does not say."""
    total, found, todo = 0, {os.getpid()}, [os.getpid()]
    while todo:
        parent = todo.pop()
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                children = {int(word) for word in (task / "children").read_text().split()} - found
                found |= children
                todo += children
                if parent != os.getpid():
                    total += int((task / "schedstat").read_text().split()[0])
        except OSError:  # it has ended meanwhile, or the kernel was built without this
            continue
    return total
