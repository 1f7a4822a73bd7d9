"""The daemon's background tasks by name: begun, watched, ended.

Invariant: no task ends with an error unseen; one without which the daemon only looks alive ends the daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any

log = logging.getLogger(__name__)


class Tasks:
    """The running tasks.

    Args:
        essential: names of those whose accident calls `on_failed`.
    """

    def __init__(self, essential: Collection[str], on_failed: Callable[[], None]) -> None:
        self._essential = essential
        self._on_failed = on_failed
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Begin `work`; nobody waits for it."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._done)

    async def end(self, *, but: str = "") -> None:
        """End every task that is not called `but`, and wait for it."""
        await cancelled([task for task in self._running if task.get_name() != but])

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task %s ended: %r", task.get_name(), error, exc_info=error)
            if task.get_name() in self._essential:
                self._on_failed()


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """End `tasks` and wait for their ends."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
