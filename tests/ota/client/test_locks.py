"""Shared resources: in order of arrival, never for ever, and never lost."""

from __future__ import annotations

import asyncio

import pytest

from ota.client.locks import Locks
from ota.errors import OtaError, Reason, StoreError
from tests.ota.client.conftest import run

GENEROUS = {"wait_s": 5.0, "timeout_s": 5.0}


async def holder(locks: Locks, owner: str, order: list[str], leave: asyncio.Event) -> None:
    async with locks.exclusive("npu", owner, **GENEROUS):
        order.append(owner)
        await leave.wait()


def test_waiting_claims_are_served_in_order_of_arrival_and_shown() -> None:
    async def main() -> None:
        locks, order, leave = Locks(), [], asyncio.Event()
        tasks = []
        for owner in ("person", "meter", "parts"):
            tasks.append(asyncio.create_task(holder(locks, owner, order, leave)))
            await asyncio.sleep(0)
        (shown,) = locks.view()
        assert (shown.name, shown.owner, shown.waiting, shown.timeout_s) == ("npu", "person", ("meter", "parts"), 5.0)
        leave.set()
        await asyncio.gather(*tasks)
        assert order == ["person", "meter", "parts"]
        assert locks.view() == []

    run(main())


def test_a_claim_that_waits_too_long_is_told_busy_and_by_whom() -> None:
    async def main() -> None:
        locks, leave = Locks(), asyncio.Event()
        first = asyncio.create_task(holder(locks, "person", [], leave))
        await asyncio.sleep(0)
        with pytest.raises(OtaError, match="person") as refused:
            async with locks.exclusive("npu", "meter", wait_s=0.02, timeout_s=5):
                pytest.fail("two owners")
        assert refused.value.reason is Reason.BUSY
        assert locks.view()[0].waiting == ()
        leave.set()
        await first

    run(main())


def test_a_holder_past_its_time_out_loses_the_resource_even_if_it_does_not_end() -> None:
    async def main() -> None:
        locks, got = Locks(), asyncio.Event()

        async def stubborn() -> None:
            async with locks.exclusive("npu", "person", wait_s=1, timeout_s=0.05):
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    await got.wait()  # does not end before the other one has it
                    raise

        first = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        async with locks.exclusive("npu", "meter", **GENEROUS):
            assert not first.done()
            got.set()
            with pytest.raises(OtaError) as lost:
                await first
            assert lost.value.reason is Reason.STATE_TIMEOUT
            assert [view.owner for view in locks.view()] == ["meter"]

    run(main())


def test_a_cancelled_waiter_leaves_the_queue() -> None:
    async def main() -> None:
        locks, order, leave = Locks(), [], asyncio.Event()
        tasks = []
        for owner in ("person", "meter", "parts"):
            tasks.append(asyncio.create_task(holder(locks, owner, order, leave)))
            await asyncio.sleep(0)
        tasks[1].cancel()
        leave.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["person", "parts"]
        assert locks.view() == []

    run(main())


class Disk:
    """So many free bytes; what is written is free no more."""

    def __init__(self, free: int) -> None:
        self.free = free

    def admit(self, needed: int, reserved: int) -> None:
        if self.free < needed + reserved:
            raise StoreError(Reason.NO_SPACE, f"{needed} beside {reserved} of {self.free}")


def test_bytes_that_another_line_reserved_are_not_counted_twice() -> None:
    async def main() -> None:
        locks, disk, left = Locks(), Disk(100), [60]
        entered = []

        async def second() -> None:
            async with locks.disk("meter", lambda: 60, lambda reserved: disk.admit(60, reserved), **GENEROUS):
                entered.append(disk.free)

        async with locks.disk("person", lambda: left[0], lambda reserved: disk.admit(60, reserved), **GENEROUS):
            waiting = asyncio.create_task(second())
            await asyncio.sleep(0.01)
            assert not entered
            # halfway: 30 written, 30 still reserved, and 40 that nobody claims
            disk.free, left[0] = 70, 30
            with pytest.raises(OtaError):
                async with locks.disk("parts", lambda: 0, lambda _: None, wait_s=0.02, timeout_s=5):
                    pytest.fail("overtook a claim that had waited longer")
            disk.free, left[0] = 60, 0
        await waiting
        assert entered == [60]

    run(main())

    async def smaller() -> None:
        locks, disk, left = Locks(), Disk(100), [60]
        async with locks.disk("person", lambda: left[0], lambda reserved: disk.admit(60, reserved), **GENEROUS):
            disk.free, left[0] = 70, 30
            async with locks.disk("meter", lambda: 40, lambda reserved: disk.admit(40, reserved), **GENEROUS):
                assert locks.reserved_bytes(but="meter") == 30

    run(smaller())


def test_a_disk_that_is_too_small_by_itself_is_refused_at_once() -> None:
    async def main() -> None:
        locks, disk = Locks(), Disk(100)
        async with locks.disk("person", lambda: 60, lambda reserved: disk.admit(60, reserved), **GENEROUS):
            with pytest.raises(StoreError) as refused:
                async with locks.disk("meter", lambda: 200, lambda reserved: disk.admit(200, reserved), **GENEROUS):
                    pytest.fail("admitted")
            assert refused.value.reason is Reason.NO_SPACE
            with pytest.raises(OtaError) as busy:
                async with locks.disk(
                    "meter", lambda: 60, lambda reserved: disk.admit(60, reserved), wait_s=0.02, timeout_s=5
                ):
                    pytest.fail("admitted")
            assert busy.value.reason is Reason.BUSY

    run(main())


def test_an_error_of_the_body_passes_and_frees_the_resource() -> None:
    async def main() -> None:
        locks = Locks()
        with pytest.raises(TimeoutError, match="its own"):
            async with locks.exclusive("npu", "person", **GENEROUS):
                raise TimeoutError("its own")
        assert locks.view() == []

    run(main())
