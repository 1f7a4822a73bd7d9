"""A technician with a stick: installed beside a living daemon and a dead one, without any network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ota.publisher.publish import publish
from tests.demo.fleet import PARTS, build_bad_release
from tests.fakes.broker import Broker
from tests.integration.console import Device, Refusal, did, flip_one_bit, make_fleet, refused, unchanged, until

OTHER = "belt-02"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, repository: Path, clip: Path) -> Iterator[Device]:
    """Enrolled, never connected; 1.0.0 and 1.1.0 are published, and another device is known."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet, made = make_fleet(tmp_path_factory.mktemp("sideload"), repository, clip)
    try:
        publish(made.repository(), [("parts", "1.1.0")])
        made.enroll_another(OTHER)
        assert fleet.broker is not None
        fleet.broker.stop()
        yield made
    finally:
        fleet.stop()


def stick(device: Device, version: str, to: Path, name: str = "") -> Path:
    """`edge-ota bundle` for the device, or the one called `name`."""
    folder, name = device.fleet.folder, name or device.fleet.device
    did("edge-ota", "grant", "repo", name, "parts", version, folder=folder)
    did("edge-ota", "bundle", "repo", name, to, folder=folder)
    return to


def damaged(device: Device, version: str, to: Path, damage: Callable[[Path], None]) -> Path:
    """A stick with a release of that version, of which nothing will ever run, and whose payloads were damaged."""
    build_bad_release(device.fleet.folder / "repo", version, PARTS / "1.1.0" / "int8.onnx", "onnx:cpu")
    publish(device.repository(), [("parts", version)])
    made = stick(device, version, to)
    for name in device.payloads(version):
        damage(made / "payloads" / name)
    return made


@pytest.fixture(scope="module")
def tampered(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Refusal]]:
    """How a twin of the device, whose daemon is dead, refused a stick with a bit flipped in its payloads. It reads the
    bad block again and again with back-off, which takes about ten seconds; other tests run meanwhile."""
    folder = tmp_path_factory.mktemp("twin")
    made = damaged(device, "1.2.0", folder / "stick", flip_one_bit)
    twin = device.twin(folder)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(refused, "edge-agent", "sideload", made, "--config", "agent.toml", folder=folder)
    twin.fleet.stop()


@pytest.mark.usefixtures("tampered")  # for its time, not for its effect
def test_a_stick_is_installed_while_the_daemon_is_dead_and_served_when_it_lives(device: Device, tmp_path: Path) -> None:
    folder = device.fleet.folder
    made = stick(device, "1.0.0", tmp_path / "stick")
    asked = ("edge-agent", "sideload", made, "--config", "agent.toml")
    with unchanged(made):
        assert did(*asked, folder=folder) == "parts: 1.0.0 committed\n"
        assert did(*asked, folder=folder) == "parts: 1.0.0 is installed already\n"
    device.start("1.0.0")
    line = device.serving()
    assert (line["committed"], line["restarts"]) == ("1.0.0", 0)
    assert device.condition("LinkConnected")["reason"] == "broker_unreachable"


def test_a_stick_is_installed_beside_a_daemon_without_a_broker(device: Device, tmp_path: Path) -> None:
    folder = device.fleet.folder
    living(device)
    pid = device.ask()["process"]["pid"]
    made = stick(device, "1.1.0", tmp_path / "stick")
    asked = ("edge-agent", "sideload", made, "--config", "agent.toml")
    assert did(*asked, folder=folder) == "parts: 1.1.0 committed\n"
    line = device.serving()
    assert (line["version"], line["committed"], line["restarts"]) == ("1.1.0", "1.1.0", 0)
    results = line["results"]
    until("more results", lambda: device.serving()["results"] > results)
    assert did(*asked, folder=folder) == "parts: 1.1.0 is installed already\n"
    assert "parts  1.1.0 on" in did("edge-agent", "status", "--config", "agent.toml", folder=folder)
    after = device.ask()
    assert after["process"]["pid"] == pid
    assert after["lines"]["parts"]["worker_pid"] == line["worker_pid"]


def living(device: Device) -> None:
    """The daemon runs and serves something, whichever tests came before."""
    if device.ask() is None:
        device.start()


@pytest.mark.fault("F47")
def test_a_stick_for_another_device_is_refused(device: Device, tmp_path: Path) -> None:
    twin = device.twin(tmp_path)
    made = stick(device, "1.0.0", tmp_path / "stick", OTHER)
    asked = ("edge-agent", "sideload", made, "--config", "agent.toml")
    with unchanged(made, tmp_path / "state" / "state", tmp_path / "state" / "store"):
        told = refused(*asked, folder=tmp_path)
    assert told.reason == "not_for_this_device"
    assert told.hint == f"edge-ota bundle REPO {device.fleet.device} OUT writes a stick for it"
    # put where this device looks, it still says whose it is
    (made / "devices" / OTHER).rename(made / "devices" / device.fleet.device)
    told = refused(*asked, folder=tmp_path)
    assert told.reason == "not_for_this_device"
    assert OTHER in told.message
    twin.fleet.stop()


def test_something_else_than_a_stick_is_refused(device: Device, tmp_path: Path) -> None:
    living(device)
    folder = device.fleet.folder
    (tmp_path / "empty").mkdir()
    for place, reason in (("empty", "not_for_this_device"), ("absent", "bad_usage")):
        told = refused("edge-agent", "sideload", tmp_path / place, "--config", "agent.toml", folder=folder)
        assert told.reason == reason
        assert "edge-ota bundle" in told.hint


@pytest.mark.fault("F17")
def test_a_tampered_stick_is_refused(tampered: Future[Refusal]) -> None:
    told = tampered.result(60)
    assert told.reason == "transfer_corrupt"


def test_a_stick_that_lacks_a_file_leaves_a_living_daemon_as_it_was(device: Device, tmp_path: Path) -> None:
    living(device)
    before = device.ask()
    made = damaged(device, "1.3.0", tmp_path / "stick", Path.unlink)
    told = refused("edge-agent", "sideload", made, "--config", "agent.toml", folder=device.fleet.folder)
    assert told.reason == "not_found"
    after = device.ask()
    assert after["process"]["pid"] == before["process"]["pid"]
    old, new = before["lines"]["parts"], after["lines"]["parts"]
    assert [new[key] for key in ("worker_pid", "committed")] == [old[key] for key in ("worker_pid", "committed")]
    update = new["update"]
    assert (update["outcome"], update["reason"], update["last_version"]) == ("failed", "not_found", "1.3.0")
    # a bad stick is the technician's trouble; the device's own source has none
    assert device.condition("MetadataFresh") is None
