"""The whole updater in random order: looks, answers of the host, stops, power cuts, roll-backs, new releases.

One line over a fake host and a simulated repository, on a disk that forgets. The host answers only when a rule lets it,
so that every wish can meet an update in every state.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.machine import LIVE, State
from ota.client.ports import Candidate
from ota.client.updater import Updater
from ota.errors import OtaError, Reason, Rejected
from tests.crash.memory import MemoryDisk
from tests.fakes.host import FakeHost
from tests.ota.client.conftest import LINE, Device, model
from tests.ota.client.simulator import Simulator

ATTEMPTS = 3
SMALL = 20_000
CRASHES = OtaError(Reason.WORKER_CRASHED, "5 crashes in 600 s")


class SteppedHost(FakeHost):
    """Waits in every step of a trial until it is told how the step ends, and looks at the disk when a trial begins."""

    def __init__(self, walk: Interleavings) -> None:
        super().__init__()
        self.walk = walk
        self.waiting: asyncio.Future[OtaError | None] | None = None

    async def _step(self, step: str, candidate: Candidate) -> None:
        self.calls.append((step, candidate.line, candidate.version, candidate.component.name))
        if step == "revert":
            return
        if step == "self_test":
            self.walk.trial_begins(candidate)
        assert self.waiting is None, "two methods of one line at once"
        self.waiting = asyncio.get_running_loop().create_future()
        try:
            error = await self.waiting
        finally:
            self.waiting = None
        if error is not None:
            raise error


class Interleavings(RuleBasedStateMachine):
    """Invariants are at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.disk = MemoryDisk()
        self.device = Device(self.disk, Simulator())
        self.folder = tempfile.TemporaryDirectory()
        self.tasks: list[asyncio.Task[Any]] = []
        self.number = 0
        self.floor = 0
        self.unfit: set[str] = set()
        self.judged = 0
        self.stick: Path | None = None
        self.updater = self._boot()

    def teardown(self) -> None:
        self._end_all()
        self.loop.close()
        self.folder.cleanup()

    # -- the world -----------------------------------------------------------------------------------------------------

    def _boot(self) -> Updater:
        self.device.disk = self.disk
        self.device.host = self.host = SteppedHost(self)
        updater = self.device.boot()

        async def start() -> None:
            await updater.recover()
            await self.host.start(updater.active(LINE))

        self.loop.run_until_complete(start())
        return updater

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(self.loop.create_task(work))
        self._settle()

    def _settle(self) -> None:
        """Run until everything has ended or waits for the host."""

        async def quiet() -> None:
            for _ in range(2000):
                await asyncio.sleep(0)
                if all(task.done() for task in self.tasks):
                    return
                if self.host.waiting is not None:
                    # those that wait for the line, or for the end of the trial, go no further either
                    await asyncio.sleep(0.002)
                    if self.host.waiting is not None:
                        return
                    continue
                await asyncio.sleep(0.0005)
            raise AssertionError(f"hangs in {self.updater.record.line(LINE).state}")

        self.loop.run_until_complete(quiet())
        self._reap()

    def _reap(self) -> None:
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.remove(task)
            if task.cancelled():
                continue
            error = task.exception()
            if error is not None and not isinstance(error, OtaError):
                raise error

    def _end_all(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            self.loop.run_until_complete(asyncio.wait(self.tasks))
        self.tasks.clear()

    def trial_begins(self, candidate: Candidate) -> None:
        """What the host sees when it is asked for the first time: nothing of it ran before this is on the disk."""
        on_disk = Journal(Fs(self.disk.after_cut())).record.line(LINE)
        assert on_disk.state is State.TESTING
        assert on_disk.candidate is not None
        assert on_disk.candidate.release_sha256 == candidate.release.sha256
        assert 1 <= on_disk.attempts <= ATTEMPTS
        assert candidate.release.sha256 not in on_disk.quarantine
        self._judge()
        assert candidate.version not in self.unfit

    def _judge(self) -> None:
        """Remember which versions were found unfit: told by the last events."""
        for event in self.device.events[self.judged :]:
            if event.outcome in ("rejected", "rolled_back") and event.reason is Reason.OVER_BUDGET:
                self.unfit.add(event.version)
        self.judged = len(self.device.events)

    # -- what may happen -----------------------------------------------------------------------------------------------

    @initialize()
    def two_commits(self) -> None:
        for _ in range(2):
            self.publish_and_look()
            self.run_through()
        assert self.updater.record.line(LINE).previous is not None

    @rule()
    def publish_and_look(self) -> None:
        self.publish()
        self.look()

    @rule()
    def publish(self) -> None:
        self.number += 1
        self.device.release(f"1.{self.number}.0", data=model(self.number, SMALL))

    @rule()
    def write_stick(self) -> None:
        self.stick = Path(self.folder.name) / f"stick-{self.number}"
        self.device.repository.write(self.stick, self.device.identity.device)

    @precondition(lambda self: self.stick is not None)
    @rule()
    def sideload(self) -> None:
        assert self.stick is not None
        self._begin(self.updater.sideload(self.stick))

    @rule()
    def look(self) -> None:
        self._begin(self.updater.check())

    @precondition(lambda self: self.host.waiting is not None)
    @rule(
        error=st.sampled_from(
            [None, None, None, Rejected(Reason.OVER_BUDGET, "slow"), Rejected(Reason.OVER_BUDGET, "slow"),
             OtaError(Reason.IO_ERROR, "disk"), Rejected(Reason.BUSY, "not now")]
        )
    )  # fmt: skip
    def answer(self, error: OtaError | None) -> None:
        assert self.host.waiting is not None
        self.host.waiting.set_result(error)
        self._settle()

    @precondition(lambda self: self.host.waiting is not None)
    @rule()
    def run_through(self) -> None:
        while self.host.waiting is not None:
            self.answer(None)

    @precondition(lambda self: self.host.waiting is not None)
    @rule()
    def reject_and_look_again(self) -> None:
        self.answer(Rejected(Reason.OVER_BUDGET, "slow"))
        self.look()

    @rule()
    def cancel(self) -> None:
        self._begin(self.updater.cancel(LINE))

    @rule()
    def stop_looking(self) -> None:
        for task in self.tasks:
            task.cancel()
        self._settle()

    @rule()
    def roll_back(self) -> None:
        self._begin(self.updater.rollback(LINE))

    @rule()
    def crash_loop(self) -> None:
        active = self.updater.record.line(LINE).active
        if active is not None:
            self._begin(self.updater.unfit(LINE, active.release_sha256, CRASHES))

    @rule()
    def retry(self) -> None:
        if not self.updater.busy and self.updater.record.line(LINE).state is State.IDLE:
            self._judge()
            self.updater.retry(LINE)
            self.unfit.clear()

    @rule(gentle=st.booleans())
    def power_cut(self, gentle: bool) -> None:
        left = self.disk.snapshot() if gentle else self.disk.after_cut()
        self.disk.on_call = None
        self._end_all()  # on a disk that nobody reads any more
        self.disk = left
        self.updater = self._boot()

    # -- what must hold ------------------------------------------------------------------------------------------------

    @invariant()
    def the_active_release_was_committed_and_its_files_open(self) -> None:
        active = self.updater.record.line(LINE).active
        if active is not None:
            committed = {event.version for event in self.device.events if event.outcome == "committed"}
            assert active.version in committed
            for sha256 in (active.plain_sha256, active.golden_sha256):
                os.close(self.updater.store.open(sha256))

    @invariant()
    def it_serves_unless_a_candidate_does(self) -> None:
        line = self.updater.record.line(LINE)
        if line.state not in LIVE and not self.tasks:
            expected = {LINE} if line.active is not None else set()
            assert set(self.host.serving) == expected
            if line.active is not None:
                assert self.host.serving[LINE][0] == line.active.version

    @invariant()
    def the_floor_never_falls(self) -> None:
        floor = self.updater.record.line(LINE).floor_counter
        assert floor >= self.floor
        self.floor = floor

    @invariant()
    def attempts_never_exceed_the_limit(self) -> None:
        assert self.updater.record.line(LINE).attempts <= ATTEMPTS

    @invariant()
    def nothing_runs_that_is_quarantined(self) -> None:
        line = self.updater.record.line(LINE)
        assert line.active is None or line.active.release_sha256 not in line.quarantine
        assert line.candidate is None or line.candidate.release_sha256 not in line.quarantine

    @invariant()
    def at_rest_nothing_is_held(self) -> None:
        if not self.tasks:
            assert self.updater.locks() == []
            assert not self.updater.busy


Interleavings.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestInterleavings = Interleavings.TestCase
