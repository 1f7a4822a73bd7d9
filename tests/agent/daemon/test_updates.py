"""When the device looks for releases."""

from __future__ import annotations

import asyncio
import random
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agent.config import parse
from agent.daemon import updates
from agent.daemon.updates import LastWords, UpdateLoop, limits_of, serve_later, worth_repeating
from ota.client.ports import UpdateEvent
from ota.errors import OtaError, Reason


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


def test_a_look_that_lasts_keeps_no_other_from_its_time() -> None:
    began: list[int] = []

    async def main() -> None:
        first = asyncio.Event()

        async def check() -> bool:
            began.append(len(began))
            if len(began) == 1:
                await first.wait()  # an update that takes hours
            return False

        loop = UpdateLoop(check, lambda: True, poll_s=3600, rng=random.Random(1))
        task = asyncio.create_task(loop.run())
        for wanted in (1, 2, 3):
            loop.poke()
            async with asyncio.timeout(60):
                while len(began) < wanted:
                    await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("outcome", "reason", "again"),
    [
        ("failed", Reason.SOURCE_UNREACHABLE, True),
        ("failed", Reason.STATE_TIMEOUT, True),
        ("failed", Reason.OPERATOR, False),
        ("failed", Reason.DEVICE_REVOKED, False),
        ("rejected", Reason.QUARANTINED, False),
    ],
)
def test_what_a_person_wanted_is_no_failure_to_be_mended_soon(outcome: str, reason: Reason, again: bool) -> None:
    assert worth_repeating([UpdateEvent("parts", "1.0.0", "idle", outcome, reason)]) is again


def test_a_probation_ends_by_itself_before_it_is_ended() -> None:
    config = tomllib.loads('[[source]]\nname="a"\nkind="video"\npath="/a"\n[update]\nprobation_scale=100\n')
    update = parse(config, Path("/agent.toml")).update
    host_s = 2 * update.probation_s * update.probation_scale + update.run_timeout_s
    assert limits_of(update).probation_timeout_s > 2 * host_s


@pytest.mark.parametrize("last", [None, Reason.NO_DELEGATE, Reason.INCOMPATIBLE])
def test_a_committed_release_that_cannot_be_served_yet_is_served_later_whatever_it_was_that_may_pass(
    monkeypatch: pytest.MonkeyPatch, last: Reason | None
) -> None:
    monkeypatch.setattr(updates, "RETRY_S", (0.001, 0.002))
    # an accelerator that the line may not do without, and whose driver is not up yet, comes with `retry`
    mended = OtaError(Reason.NO_DELEGATE, "the driver is not up", retry=True)
    answers = [Reason.BUSY, Reason.STATE_TIMEOUT, mended, Reason.WORKER_HUNG, Reason.IO_ERROR, last]
    asked: list[int] = []

    async def serve() -> None:
        answer = answers[len(asked)]
        asked.append(1)
        if answer is not None:
            raise answer if isinstance(answer, OtaError) else OtaError(answer, "not served")

    asyncio.run(serve_later(serve, random.Random(1)))
    assert len(asked) == len(answers)


def test_of_lines_that_somebody_makes_up_no_last_word_is_kept() -> None:
    words = LastWords(["parts"])
    for line in ("parts", "*", *(f"line-{number}" for number in range(1000))):
        words.add(UpdateEvent(line, "1.0.0", "idle", "rejected", Reason.INCOMPATIBLE))
    assert set(words.now) == set(words.ended) == {"parts", "*"}
