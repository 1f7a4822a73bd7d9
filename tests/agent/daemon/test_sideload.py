"""A person with a stick: who may set a date aside, what is kept of it, and that one stick is read at a time."""

from __future__ import annotations

import asyncio
import datetime
import grp
import http.client
import json
import os
import pwd
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.daemon import askers, audit, sideload
from agent.daemon.askers import Asker
from agent.daemon.audit import MAX_RECORDS, Audit
from agent.daemon.control import ControlServer, Reply, asker, json_reply
from agent.daemon.sideload import Sideloads
from agent.daemon.telemetry import Batch, Clocks, Telemetry
from agent.daemon.updates import LastWords
from agent.errors import ControlError, Reason
from ota.client.fsops import Disk, Fs
from ota.client.ports import Transport
from ota.errors import OtaError, StoreError
from ota.errors import Reason as OtaReason
from tests.ota.client.stickfleet import Device, Fleet

OPERATOR = Asker(0, "root", True)
TECHNICIAN = Asker(1001, "nadia", False)
NOW = datetime.datetime(2026, 12, 1, 2, 30, tzinfo=datetime.UTC)


class Bench:
    """A device with one release granted, and whatever its daemon has for sticks."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.fleet = Fleet(root)
        self.device = Device(self.fleet)
        self.fleet.release("1.0.0", grant_to=("cam-1",))
        self.telemetry = Telemetry(Clocks(lambda: 0, lambda: 0, "boot"))
        self.audit = Audit(Fs(disk or self.device.state))
        self.updater = self.device.updater()
        self.sideloads = Sideloads(
            self.updater,
            LastWords(["person"]),
            "cam-1",
            self.device.stick_root,
            self.audit,
            self.telemetry,
            lambda: NOW,
        )

    def install(self, path: Path, who: Asker = TECHNICIAN, **options: bool) -> dict[str, str]:
        return asyncio.run(self.sideloads.install(path, who, **options))

    def told(self) -> list[dict[str, Any]]:
        """The events of kind `sideload` that leave for the broker."""
        batches: list[Batch] = []
        self.telemetry.flush(lambda batch: batches.append(batch) or True)  # type: ignore[func-returns-value]
        events = [event for batch in batches for event in json.loads(batch.payload)["events"]]
        return [event for event in events if event["kind"] == "sideload"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_while_settings_are_on_trial_no_stick_is_begun(bench: Bench) -> None:
    stick, on_trial = bench.fleet.stick("cam-1", ".zip"), [True]
    bench.sideloads = Sideloads(
        bench.updater, LastWords(["person"]), "cam-1", bench.device.stick_root, bench.audit, bench.telemetry,
        lambda: NOW, lambda: on_trial[0],
    )  # fmt: skip
    with pytest.raises(OtaError) as caught:
        bench.install(stick)
    assert (caught.value.reason, bench.audit.records()) == (OtaReason.BUSY, [])
    on_trial.clear()
    on_trial.append(False)
    assert bench.install(stick) == {"person": "1.0.0 committed"}


def test_an_installation_whose_end_cannot_be_noted_is_told_as_it_was(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreError(OtaReason.NO_SPACE, "audit: full")

    monkeypatch.setattr(bench.audit, "end", full)
    assert bench.install(bench.fleet.stick("cam-1", ".zip")) == {"person": "1.0.0 committed"}
    assert [event["facts"]["outcome"] for event in bench.told()] == ["person 1.0.0 committed"]
    assert bench.audit.records()[-1].outcome == ""


def test_who_installed_what_and_how_it_ended_is_kept_and_told(bench: Bench) -> None:
    stick = bench.fleet.stick("cam-1", ".zip")
    assert bench.install(stick) == {"person": "1.0.0 committed"}
    assert bench.install(stick) == {"person": "1.0.0 is installed already"}
    first, second = bench.audit.records()
    assert first == audit.Deed(
        NOW.isoformat(timespec="seconds"),
        "sideload",
        1001,
        "nadia",
        {"path": str(stick), "allow_expired": False},
        "person 1.0.0 committed",
    )
    assert second.outcome == "person 1.0.0 is installed already"
    event = bench.told()[0]
    assert (event["facts"]["user"], event["facts"]["outcome"]) == ("nadia", "person 1.0.0 committed")


def test_a_refused_stick_is_kept_with_its_reason(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OtaError) as caught:
        bench.install(tmp_path / "empty")
    assert caught.value.reason is OtaReason.NOT_FOR_THIS_DEVICE
    assert bench.audit.records()[-1].outcome == "not_for_this_device"


@pytest.mark.fault("F63")
def test_a_stick_that_is_unmounted_after_the_first_look_is_no_success(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place of a stick is an empty folder then, and an empty folder assigns nothing."""
    stick = bench.fleet.stick("cam-1")
    genuine = sideload.check_names

    async def check_names(transport: Transport, device: str) -> None:
        await genuine(transport, device)
        shutil.rmtree(stick / "devices")

    monkeypatch.setattr(sideload, "check_names", check_names)
    with pytest.raises(OtaError) as refused:
        bench.install(stick)
    assert refused.value.reason is OtaReason.NOT_FOR_THIS_DEVICE
    assert "mounted" in refused.value.hint
    assert [record.outcome for record in bench.audit.records()] == ["not_for_this_device"]


def test_only_an_operator_sets_a_date_aside_and_that_is_recorded(bench: Bench) -> None:
    stick = bench.fleet.stick("cam-1")
    bench.device.clock.advance(days=300)
    with pytest.raises(ControlError) as refused:
        bench.install(stick, TECHNICIAN, allow_expired=True)
    assert refused.value.reason is Reason.NOT_PERMITTED
    assert "edge-operator" in refused.value.hint
    assert bench.audit.records() == []
    with pytest.raises(OtaError) as expired:
        bench.install(stick, OPERATOR)
    assert expired.value.reason is OtaReason.TIMESTAMP_EXPIRED
    assert bench.install(stick, OPERATOR, allow_expired=True) == {"person": "1.0.0 committed"}
    assert [(deed.user, deed.facts["allow_expired"]) for deed in bench.audit.records()] == [
        ("root", False),
        ("root", True),
    ]


@pytest.mark.fault("F64")
def test_two_sticks_at_once_are_read_one_after_the_other_by_whoever_asks_again(bench: Bench) -> None:
    stick = bench.fleet.stick("cam-1")
    gate = bench.device.host.hold["self_test", "1.0.0"] = asyncio.Event()

    async def scenario() -> None:
        first = asyncio.create_task(bench.sideloads.install(stick, TECHNICIAN))
        while not bench.device.host.calls:
            await asyncio.sleep(0.005)
        with pytest.raises(OtaError) as busy:
            await bench.sideloads.install(stick, OPERATOR)
        assert busy.value.reason is OtaReason.BUSY
        gate.set()
        assert await first == {"person": "1.0.0 committed"}
        assert await bench.sideloads.install(stick, OPERATOR) == {"person": "1.0.0 is installed already"}

    asyncio.run(scenario())


def test_an_installation_that_is_cut_off_leaves_a_record_that_says_so(bench: Bench) -> None:
    stick = bench.fleet.stick("cam-1")
    bench.device.host.hold["self_test", "1.0.0"] = asyncio.Event()

    async def scenario() -> None:
        task = asyncio.create_task(bench.sideloads.install(stick, TECHNICIAN))
        while not bench.device.host.calls:
            await asyncio.sleep(0.005)
        assert bench.audit.records()[-1].outcome == ""
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert bench.audit.records()[-1].outcome == "interrupted"


class FullDisk(Disk):
    def write(self, path: str, offset: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")


def test_what_cannot_be_recorded_is_not_done(tmp_path: Path) -> None:
    bench = Bench(tmp_path, FullDisk(tmp_path))
    with pytest.raises(StoreError) as caught:
        bench.install(bench.fleet.stick("cam-1"))
    assert caught.value.reason is OtaReason.NO_SPACE
    assert not bench.device.host.calls


def test_of_two_lines_the_one_that_was_installed_is_told_beside_the_one_that_was_refused(bench: Bench) -> None:
    old = bench.fleet.stick("cam-1")
    bench.fleet.release("1.1.0", grant_to=("cam-1",))
    bench.fleet.release("0.1.0", line="meter", grant_to=("cam-1",))
    both = bench.fleet.stick("cam-1")
    release = bench.fleet.repository.release(bench.fleet.repository.find("person", "1.1.0"))
    for payload in (release.components[0].full, *(delta.payload for delta in release.components[0].deltas)):
        (both / "payloads" / payload.sha256).unlink()
    with pytest.raises(OtaError) as caught:
        bench.install(both)
    assert caught.value.reason is OtaReason.NOT_FOUND
    assert "meter 0.1.0 committed" in caught.value.message
    assert old.exists()


# -- the record --------------------------------------------------------------------------------------------------------


def test_only_the_newest_records_are_kept_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    kept = Audit(Fs(tmp_path))
    for number in range(MAX_RECORDS + 10):
        kept.end(kept.begin("2026-12-01T00:00:00+00:00", "sideload", TECHNICIAN, {"path": f"/{number}"}), "done")
    assert [deed.facts["path"] for deed in kept.records()] == [f"/{n}" for n in range(10, MAX_RECORDS + 10)]
    file = tmp_path / "audit/records.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([*lines[:3], b"{broken", b'{"at": 1}', b"\xff\xfe", *lines[3:]]))
    assert len(kept.records()) == MAX_RECORDS


@pytest.mark.fault("F66")
def test_a_hostile_path_makes_one_harmless_line(tmp_path: Path) -> None:
    kept = Audit(Fs(tmp_path))
    path = "/media/\x1b[2J\n{}\r\u202e\udcff" + "x" * 10_000
    kept.begin("2026-12-01T00:00:00+00:00", "sideload", TECHNICIAN, {"path": path})
    data = (tmp_path / "audit/records.jsonl").read_bytes()
    assert data.count(b"\n") == 1
    assert data.isascii()
    assert all(byte >= 32 for byte in data[:-1])
    assert len(data) < 2000
    assert len(kept.records()) == 1


# -- who asks ----------------------------------------------------------------------------------------------------------


def test_root_is_an_operator_and_a_stranger_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert askers.of_user(0).operator
    stranger = askers.of_user(3_999_999)
    assert (stranger.name, stranger.operator) == ("user 3999999", False)
    with pytest.raises(ControlError):
        stranger.require_operator("do this")


def test_members_of_the_group_are_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    account = pwd.struct_passwd(("nadia", "x", 1001, 1001, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: account)
    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group((name, "x", 77, [])))
    for groups, operator in (([1001, 77], True), ([1001], False)):
        monkeypatch.setattr(os, "getgrouplist", lambda name, gid, groups=groups: groups)
        assert askers.of_user(1001) == Asker(1001, "nadia", operator)


def test_the_kernel_says_who_is_at_the_other_end() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert askers.of_peer(ours).uid == os.getuid()


def test_a_route_knows_who_asks(tmp_path: Path) -> None:
    async def who(_: Mapping[str, Any]) -> Reply:
        return json_reply({"uid": asker().uid})

    path = tmp_path / "control.sock"

    def ask() -> Any:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        connection.request("GET", "/who")
        return json.loads(connection.getresponse().read())

    async def scenario() -> Any:
        server = ControlServer(path, {"GET /who": who})
        await server.start()
        try:
            return await asyncio.to_thread(ask)
        finally:
            await server.stop()

    assert asyncio.run(scenario()) == {"uid": os.getuid()}
