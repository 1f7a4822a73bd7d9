"""Blocking work of bounded memory, done in a thread so that the event loop goes on answering.

The cipher holds the interpreter's lock for one piece of 1 MiB at a time (about a millisecond), so a thread is enough.
Invariant: a descriptor is never lost: when nobody waits for the work any more, its result is closed when it comes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def finished(work: Callable[[], _T]) -> _T:
    """What `work` returns or raises. A cancelled caller leaves at once; the work goes on to its end unseen."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_forget)
        raise


async def opened(work: Callable[[], int]) -> int:
    """As `finished`, for work that opens a descriptor, which the caller closes."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_close)
        raise


def _forget(task: asyncio.Future[_T]) -> None:
    if not task.cancelled():
        task.exception()  # read, so that asyncio does not call it unhandled


def _close(task: asyncio.Future[int]) -> None:
    if not task.cancelled() and task.exception() is None:
        os.close(task.result())
