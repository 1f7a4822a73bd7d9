"""Threads for work that may hang where nothing can wake it: a name that is looked up, a network that swallows packets.

Neither who asked nor the end of the process waits for it, as with a `ThreadPoolExecutor` the latter would. Not here:
how long the work may last, and how it is interrupted where that is possible.
Invariants: at most `most` threads; work that was cancelled before a thread took it up is not begun.
"""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")


class Threads:
    """Threads that are started as they are needed.

    Args:
        most: threads that run at once.
        name: of each of them.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._jobs: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._changed = threading.Condition()
        self._threads = self._idle = 0
        self._closed = False

    async def run(self, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises. A cancelled caller leaves at once; the thread is free when `work` ends."""
        job: Future[_T] = Future()
        with self._changed:
            self._jobs.append((job, work))
            if len(self._jobs) > self._idle and self._threads < self._most:
                threading.Thread(target=self._serve, name=self._name, daemon=True).start()
                self._threads += 1
            else:
                self._changed.notify()
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Let the threads end once nothing waits for one."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _serve(self) -> None:
        while (taken := self._next()) is not None:
            job, work = taken
            if not job.set_running_or_notify_cancel():
                continue
            try:
                job.set_result(work())
            except Exception as e:  # noqa: BLE001 - it is raised where the work was asked for
                job.set_exception(e)
            del taken, job, work  # an idle thread keeps nothing alive

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._changed:
            while not self._jobs:
                if self._closed:
                    self._threads -= 1
                    return None
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            return self._jobs.popleft()
