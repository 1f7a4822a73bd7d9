"""What the daemon gives up so that its memory stays its own: it holds every key of the device.

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
