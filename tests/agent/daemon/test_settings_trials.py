"""When settings go on trial and how a trial ends, with a clock of numbers and nothing else of a daemon."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent import config, service
from agent.daemon.settings import Chosen, SettingsTrials, choose, file_sha256
from agent.daemon.working import Working
from ota.client.configuration import Configuration
from ota.client.fsops import Disk, Fs
from ota.client.journal import Journal
from ota.client.settings import Origin, State
from ota.errors import Reason, StoreError

OWN = """\
state_dir = "state"
[[source]]
name = "belt"
kind = "video"
path = "clip.avi"
[[line]]
name = "parts"
source = "belt"
"""


class Daemon:
    """The parts that a trial looks at, none of which does anything."""

    def __init__(self, folder: Path) -> None:
        (folder / "agent.toml").write_text(OWN)
        (folder / "state").mkdir()
        own = config.load(folder / "agent.toml")
        fs = Fs(folder / "state")
        self.busy = False
        self.paused = ""
        self.sources: dict[str, Any] = {}
        self.lines: dict[str, Any] = {}
        self.now = 0.0
        self.restarts = 0
        self.told: list[Any] = []
        self.kept = Configuration(fs, Journal(fs))
        self.trials = SettingsTrials(
            self.kept,
            Chosen(own, file_sha256(own), own),
            Working(
                lambda: None,
                self.sources,
                self.lines,
                committed=lambda _: True,
                busy=lambda: self.busy,
                paused=lambda: self.paused,
            ),
            tell=self.told.append,
            restart=self._restart,
            limit_s=60,
            clock=lambda: self.now,
        )

    def _restart(self) -> None:
        self.restarts += 1


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon(tmp_path)


WANTED = OWN + "[update]\npoll_s = 900\n"


def test_what_the_fleet_wants_waits_for_the_end_of_an_update(daemon: Daemon) -> None:
    daemon.busy = True
    daemon.trials.fleet_wants(WANTED)
    daemon.trials.tick()
    assert (daemon.kept.record.state, daemon.restarts) == (State.IDLE, 0)
    daemon.busy = False
    daemon.trials.tick()
    assert (daemon.kept.record.state, daemon.restarts) == (State.TRIAL, 1)
    assert daemon.trials.on_trial


@pytest.mark.parametrize("instead", [None, "[toaster]\n"])
def test_what_the_fleet_does_not_want_any_more_is_not_tried_when_the_update_ends(
    daemon: Daemon, instead: str | None
) -> None:
    if instead is not None:
        daemon.trials.fleet_wants(instead)
        daemon.trials.tick()
        assert [event["outcome"] for event in daemon.told] == ["rejected"]
    daemon.busy = True
    daemon.trials.fleet_wants(WANTED)
    daemon.trials.fleet_wants(instead)
    daemon.busy = False
    daemon.trials.tick()
    assert (daemon.kept.record.state, daemon.restarts) == (State.IDLE, 0)


def on_trial(tmp_path: Path, *expect: str, wanted: str = WANTED) -> Daemon:
    """A daemon that runs with settings on trial."""
    daemon = Daemon(tmp_path)
    daemon.kept.propose(wanted.encode(), daemon.trials.chosen.own_sha256, Origin.FLEET, expect)
    own = daemon.trials.chosen.own
    daemon.trials.chosen = choose(own, file_sha256(own), daemon.kept, 3, restarted=False)
    daemon.trials.start()
    return daemon


def test_a_disk_that_refuses_is_not_asked_every_second(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def full(*_: object) -> str:
        asked.append(daemon.now)
        raise StoreError(Reason.NO_SPACE, "config: No space left on device")

    monkeypatch.setattr(daemon.kept, "propose", full)
    daemon.trials.fleet_wants(WANTED)
    for daemon.now in range(61):
        daemon.trials.tick()
    assert asked == [0, 30, 60]
    monkeypatch.undo()
    daemon.now = 90
    daemon.trials.tick()
    assert daemon.kept.record.state is State.TRIAL


class FullDisk(Disk):
    """Has room for nothing, and can be read."""

    def write(self, path: str, offset: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("changed", [False, True])
def test_a_full_disk_puts_a_trial_off_and_keeps_no_device_from_serving(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    daemon.trials.propose(WANTED, Origin.PERSON)
    if changed:
        (tmp_path / "agent.toml").write_text(OWN + "# by hand\n")
    own = config.load(tmp_path / "agent.toml")
    full = Fs(FullDisk(tmp_path / "state"))
    with monkeypatch.context() as patched:
        patched.setattr(service, "_kept", lambda _: Configuration(full, Journal(full)))
        chosen = service._choose(own, file_sha256(own), True)
    assert (chosen.config, chosen.trial, chosen.sha256) == (own, False, "")
    # a daemon that runs without the settings on trial is held up by nothing
    daemon.trials.chosen, daemon.trials._ends = chosen, False
    daemon.trials.tick()
    assert not daemon.trials.on_trial
    again = service._choose(own, file_sha256(own), True)
    assert again.trial is not changed


def test_a_trial_passes_when_everything_expected_has_held_for_two_seconds(tmp_path: Path) -> None:
    daemon = on_trial(tmp_path)
    passed = []
    for daemon.now in (0.0, 1.9, 2.0, 3.0):
        passed.append(daemon.trials.tick())
    assert passed == [False, False, True, False]
    assert daemon.kept.record.active
    assert [event["outcome"] for event in daemon.told] == ["committed"]
    assert daemon.restarts == 0


@pytest.mark.parametrize("missing", ["link", "source belt", "line parts"])
def test_a_trial_in_which_something_expected_stays_away_is_taken_back_after_its_time(
    tmp_path: Path, missing: str
) -> None:
    daemon = on_trial(tmp_path, missing)
    for daemon.now in (0.0, 60.0):
        assert not daemon.trials.tick()
    assert daemon.kept.record.state is State.TRIAL
    daemon.now = 60.1
    assert not daemon.trials.tick()
    (event,) = daemon.trials.untold
    assert (event["outcome"], event["reason"]) == ("rolled_back", "settings_failed")
    assert missing in event["message"]
    assert (daemon.kept.record.state, daemon.kept.record.active, daemon.restarts) == (State.IDLE, "", 1)
    assert list(daemon.kept.record.quarantine) == [event["sha256"]]


@pytest.mark.parametrize(
    ("added", "outcome"),
    [("[update]\npoll_s = 900\n", "committed"), ('[governor]\nhot_c = 20\nladder = ["pause"]\n', "rolled_back")],
)
def test_a_board_too_hot_for_any_frame_is_no_fault_of_settings_that_do_not_call_it_so(
    tmp_path: Path, added: str, outcome: str
) -> None:
    daemon = on_trial(tmp_path, "source belt", wanted=OWN + added)
    source = SimpleNamespace(state="opening", opened=object(), reason="", detail="")
    daemon.sources["belt"] = source
    daemon.lines["parts"] = SimpleNamespace(source=source, config=SimpleNamespace(name="parts"))
    daemon.paused = "85.0 °C, 80 allowed"
    for daemon.now in (0.0, 2.0, 60.1):
        daemon.trials.tick()
    ends = list(daemon.told) + list(daemon.trials.untold)
    assert [end["outcome"] for end in ends] == [outcome]
    assert outcome == "committed" or "opening paused by the governor: 85.0 °C" in ends[0]["message"]


def test_a_source_that_cannot_be_opened_fails_the_trial_on_a_hot_board_too(tmp_path: Path) -> None:
    daemon = on_trial(tmp_path, "source belt")
    source = SimpleNamespace(state="reconnecting", opened=None, reason="source_unavailable", detail="no such file")
    daemon.sources["belt"], daemon.paused = source, "85.0 °C, 80 allowed"
    for daemon.now in (0.0, 60.1):
        daemon.trials.tick()
    assert [event["outcome"] for event in daemon.trials.untold] == ["rolled_back"]
