"""What the daemon gives up so that its memory stays its own, for it holds every key of the device, and small.

A core dump would write the keys to the disk, or hand them to a handler that does; and a worker that runs as a child
under the same user could read them through /proc. The kernel refuses both for a process that is not dumpable.
"""

from __future__ import annotations

import ctypes
import resource

_PR_SET_DUMPABLE = 4


def keep_private() -> None:
    """No core file, no core handler, no /proc/PID/mem and no ptrace by the same user, from now on."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def give_back() -> None:
    """Give the kernel what the C library keeps of freed buffers; after an update the idle daemon needs none of them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
