"""When the device looks for releases."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import pytest

from agent.daemon.updates import UpdateLoop


def looks_within(seconds: float, wishes: Sequence[Callable[[UpdateLoop], None]], *, online: bool = True) -> list[float]:
    """Seconds after the start at which the loop looked, when these wishes were made at the start."""
    seen: list[float] = []

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        began = clock()

        async def check() -> bool:
            seen.append(clock() - began)
            return False

        loop = UpdateLoop(check, lambda: online, poll_s=3600, rng=random.Random(1))
        for wish in wishes:
            wish(loop)
        task = asyncio.create_task(loop.run())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    return seen


@pytest.mark.parametrize("order", [(0.0, 0.3), (0.3, 0.0)])
def test_of_two_wishes_the_earlier_one_serves_both(order: tuple[float, float]) -> None:
    seen = looks_within(0.6, [lambda loop, s=s: loop.poke(s) for s in order])  # type: ignore[misc]
    assert len(seen) == 1
    assert seen[0] < 0.25


def test_a_delayed_wish_is_not_heard_before_its_time() -> None:
    (at,) = looks_within(0.6, [lambda loop: loop.poke(0.3)])
    assert at >= 0.3


def test_without_a_way_to_look_nothing_is_looked_for() -> None:
    assert looks_within(0.2, [lambda loop: loop.poke()], online=False) == []
