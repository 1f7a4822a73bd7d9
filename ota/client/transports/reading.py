"""Threads of their own for what reads a stick.

A read from a stick that hangs ends when the kernel gives up, or never, and nothing can cancel it. In the threads that
the rest of the daemon shares, a handful of such reads would stop every line; here they stop other sticks at most, and
the end of the process does not wait for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ota.client.transports.threads import Threads

THREADS = 4
_P = ParamSpec("_P")
_T = TypeVar("_T")


async def aside(read: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What `read` returns or raises. A cancelled caller leaves at once; its thread is free when the read ends."""
    return await _threads().run(functools.partial(read, *args, **kwargs))


@functools.cache
def _threads() -> Threads:
    return Threads(THREADS, "stick")
