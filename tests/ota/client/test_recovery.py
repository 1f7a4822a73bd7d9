"""Restarts in every state, damaged journals, and full or failing disks: the committed release always serves."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.metadata import TargetFile, Targets

from ota.client.fsops import Fs
from ota.client.journal import Journal, Record, decode, encode
from ota.client.machine import RECOVERY, LineRecord, Recovery, State
from ota.client.ports import Candidate, Installed, Probation
from ota.errors import OtaError, Reason, Rejected, StoreError
from tests.ota.client.conftest import LINE, Device, QuickDisk, model, run
from tests.ota.client.simulator import sha256


class Restarted(BaseException):
    """The process is gone: raised from inside the host, nothing of the updater handles it."""


@pytest.mark.parametrize("step", ["self_test", "activate", "probation"])
def test_a_restart_during_the_trial_serves_the_old_release_tries_again_and_gives_up_after_three(
    committed: Device, step: str
) -> None:
    committed.release("1.1.0")
    committed.host.faults[step, "1.1.0"] = Restarted()  # type: ignore[assignment]
    for attempt in (1, 2, 3):
        updater = committed.reboot()
        assert committed.serving == "1.0.0"
        with pytest.raises(Restarted):
            run(updater.check())
        line = Journal(Fs(committed.disk)).record.line(LINE)
        assert line.attempts == attempt
    updater = committed.reboot()
    assert committed.serving == "1.0.0"
    ended = [event for event in committed.events if event.outcome in ("rejected", "rolled_back")]
    assert [event.reason for event in ended] == [Reason.INTERRUPTED]
    assert committed.check(updater).reason is Reason.QUARANTINED
    committed.release("1.2.0")
    assert committed.check(updater).outcome == "committed"


def test_an_interrupted_trial_goes_on_without_network_and_without_fetching(committed: Device) -> None:
    committed.release("1.1.0")
    committed.host.faults["probation", "1.1.0"] = Restarted()  # type: ignore[assignment]
    with pytest.raises(Restarted):
        run(committed.reboot().check())
    committed.host.faults.clear()
    committed.transport.unreachable = True
    assert committed.check().outcome == "committed"
    assert committed.serving == "1.1.0"


def test_a_waiting_candidate_whose_file_rotted_is_fetched_again_and_not_quarantined(committed: Device) -> None:
    committed.release("1.1.0")
    committed.host.faults["self_test", "1.1.0"] = Rejected(Reason.BUSY, "no room for a trial")
    updater = committed.reboot()
    assert committed.check(updater).reason is Reason.BUSY
    candidate = updater.record.line(LINE).candidate
    assert candidate is not None
    path = committed.disk / "store" / f"{candidate.plain_sha256}.cbs"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    committed.host.faults.clear()
    event = committed.check(updater)
    assert (event.outcome, event.reason, event.version) == ("failed", Reason.PAYLOAD_CORRUPT, "1.1.0")
    assert committed.check(updater).outcome == "committed"
    assert not updater.record.line(LINE).quarantine


def test_a_candidate_that_was_withdrawn_meanwhile_is_not_tried_again(committed: Device) -> None:
    committed.release("1.1.0")
    committed.host.faults["probation", "1.1.0"] = Restarted()  # type: ignore[assignment]
    with pytest.raises(Restarted):
        run(committed.reboot().check())
    committed.release("1.2.0")
    assert committed.check().outcome == "committed"
    assert committed.serving == "1.2.0"
    tried = [call for call in committed.host.calls if call[0] == "self_test" and call[2] == "1.1.0"]
    assert len(tried) == 1


@pytest.mark.parametrize("state", list(State))
def test_every_persisted_state_recovers_to_rest_with_the_committed_release(committed: Device, state: State) -> None:
    """The recovery map, state by state: what is on disk is a record in that state with a staged candidate."""
    fs = Fs(committed.disk)
    journal = Journal(fs)
    line = journal.record.line(LINE)
    assert line.active is not None
    candidate = replace(line.active, version="1.1.0", release_sha256="c" * 64, release_counter=2)
    stuck = replace(
        line, state=state, candidate=candidate, pending_version="1.1.0", pending_sha256="c" * 64, attempts=1
    )
    data = encode(journal.record.with_line(stuck), 1000)
    (committed.disk / "state" / "record.a").write_bytes(data)
    updater = committed.reboot()
    rested = updater.record.line(LINE)
    assert rested.state is State.IDLE
    assert rested.active == line.active
    assert committed.serving == "1.0.0"
    kept = RECOVERY[state] in (Recovery.NONE, Recovery.RETRY)
    assert (rested.candidate is not None) is kept
    assert committed.check(updater).outcome == "up_to_date"


def test_a_state_of_a_later_version_rolls_back(committed: Device) -> None:
    path = committed.disk / "state" / "record.a"
    generation, record = decode(path.read_bytes())
    stuck = replace(record.line(LINE), state=State.PROBATION, pending_sha256="c" * 64)
    data = encode(record.with_line(stuck), generation + 10).split(b"\n", 1)[1]
    body = data.replace(b'"probation"', b'"teleporting"')
    path.write_bytes(b"edge-ota state " + sha256(body).encode() + b"\n" + body)
    updater = committed.reboot()
    assert committed.serving == "1.0.0"
    assert updater.record.line(LINE).state is State.IDLE
    assert [(e.outcome, e.reason) for e in committed.events if e.outcome] == [("rolled_back", Reason.STATE_CORRUPT)]


def test_a_roll_back_during_the_recovery_of_a_damaged_release_leaves_the_one_before_it_in_service(
    committed: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed.release("1.1.0")
    assert committed.check().outcome == "committed"
    updater = committed.boot()
    active = updater.record.line(LINE).active
    assert active is not None
    path = committed.disk / "store" / f"{active.plain_sha256}.cbs"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    read, looked, go_on = updater.store.read, asyncio.Event(), asyncio.Event()

    async def slowly(plain_sha256: str) -> int:
        if plain_sha256 == active.plain_sha256:
            looked.set()
            await go_on.wait()
        return await read(plain_sha256)

    monkeypatch.setattr(updater.store, "read", slowly)

    async def scenario() -> None:
        recovering = asyncio.create_task(updater.recover())
        await looked.wait()
        person = asyncio.create_task(updater.rollback(LINE))
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.gather(recovering, person, return_exceptions=True)

    run(scenario())
    serving = updater.active(LINE)
    assert serving is not None
    assert serving.version == "1.0.0"


def test_an_update_that_a_person_began_first_keeps_no_line_from_starting(committed: Device) -> None:
    committed.release("1.1.0")
    updater = committed.boot()
    committed.transport.silent = frozenset({"block"})

    async def scenario() -> None:
        update = asyncio.create_task(updater.check())
        while updater.record.line(LINE).state is not State.FETCHING:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(60):
            await updater.recover()
        assert updater.record.line(LINE).state is State.FETCHING
        assert await updater.cancel(LINE)
        await asyncio.gather(update, return_exceptions=True)

    run(scenario())
    assert updater.record.line(LINE).state is State.IDLE


# -- the journal -------------------------------------------------------------------------------------------------------


def _newest(disk: Path) -> Path:
    slots = [path for path in (disk / "state").iterdir() if path.suffix in (".a", ".b")]
    return max(slots, key=lambda path: decode(path.read_bytes())[0])


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "zeros"])
def test_a_damaged_slot_falls_to_the_other(committed: Device, damage: str) -> None:
    path = _newest(committed.disk)
    data = path.read_bytes()
    flipped = data[:200] + bytes([data[200] ^ 1]) + data[201:]
    path.write_bytes({"flip": flipped, "cut": data[:-1], "empty": b"", "zeros": bytes(len(data))}[damage])
    updater = committed.reboot()
    assert committed.serving == "1.0.0"
    assert Reason.STATE_CORRUPT.value in committed.reasons
    committed.release("1.1.0")
    assert committed.check(updater).outcome == "committed"
    assert Journal(Fs(committed.disk)).condition is None


@pytest.mark.fault("F13")
def test_when_both_slots_are_lost_the_last_commit_and_its_floors_survive(committed: Device) -> None:
    old = committed.repository.frozen()
    committed.release("1.1.0")
    assert committed.check().outcome == "committed"
    committed.check()
    for name in ("record.a", "record.b"):
        (committed.disk / "state" / name).write_bytes(b"rubbish")
    updater = committed.reboot()
    assert committed.serving == "1.1.0"
    assert Reason.STATE_CORRUPT.value in committed.reasons
    committed.repository.documents, current = old.documents, committed.repository.documents
    assert committed.check(updater).reason is Reason.METADATA_ROLLBACK
    committed.repository.documents = current
    assert committed.check(updater).outcome == "up_to_date"


def test_when_both_slots_are_gone_the_last_commit_and_its_floors_survive_and_it_is_told(committed: Device) -> None:
    for name in ("record.a", "record.b"):
        (committed.disk / "state" / name).unlink()
    updater = committed.reboot()
    assert committed.serving == "1.0.0"
    assert updater.record.floors
    assert updater.record.line(LINE).floor_counter
    assert committed.reasons == [Reason.STATE_CORRUPT.value]


class _BadSectors(QuickDisk):
    """Cannot read some files."""

    bad: tuple[str, ...] = ()

    def read(self, path: str, offset: int, length: int) -> bytes:
        if path in self.bad:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(path, offset, length)


@pytest.mark.parametrize(
    "bad",
    [("record.a",), ("record.b",), ("record.a", "record.b"), ("record.committed",), ("record.a", "record.committed")],
)
def test_a_record_on_a_bad_sector_keeps_no_device_from_starting(committed: Device, bad: tuple[str, ...]) -> None:
    disk = _BadSectors(committed.disk)
    disk.bad = tuple(f"state/{name}" for name in bad)
    committed.disk = disk
    committed.reboot()
    assert committed.serving == "1.0.0"
    assert committed.reasons == ([] if bad == ("record.committed",) else [Reason.STATE_CORRUPT.value])


def test_records_that_cannot_be_read_now_are_not_thrown_away(committed: Device) -> None:
    disk = _BadSectors(committed.disk)
    disk.bad = tuple(f"state/record.{name}" for name in ("a", "b", "committed"))
    with pytest.raises(StoreError) as caught:
        Journal(Fs(disk))
    assert caught.value.reason is Reason.IO_ERROR
    disk.bad = ()
    assert Journal(Fs(disk)).record.line(LINE).active is not None


def test_when_every_copy_is_lost_the_device_starts_from_nothing_and_says_so(committed: Device) -> None:
    for path in (committed.disk / "state").iterdir():
        path.write_bytes(b"")
    updater = committed.reboot()
    assert committed.serving == ""
    assert committed.reasons == [Reason.STATE_CORRUPT.value]
    assert committed.check(updater).outcome == "committed"


def test_a_record_survives_being_written_and_read(tmp_path: Path) -> None:
    installed = Installed(LINE, "1.0.0", 3, "a" * 64, "int8", "b" * 64, "c" * 64)
    line = LineRecord(
        LINE,
        State.TESTING,
        installed,
        None,
        "1.1.0",
        "d" * 64,
        installed,
        2,
        {"e" * 64: Reason.OVER_BUDGET},
        3,
        "a" * 64,
    )
    record = replace(Record().with_line(line), clock_floor="2026-01-01T00:00:00+00:00")
    assert decode(encode(record, 7)) == (7, record)


# -- disks -------------------------------------------------------------------------------------------------------------


class FaultyDisk(QuickDisk):
    """Refuses the n-th writing call, or every one from then on."""

    def __init__(self, root: Path, error: int, at: int, forever: bool) -> None:
        super().__init__(root)
        self._error, self._fail_at, self._forever, self.calls = error, at, forever, 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._fail_at or (self._forever and self.calls > self._fail_at):
            raise OSError(self._error, "injected")

    def write(self, path: str, offset: int, data: bytes) -> None:
        self._count()
        super().write(path, offset, data)

    def fsync(self, path: str) -> None:
        self._count()
        super().fsync(path)

    def rename(self, source: str, destination: str) -> None:
        self._count()
        super().rename(source, destination)

    def unlink(self, path: str) -> None:
        if self._error in (errno.EROFS, errno.EIO):
            self._count()
        super().unlink(path)


def _at_each_call() -> list[int]:
    return [1, 2, 3, 5, 8, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 33, 36, 40]


@pytest.mark.fault("F8")
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("at", _at_each_call())
def test_a_disk_that_fills_up_at_any_write_leaves_the_old_release_and_reports_no_space(
    committed: Device, at: int, forever: bool
) -> None:
    root = committed.disk
    assert isinstance(root, Path)
    committed.release("1.1.0")
    committed.disk = FaultyDisk(root, errno.ENOSPC, at, forever)
    updater = committed.boot()
    run(updater.recover())
    event = run(updater.check())[-1]
    assert event.outcome in ("failed", "rolled_back", "committed")
    if event.outcome != "committed":
        assert event.reason is Reason.NO_SPACE
        assert committed.serving == "1.0.0"
        assert not list(root.rglob("*.tmp"))
    committed.disk = root
    committed.reboot()
    assert committed.serving in ("1.0.0", "1.1.0")
    assert committed.check().outcome in ("committed", "up_to_date")
    assert committed.serving == "1.1.0"


@pytest.mark.fault("F10")
@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS])
@pytest.mark.parametrize("at", [1, 4, 9, 15, 21, 27, 32])
def test_a_disk_that_fails_stops_updating_but_not_serving(committed: Device, at: int, error: int) -> None:
    root = committed.disk
    assert isinstance(root, Path)
    committed.release("1.1.0")
    committed.disk = FaultyDisk(root, error, at, True)
    updater = committed.boot()
    run(updater.recover())
    event = run(updater.check())[-1]
    assert event.outcome in ("failed", "rolled_back", "committed")
    if event.outcome != "committed":
        assert (event.reason, committed.serving) == (Reason.IO_ERROR, "1.0.0")
    committed.disk = root
    assert committed.check().outcome in ("committed", "up_to_date")
    assert committed.serving == "1.1.0"


@pytest.mark.fault("F14")
@pytest.mark.parametrize("error", [errno.EDQUOT, errno.ENAMETOOLONG])
def test_quota_and_name_limits_are_reported_like_a_full_disk(committed: Device, error: int) -> None:
    root = committed.disk
    assert isinstance(root, Path)
    committed.release("1.1.0")
    committed.disk = FaultyDisk(root, error, 6, True)
    event = run(committed.boot().check())[-1]
    assert event.outcome == "failed"
    assert event.reason is (Reason.NO_SPACE if error == errno.EDQUOT else Reason.IO_ERROR)
    assert event.hint
    assert committed.serving == "1.0.0"


# -- rollback ----------------------------------------------------------------------------------------------------------


def test_a_rollback_whose_previous_files_rotted_changes_nothing(committed: Device) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    committed.check(updater)
    path = committed.disk / "store" / f"{sha256(model(100))}.cbs"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError):
        run(updater.rollback(LINE))
    assert committed.serving == "1.1.0"
    assert updater.record.line(LINE).previous is not None


def test_rollback_and_retry_are_refused_while_an_update_runs(committed: Device) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    gate = committed.host.hold["self_test", "1.1.0"] = asyncio.Event()

    async def scenario() -> None:
        round_ = asyncio.create_task(updater.check())
        while updater.record.line(LINE).state is not State.TESTING:
            await asyncio.sleep(0.001)
        with pytest.raises(OtaError) as busy:
            await updater.rollback(LINE)
        assert busy.value.reason is Reason.BUSY
        with pytest.raises(OtaError):
            updater.retry(LINE)
        gate.set()
        await round_

    run(scenario())
    assert committed.serving == "1.1.0"


def test_a_host_that_cannot_serve_the_old_release_either_is_reported(committed: Device) -> None:
    committed.release("1.1.0")
    committed.host.faults["probation", "1.1.0"] = Rejected(Reason.WORKER_CRASHED, "SIGSEGV")
    committed.host.faults["revert", "1.0.0"] = Rejected(Reason.WORKER_CRASHED, "again")
    updater = committed.reboot()
    assert committed.check(updater).outcome == "rolled_back"
    assert any("does not serve" in event.message for event in committed.events)
    assert updater.active(LINE).version == "1.0.0"


class RecordsFull(QuickDisk):
    """Has room for so many state records once `left` is set, and then for none until it is None again."""

    left: int | None = None

    def write(self, path: str, offset: int, data: bytes) -> None:
        if path.startswith("state/") and self.left is not None:
            if self.left == 0:
                raise OSError(errno.ENOSPC, "full")
            self.left -= 1
        super().write(path, offset, data)


@pytest.mark.parametrize("room", [1, 2])
def test_what_the_first_record_says_is_done_although_its_copies_have_no_room(committed: Device, room: int) -> None:
    assert isinstance(committed.disk, Path)
    disk = committed.disk = RecordsFull(committed.disk)
    committed.release("1.1.0")
    committed.check()
    updater = committed.reboot()
    disk.left = room
    event = run(updater.rollback(LINE))
    disk.left = None
    active = updater.record.line(LINE).active
    assert active is not None
    assert (event.outcome, active.version, committed.serving) == ("rolled_back", "1.0.0", "1.0.0")
    assert committed.reasons.count("no_space") == 1
    committed.reboot()
    assert committed.serving == "1.0.0"


def test_a_commit_without_room_for_its_copies_is_told_as_one_and_survives_a_restart(committed: Device) -> None:
    assert isinstance(committed.disk, Path)
    disk = committed.disk = RecordsFull(committed.disk)
    committed.release("1.1.0")
    updater = committed.reboot()
    commit = committed.host.probation

    async def probation(candidate: Candidate) -> Probation:
        disk.left = 1
        return await commit(candidate)

    committed.host.probation = probation  # type: ignore[method-assign]
    event = committed.check(updater)
    disk.left = None
    assert (event.outcome, committed.serving) == ("committed", "1.1.0")
    assert committed.reasons.count("no_space") == 1
    committed.reboot()
    assert committed.serving == "1.1.0"


def test_lines_that_somebody_makes_up_do_not_fill_the_record(committed: Device) -> None:
    """A director's key alone may name lines without end; a record too long to be read would be a lost one."""
    built = committed.release("1.1.0", grant=False)
    paths = [f"line-{number}/1.0.0/release.json" for number in range(40)]

    def made_up(signed: Targets) -> None:
        signed.targets.update({path: TargetFile.from_data(path, b"x", ["sha256"]) for path in paths})

    committed.grant(built, edit=made_up)
    updater = committed.reboot()
    outcomes = [event.outcome for event in run(updater.check())]
    assert sorted(outcomes) == ["committed", *["rejected"] * 40]
    assert list(updater.record.lines) == [LINE]
    assert list(Journal(Fs(committed.disk)).record.lines) == [LINE]


def test_a_line_that_could_not_be_served_at_the_start_is_served_when_it_can_be(committed: Device) -> None:
    updater = committed.reboot()
    committed.host.serving.clear()
    run(updater.serve(LINE))
    assert committed.serving == "1.0.0"
