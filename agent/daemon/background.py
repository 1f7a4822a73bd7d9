"""Work that goes on for a line while it serves, and ends before anything else is done with that line."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Background:
    """Tasks by line. A task must handle its own errors."""

    def __init__(self) -> None:
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}

    def spawn(self, line: str, work: Coroutine[Any, Any, None]) -> None:
        """Begin `work` for `line`."""
        tasks = self._tasks.setdefault(line, set())
        task = asyncio.create_task(work, name=f"retrial {line}")
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def settle(self, line: str) -> None:
        """End what goes on for `line`, unless it is the caller."""
        tasks = [task for task in self._tasks.get(line, ()) if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """End everything."""
        for line in list(self._tasks):
            await self.settle(line)
