"""The clock is raised to signed dates, forward alone, and only where nobody who knows better keeps it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import RELEASED, cli
from agent.daemon import clock
from agent.daemon.clock import SystemKernel, Verdict, judge, raise_clock, read_floor
from agent.errors import AgentError, Reason
from ota.client.fsops import Fs
from ota.client.journal import FILES, Journal
from ota.client.limits import Limits

DAY = timedelta(days=1)
SIGNED = datetime(2027, 3, 1, 12, tzinfo=UTC)
MADE = datetime.combine(RELEASED, datetime.min.time(), UTC)
moments = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))


@dataclass
class FakeKernel:
    """Implements `agent.daemon.clock.Kernel`; a refused or unreadable clock raises as the system calls do."""

    shown: datetime
    kept: bool = False
    refuses: int = 0
    unreadable: bool = False
    set_to: list[datetime] = field(default_factory=list)

    def now(self) -> datetime:
        return self.shown

    def synchronised(self) -> bool:
        if self.unreadable:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return self.kept

    def set(self, moment: datetime) -> None:
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))
        self.set_to.append(moment)
        self.shown = moment


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory whose updater has seen a release of `SIGNED`."""
    write(tmp_path, SIGNED.isoformat())
    return tmp_path


def write(state: Path, floor: str) -> None:
    journal = Journal(Fs(state))
    for _ in range(2):
        journal.save(dataclasses.replace(journal.record, clock_floor=floor), commit=True)


# -- what to do --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F39")
@pytest.mark.parametrize(
    ("now", "kept", "verdict"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), False, Verdict.RAISE),
        (SIGNED - 300 * DAY, False, Verdict.RAISE),
        (SIGNED - 300 * DAY, True, Verdict.SYNCHRONISED),
        (SIGNED, False, Verdict.PAST_THE_FLOOR),
        (SIGNED + DAY, False, Verdict.PAST_THE_FLOOR),
        (datetime(2099, 1, 1, tzinfo=UTC), False, Verdict.PAST_THE_FLOOR),
    ],
)
def test_only_a_clock_that_is_behind_and_kept_by_nobody_is_raised(now: datetime, kept: bool, verdict: Verdict) -> None:
    kernel = FakeKernel(now, kept)
    assert raise_clock(kernel, SIGNED) == (verdict, now)
    assert kernel.set_to == ([SIGNED] if verdict is Verdict.RAISE else [])


@pytest.mark.fault("F39")
@given(moments, moments, st.booleans())
def test_no_clock_is_ever_set_back(now: datetime, floor: datetime, kept: bool) -> None:
    kernel = FakeKernel(now, kept)
    raise_clock(kernel, floor)
    assert kernel.shown >= now
    assert judge(kernel.shown, floor, kept) is not Verdict.RAISE
    assert kernel.shown == now or not kept


@pytest.mark.parametrize("fault", [{"refuses": errno.EPERM}, {"unreadable": True}])
def test_a_clock_that_cannot_be_set_is_told_with_its_reason(fault: dict[str, int]) -> None:
    with pytest.raises(AgentError) as caught:
        raise_clock(FakeKernel(SIGNED - DAY, **fault), SIGNED)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.CLOCK_UNSETTABLE
    assert "2027-02-28" in caught.value.message
    assert caught.value.hint


def test_a_clock_that_is_right_needs_no_privilege_and_no_answer_of_the_kernel() -> None:
    kernel = FakeKernel(SIGNED + DAY, refuses=errno.EPERM, unreadable=True)
    assert raise_clock(kernel, SIGNED)[0] is Verdict.PAST_THE_FLOOR


# -- where the floor comes from ----------------------------------------------------------------------------------------


def test_the_floor_is_the_newest_signed_date(state: Path) -> None:
    assert read_floor(state) == clock.Floor(SIGNED)


def test_before_the_first_release_it_is_the_date_of_this_software(tmp_path: Path) -> None:
    assert read_floor(tmp_path / "absent") == clock.Floor(MADE)
    write(tmp_path, "")
    assert read_floor(tmp_path) == clock.Floor(MADE)
    assert read_floor(tmp_path, date(2030, 1, 2)).moment == datetime(2030, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    "damage", [b"", b"\0" * 4096, b"edge-ota state " + b"0" * 64 + b"\n{}", bytes(range(100, 200))]
)
def test_damaged_records_are_passed_over(state: Path, damage: bytes) -> None:
    for name in FILES[:2]:
        (state / name).write_bytes(damage)
    assert read_floor(state) == clock.Floor(SIGNED, damaged=2)
    (state / FILES[2]).write_bytes(damage)
    assert read_floor(state) == clock.Floor(MADE, damaged=3)


def test_a_record_that_is_a_link_a_pipe_or_a_folder_is_not_read(state: Path) -> None:
    link, pipe, folder = (state / name for name in FILES)
    link.rename(state / "elsewhere")
    link.symlink_to(state / "elsewhere")
    pipe.unlink()
    os.mkfifo(pipe)
    folder.unlink()
    folder.mkdir()
    assert read_floor(state) == clock.Floor(MADE, damaged=3)


@pytest.mark.fault("F40")
@pytest.mark.parametrize("floor", ["2045-01-02T00:00:00+00:00", "9999-12-31T23:59:59+00:00"])
def test_a_date_beyond_the_ceiling_moves_nothing(state: Path, floor: str) -> None:
    assert datetime.fromisoformat(floor) > Limits().clock_ceiling
    write(state, floor)
    assert read_floor(state) == clock.Floor(MADE, beyond=3)


@pytest.mark.parametrize("floor", ["2027-03-01T12:00:00", "soon", "2027-13-45"])
def test_a_date_that_says_no_moment_counts_as_damaged(state: Path, floor: str) -> None:
    write(state, floor)
    assert read_floor(state) == clock.Floor(MADE, damaged=3)


def test_nothing_is_written(state: Path) -> None:
    before = {path: path.stat() for path in [state, *state.rglob("*")]}
    read_floor(state)
    assert {path: path.stat().st_mtime_ns for path in [state, *state.rglob("*")]} == {
        path: facts.st_mtime_ns for path, facts in before.items()
    }


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """`edge-agent clock` over a kernel that shows a day before the floor; this machine's own is never touched."""
    (tmp_path / "agent.toml").write_text(f'state_dir = "{state}"\n')
    kernel = FakeKernel(SIGNED - DAY)
    monkeypatch.setattr(clock, "SystemKernel", lambda: kernel)
    return kernel


def test_the_command_raises_the_clock_and_says_so(
    command: FakeKernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["clock", "--config", str(tmp_path / "agent.toml"), "--json"]
    assert cli.main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"verdict": "raise", "clock": (SIGNED - DAY).isoformat(), "floor": SIGNED.isoformat()}
    assert command.set_to == [SIGNED]
    assert cli.main(asked) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "past_the_floor"


def test_the_command_ends_with_the_code_of_its_reason_and_notes_what_it_ignored(
    command: FakeKernel, tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.refuses = errno.EPERM
    (state / FILES[0]).write_bytes(b"damaged")
    assert cli.main(["clock", "--config", str(tmp_path / "agent.toml")]) == 77
    told = capsys.readouterr()
    assert told.out == ""
    assert "note: 1 damaged records" in told.err
    assert "[clock_unsettable]" in told.err
    shutil.rmtree(state / "state")
    command.shown = MADE
    assert cli.main(["clock", "--config", str(tmp_path / "agent.toml")]) == 0


def test_the_kernel_answers_without_a_privilege() -> None:
    kernel = SystemKernel()
    assert isinstance(kernel.synchronised(), bool)
    assert abs(kernel.now() - datetime.now(UTC)) < timedelta(seconds=5)
