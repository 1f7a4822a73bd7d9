"""Sticks of the real publisher on the real updater, with the clocks of both moved by hand: what a stick made on one day
does to a device on another, and that floors and lifetimes of sticks and network never mix."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.ports import UpdateEvent
from ota.client.transports.directory import DirectoryTransport
from ota.errors import Reason, Rejected
from ota.publisher import director, files, sticks
from ota.publisher.rotate import rotate
from ota.publisher.stickkeys import rotate as rotate_stick_key
from tests.ota.client.stickfleet import LINE, Device, Fleet


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher's durability is tested elsewhere; here it makes dozens of releases."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


# -- floors and lifetimes ----------------------------------------------------------------------------------------------


def test_sticks_from_before_and_after_fifty_online_releases_install_exactly_when_their_counter_is_higher(
    fleet: Fleet,
) -> None:
    """One device follows the network, the other sees sticks alone; each takes what is newer for it, no more."""
    online, alone = Device(fleet, "online"), Device(fleet, "alone")
    everybody = ("online", "alone")
    fleet.release("0.1.0", grant_to=everybody)
    before = {name: fleet.stick(name) for name in everybody}
    for number in range(50):
        fleet.release(f"1.{number}.0", seed=100 + number, grant_to=("online",) if number == 49 else ())
    assert online.look().outcome == "committed"
    assert online.serving == "1.49.0"
    main = online.main_floors()
    assert main["timestamp"] > 50

    assert online.plug(before["online"]).reason is Reason.COUNTER_ROLLBACK
    assert (alone.plug(before["alone"]).outcome, alone.serving) == ("committed", "0.1.0")

    fleet.release("2.0.0", grant_to=everybody)
    after = {name: fleet.stick(name) for name in everybody}
    for device in (online, alone):
        assert (device.plug(after[device.name]).outcome, device.serving) == ("committed", "2.0.0")
        assert device.plug(after[device.name]).outcome == "up_to_date"
        assert device.plug(before[device.name]).reason is Reason.METADATA_ROLLBACK
        assert device.serving == "2.0.0"
    assert online.main_floors() == main
    # and the network goes on from where it was, with the counter that the stick left
    fleet.release("2.1.0", grant_to=everybody)
    for device in (online, alone):
        assert (device.look().outcome, device.serving) == ("committed", "2.1.0")


def test_a_stick_leaves_the_floors_of_the_network_alone_and_the_network_those_of_sticks(fleet: Fleet) -> None:
    device = Device(fleet)
    fleet.release("1.0.0", grant_to=("cam-1",))
    assert device.plug(fleet.stick("cam-1")).outcome == "committed"
    assert set(device.floors()) == {"sideload"}
    for _ in range(5):
        fleet.stick("cam-1")  # versions of the sticks' own timestamp run far ahead of the network's
    fleet.release("1.1.0", grant_to=("cam-1",))
    assert device.look().outcome == "committed"
    assert set(device.floors()) == {"sideload", "main"}
    fleet.release("1.2.0", grant_to=("cam-1",))
    assert device.plug(fleet.stick("cam-1", ".zip")).outcome == "committed"


def test_a_stick_lives_half_a_year_and_no_longer(fleet: Fleet) -> None:
    device = Device(fleet)
    fleet.release("1.0.0", grant_to=("cam-1",))
    stick = fleet.stick("cam-1")
    assert fleet.last.own_root
    assert timedelta(days=179) < fleet.last.expires - datetime.now(fleet.last.expires.tzinfo) <= timedelta(days=180)
    device.clock.advance(days=179)
    assert device.plug(stick).outcome == "committed"
    late = Device(fleet, "cam-2")
    director.grant(fleet.repository, "cam-2", LINE, "1.0.0")
    stick = fleet.stick("cam-2")
    late.clock.advance(days=181)
    assert late.plug(stick).reason is Reason.TIMESTAMP_EXPIRED


def test_what_is_on_a_stick_means_nothing_online(fleet: Fleet, tmp_path: Path) -> None:
    """A hostile broker that plays a stick's long-lived documents back freezes nobody for half a year."""
    device = Device(fleet)
    fleet.release("1.0.0", grant_to=("cam-1",))
    assert device.look().outcome == "committed"
    fleet.release("1.1.0", grant_to=("cam-1",))
    stick = fleet.stick("cam-1")
    replayed = asyncio.run(_look_at(device, stick))
    assert replayed.reason is Reason.BAD_SIGNATURE
    # nor does the network's timestamp pass on a stick
    metadata = fleet.repository.path / "metadata" / "timestamp.json"
    (stick / "metadata" / "timestamp.json").write_bytes(metadata.read_bytes())
    assert device.plug(stick).reason is Reason.BAD_SIGNATURE
    assert device.serving == "1.0.0"


async def _look_at(device: Device, place: Path) -> UpdateEvent:
    updater = device.updater()
    updater._transports = (DirectoryTransport(place, device.name),)  # what the broker would answer
    return (await updater.check())[-1]


def test_a_device_enrolled_before_there_were_sticks_gets_short_lived_ones(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, own_root=False)
    device = Device(fleet)
    assert device.stick_root is None
    sticks.create(fleet.repository)
    fleet.release("1.0.0", grant_to=("cam-1",))
    stick = fleet.stick("cam-1")
    assert not fleet.last.own_root
    assert fleet.last.expires - datetime.now(fleet.last.expires.tzinfo) <= timedelta(days=7)
    assert device.plug(stick).outcome == "committed"


def test_a_stick_of_another_fleet_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Fleet(tmp_path / "other")
    Device(other)
    other.release("9.0.0", grant_to=("cam-1",))
    assert Device(fleet).plug(other.stick("cam-1")).reason is Reason.BAD_SIGNATURE


def test_keys_of_sticks_are_replaced_and_sticks_from_before_work_until_one_from_after_was_seen(fleet: Fleet) -> None:
    device, second = Device(fleet), Device(fleet, "cam-2")
    fleet.release("1.0.0", grant_to=("cam-1", "cam-2"))
    old = fleet.stick("cam-1")
    for key in ("timestamp", "snapshot", "targets", "director", "root-1", "root-2", "root-3"):
        rotate_stick_key(fleet.repository, key)
    assert device.plug(old).outcome == "committed"
    fleet.release("1.1.0", grant_to=("cam-1", "cam-2"))
    assert (device.plug(fleet.stick("cam-1")).outcome, device.serving) == ("committed", "1.1.0")
    assert device.plug(old).reason is Reason.BAD_SIGNATURE  # by a key that the newer root does not know
    assert second.plug(fleet.stick("cam-2", ".zip")).outcome == "committed"


def test_a_stick_leaves_alone_what_waits_on_a_line_that_is_not_on_it(fleet: Fleet) -> None:
    device = Device(fleet)
    fleet.release("1.0.0", grant_to=("cam-1",))
    stick = fleet.stick("cam-1")
    fleet.release("0.1.0", line="meter", grant_to=("cam-1",))
    device.host.faults["self_test", "0.1.0"] = Rejected(Reason.BUSY, "no room for a trial")
    device.host.faults["self_test", "1.0.0"] = Rejected(Reason.BUSY, "no room for a trial")
    device.look()
    waiting = Journal(Fs(device.state)).record.line("meter").candidate
    assert waiting is not None
    del device.host.faults["self_test", "1.0.0"]
    assert (device.plug(stick).outcome, device.serving) == ("committed", "1.0.0")
    assert Journal(Fs(device.state)).record.line("meter").candidate == waiting
    device.host.faults.clear()
    device.look()
    assert device.host.serving["meter"][0] == "0.1.0"


# -- dates set aside ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("F63")
def test_an_expired_stick_is_taken_when_an_operator_says_so_and_never_below_a_floor(fleet: Fleet) -> None:
    device = Device(fleet)
    fleet.release("1.0.0", grant_to=("cam-1",))
    oldest = fleet.stick("cam-1")
    fleet.release("1.1.0", grant_to=("cam-1",))
    stick = fleet.stick("cam-1")
    device.clock.advance(days=700)
    refused = device.plug(stick)
    assert (refused.reason, device.serving) == (Reason.TIMESTAMP_EXPIRED, "")
    assert (device.plug(stick, allow_expired=True).outcome, device.serving) == ("committed", "1.1.0")
    below = device.plug(oldest, allow_expired=True)
    assert (below.reason, device.serving) == (Reason.METADATA_ROLLBACK, "1.1.0")


@pytest.mark.fault("F63")
def test_an_expired_stick_that_is_older_than_what_came_over_the_network_is_refused_all_the_same(fleet: Fleet) -> None:
    device = Device(fleet)
    fleet.release("1.0.0", grant_to=("cam-1",))
    stick = fleet.stick("cam-1")
    fleet.release("1.1.0", grant_to=("cam-1",))
    assert device.look().outcome == "committed"
    device.clock.advance(days=300)
    assert device.plug(stick, allow_expired=True).reason is Reason.COUNTER_ROLLBACK


# -- long absences, with the clocks moved by hand ----------------------------------------------------------------------


def _everything_reissued(fleet: Fleet) -> None:
    for key in (
        "root-1",
        "root-2",
        "timestamp",
        "snapshot",
        "targets",
        "director",
        f"release-{LINE}",
        "root-3",
        "root-1",
    ):
        rotate(fleet.repository, key)


def test_a_device_that_was_off_for_400_days_comes_back_over_the_network_to_the_newest_release(fleet: Fleet) -> None:
    device = Device(fleet)
    fleet.release("1.0.0", grant_to=("cam-1",))
    assert device.look().outcome == "committed"
    for clock in (fleet.clock, device.clock):
        clock.advance(days=400)
    _everything_reissued(fleet)
    fleet.release("1.1.0", grant_to=("cam-1",))
    assert (device.look().outcome, device.serving) == ("committed", "1.1.0")
    assert device.main_floors()["root"] == fleet.repository.root_version() == 8


@pytest.mark.fault("F39")
@pytest.mark.parametrize("days", [-300, -20000])
def test_a_device_whose_clock_is_far_behind_judges_dates_by_the_newest_signed_one(fleet: Fleet, days: int) -> None:
    """With its clock it would believe any document of that year; with the floor it believes what is valid now."""
    device = Device(fleet)
    fleet.release("1.0.0", grant_to=("cam-1",))
    assert device.look().outcome == "committed"
    frozen = (fleet.repository.path / "metadata" / "timestamp.json").read_bytes()
    fleet.clock.advance(days=20)
    fleet.release("1.1.0", grant_to=("cam-1",))
    assert device.look().reason is None
    device.clock.advance(days=days)
    fresh = (fleet.repository.path / "metadata" / "timestamp.json").read_bytes()
    (fleet.repository.path / "metadata" / "timestamp.json").write_bytes(frozen)
    assert device.look().reason is Reason.METADATA_ROLLBACK
    (fleet.repository.path / "metadata" / "timestamp.json").write_bytes(fresh)
    fleet.release("1.2.0", grant_to=("cam-1",))
    assert (device.look().outcome, device.serving) == ("committed", "1.2.0")


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("days", [400, -300])
def test_a_device_without_a_network_comes_back_by_stick_alone(fleet: Fleet, days: int, suffix: str) -> None:
    """Off for 400 days with everything reissued meanwhile, or with a clock that is 300 days behind."""
    device = Device(fleet)
    fleet.release("1.0.0", grant_to=("cam-1",))
    assert device.plug(fleet.stick("cam-1")).outcome == "committed"
    device.clock.advance(days=days)
    if days > 0:
        fleet.clock.advance(days=days)
        _everything_reissued(fleet)
        for key in ("root-1", "timestamp", "root-2", "director"):
            rotate_stick_key(fleet.repository, key)
    fleet.release("1.1.0", grant_to=("cam-1",))
    assert (device.plug(fleet.stick("cam-1", suffix)).outcome, device.serving) == ("committed", "1.1.0")
