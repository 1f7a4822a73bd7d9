"""What a device may be doing when its power goes, and what must hold whenever it comes back.

Every scene runs the real updater (all of it, from the check to the commit) on a `MemoryDisk`, with a host that serves
byte strings and a repository in memory, and takes a snapshot before each call that changes the disk. `Scene.judge` then
boots one state that a cut may leave there, and demands:

1. it boots: `recover()` ends, every line is at rest, and the release that serves opens: the old one or the new one, and
   the new one for certain once that was reported;
2. nothing that was saved is lost: floors, release counters, the clock floor, trials begun, what is installed;
3. nothing is quarantined that did not fail;
4. the retry completes, in the space that the undisturbed run needed (`SLACK_BYTES` apart);
5. then the disk holds exactly the files that the record needs, and nothing temporary.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ota.client.fsops import TEMPORARY_SUFFIX, Fs
from ota.client.journal import Journal, Record
from ota.client.machine import State
from ota.client.ports import UpdateEvent
from ota.client.transports import reading
from ota.client.updater import Updater
from ota.errors import OtaError
from ota.release import LEAF_BYTES
from tests.crash.memory import Durable, MemoryDisk, Possibilities
from tests.fakes.host import FakeHost
from tests.ota.client.conftest import FAST, LINE, Device, model
from tests.ota.client.simulator import Simulator, sha256

MODEL_BYTES = LEAF_BYTES + 4000
SLACK_BYTES = 16384
LIMITS = replace(FAST, window_blocks=2, flush_blocks=1, reserve_bytes=1)
ENDED_WELL = ("committed", "up_to_date")


class CrashDevice(Device):
    """A device whose present updater can be asked, also while it is being constructed (then it is None)."""

    updater: Updater | None = None

    def boot(self) -> Updater:
        self.updater = None
        self.updater = super().boot()
        return self.updater


@dataclass(frozen=True)
class Moment:
    """What the world knew when the power went."""

    disk: MemoryDisk
    record: Record
    committed: bool
    done: bool
    fetched_bytes: int
    saving: Record = field(default_factory=Record)
    """The record that was being written, if one was; else the one saved next."""


@dataclass
class Scene:
    """A device on a memory disk, what it does, and what must become of it.

    Attributes:
        act: what it does after a boot; returns when it was reported as done.
        retry: what completes the work after a cut; raises AssertionError when that does not.
        before, after: the version that serves until the act was reported, and from then on; `committed` alone counts
            as a report of `after`, unless the scene is about going back.
        goal: the version that serves after the retry.
        failing: versions that may end in quarantine.
        spoils: sets of files that bit rot may take besides, after the act was reported; what serves must serve.
        also: a further judgement of what was booted, before the retry.
    """

    name: str
    device: CrashDevice
    act: Callable[[CrashDevice, Updater], None]
    retry: Callable[[CrashDevice, Updater], None]
    before: str
    after: str
    goal: str
    failing: frozenset[str] = frozenset()
    spoils: tuple[tuple[str, ...], ...] = ()
    also: Callable[[Scene, Moment, CrashDevice, Updater], None] | None = None
    moments: list[Moment] = field(default_factory=list)
    _start: Record = field(default_factory=Record)
    _done: bool = False

    @property
    def disk(self) -> MemoryDisk:
        """The device's disk."""
        disk = self.device.disk
        assert isinstance(disk, MemoryDisk)
        return disk

    def record(self, lies: Durable | None = None) -> Scene:
        """Run the act, on a disk that `lies`; every moment at which the power could go stands in `moments` then."""
        device, disk = self.device, self.disk
        disk.settle()
        device.events.clear()
        self._start = Journal(Fs(disk)).record
        device.updater = None
        disk.synced.clear()
        disk.most_bytes = disk.used_bytes()
        disk.lies, disk.on_call = lies, self._moment
        with one_thread():
            self.act(device, device.reboot())
            self._done = True
            self._moment()
            disk.lies = disk.on_call = None
            undisturbed = self.booted(disk.snapshot())
            self.retry(undisturbed, undisturbed.reboot())
        assert isinstance(undisturbed.disk, MemoryDisk)
        most_bytes = max(disk.most_bytes, undisturbed.disk.most_bytes)
        saving = saved = self.moments[-1].record
        for number, moment in reversed([*enumerate(self.moments)]):
            moment.disk.capacity_bytes = most_bytes + SLACK_BYTES
            if moment.record is not saved:
                saving, saved = saved, moment.record
            self.moments[number] = replace(moment, saving=saving)
        return self

    def judge(self, moment: Moment, picks: tuple[int, ...], possible: Possibilities) -> str:
        """What is wrong after a cut at `moment` that left the state `picks`; empty when all is well."""
        try:
            with one_thread():
                self._judge(moment, possible.disk(picks))
        except (OtaError, AssertionError, KeyError) as e:
            return str(e) or repr(e)
        return ""

    def _judge(self, moment: Moment, disk: MemoryDisk) -> None:
        for spoiled in self.spoils if moment.done else ():
            self._judge_rot(disk.snapshot(), spoiled)
        device = self.booted(disk)
        updater = device.reboot()
        expected = {self.after} if moment.done or moment.committed else {self.before, self.after}
        assert device.serving in expected, f"{device.serving or 'nothing'} serves instead of {' or '.join(expected)}"
        self._nothing_lost(moment, updater.record)
        if self.also is not None:
            self.also(self, moment, device, updater)
        self.retry(device, updater)
        assert device.serving == self.goal, f"{device.serving or 'nothing'} serves after the retry, not {self.goal}"
        for line in updater.record.lines.values():
            assert line.state is State.IDLE, f"{line.line} is at rest in {line.state.value}"
            builds = device.repository.built.values()
            known = {built.version for built in builds if sha256(built.data) in line.quarantine}
            assert len(known) == len(line.quarantine), "a release that nobody built is quarantined"
            assert known <= self.failing, f"{', '.join(sorted(known - self.failing))} is quarantined"
        exactly(disk)

    def _judge_rot(self, disk: MemoryDisk, spoiled: tuple[str, ...]) -> None:
        for path in spoiled:
            disk.write(path, 100, b"rot")
        disk.settle()
        device = self.booted(disk)
        updater = device.reboot()
        what = f"after {' and '.join(spoiled)} rotted"
        assert device.serving == self.after, f"{device.serving or 'nothing'} serves {what}"
        opened(updater)
        self.retry(device, updater)

    def booted(self, disk: MemoryDisk) -> CrashDevice:
        """The same device with what a cut left."""
        return replace(self.device, disk=disk, host=FakeHost(faults=dict(self.device.host.faults)), events=[])

    def _nothing_lost(self, moment: Moment, now: Record) -> None:
        then = moment.record
        for repository, roles in then.floors.items():
            for role, floor in roles.items():
                kept = now.floors.get(repository, {}).get(role)
                assert kept is not None, f"the floor of {repository}/{role} is lost"
                assert kept.version >= floor.version, f"the floor of {repository}/{role} fell"
        assert now.clock_floor >= then.clock_floor, "the clock floor fell"
        for name, before in then.lines.items():
            line = now.line(name)
            assert line.floor_counter >= before.floor_counter, "the release counter's floor fell"
            assert {*before.quarantine} <= {*line.quarantine}, "a quarantine is forgotten"
            if line.pending_sha256 and line.pending_sha256 == before.pending_sha256:
                # a trial that is postponed, or goes on with another component, is given back
                least = min(before.attempts, moment.saving.line(name).attempts)
                assert line.attempts >= least, f"{before.attempts} trials began, {line.attempts} are counted"
            if moment.done:
                assert (line.active, line.previous) == (before.active, before.previous), "another release is installed"

    def _moment(self) -> None:
        device = self.device
        self.moments.append(
            Moment(
                self.disk.snapshot(),
                self._start if device.updater is None else device.updater.record,
                any(event.outcome == "committed" and event.line == LINE for event in device.events),
                self._done,
                device.transport.sent_bytes,
            )
        )


def exactly(disk: MemoryDisk) -> None:
    """Demand that the disk holds what the journal's two slots name and not a file more."""
    needed = {"state/record.a", "state/record.b", "state/record.committed"}
    for item in Journal(Fs(disk)).references():
        needed |= {f"store/{item.plain_sha256}.cbs", f"store/{item.golden_sha256}.cbs"}
        needed.add(f"releases/{item.release_sha256}.json")
    present = {path for path, _ in disk.files()}
    ours = {path for path in present if path.partition("/")[0] in ("state", "store", "releases", "inbox")}
    assert not needed - ours - {"state/record.committed"}, f"missing: {sorted(needed - ours)}"
    assert not ours - needed, f"not needed: {sorted(ours - needed)}"
    temporary = [path for path in present if path.endswith(TEMPORARY_SUFFIX)]
    assert not temporary, f"temporary files stay: {temporary}"
    folders = {path.partition("/")[0] for path in present}
    assert folders <= {"state", "store", "releases", "inbox", "trust", "keys", "config"}, f"unknown folders: {folders}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Do at once what would be done in a thread: the order of the calls is the same every time, and a survey of a
    thousand boots does not spend its time on starting threads."""

    async def at_once(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        await asyncio.sleep(0)
        return work(*arguments, **named)

    with patch.object(asyncio, "to_thread", at_once), patch.object(reading, "_threads", _AtOnce):
        yield


class _AtOnce:
    """Stands for the threads that read sticks."""

    async def run(self, work: Callable[[], Any]) -> Any:
        await asyncio.sleep(0)
        return work()


# -- parts of scenes ---------------------------------------------------------------------------------------------------


def checked(device: CrashDevice, updater: Updater) -> None:
    """One check, which brings the line to what is assigned."""
    event = device.check(updater)
    assert event.outcome in ENDED_WELL, f"the check ends with {told(event)}"


def committed(device: CrashDevice, updater: Updater) -> None:
    """One check, which commits."""
    event = device.check(updater)
    assert event.outcome == "committed", f"the check ends with {told(event)}"


def told(event: UpdateEvent) -> str:
    """An event in one line."""
    return f"{event.line} {event.version} {event.outcome} {event.reason} {event.message}"


def fresh() -> CrashDevice:
    """A device with nothing on its disk."""
    return CrashDevice(MemoryDisk(), Simulator(), limits=LIMITS)


def with_releases(*versions: str) -> CrashDevice:
    """A device that installed these, the last one serving."""
    device = fresh()
    for version in versions:
        device.release(version, data=like(version))
        committed(device, device.reboot())
    return device


def like(version: str) -> bytes:
    """The model of a version."""
    return model(int(version.replace(".", "")), MODEL_BYTES)


def opened(updater: Updater) -> None:
    """Demand that every file of every installed release opens."""
    for item in updater.record.installed():
        for sha in (item.plain_sha256, item.golden_sha256):
            os.close(updater._store.open(sha))


Maker = Callable[[Path], Scene]
"""Makes a scene that is not recorded yet; may use the folder, which exists."""
