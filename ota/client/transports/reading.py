"""Threads of their own for what reads a stick.

A read from a stick that hangs ends when the kernel gives up, or never, and nothing can cancel it. In the threads that
the rest of the daemon shares, a handful of such reads would stop every line; here they stop other sticks at most.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

THREADS = 4
_P = ParamSpec("_P")
_T = TypeVar("_T")


async def aside(read: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What `read` returns or raises. A cancelled caller leaves at once; its thread is free when the read ends."""
    return await asyncio.get_running_loop().run_in_executor(_pool(), functools.partial(read, *args, **kwargs))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(THREADS, thread_name_prefix="stick")
