"""A stick while the same line is being updated over the network: the release counter decides which one stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ota.publisher.publish import publish
from tests.demo.fleet import PARTS, build_bad_release
from tests.fakes.broker import Broker
from tests.integration.console import Device, did, make_fleet, refused, until, watching

# long enough for a technician to come along: 9 seconds and 13 results
STICKS = {"1.2.0": "first.zip", "1.3.0": "second", "1.4.0": "third.zip"}
SLOW = "probation_scale = 0.015\nrun_timeout_s = 3"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, repository: Path, clip: Path) -> Iterator[Device]:
    """Serves 1.0.0; 1.1.0 is published, and the same model as 1.2.0, 1.3.0 and 1.4.0; broker and server are up."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet, made = make_fleet(tmp_path_factory.mktemp("busy"), repository, clip)
    try:
        for version in ("1.2.0", "1.3.0", "1.4.0"):
            # what it makes is bad if its model is; this one fits the golden vectors that it is signed with
            build_bad_release(fleet.folder / "repo", version, PARTS / "1.1.0" / "int8.onnx", "onnx:cpu", like="1.1.0")
        publish(made.repository())
        fleet.grant("parts", "1.0.0")
        made.start("1.0.0")
        until("1.0.0 committed", lambda: made.serving()["committed"] == "1.0.0", 60)
        made.stop()
        # while the device is off: what is granted for a stick would come over the network as well
        for version, name in STICKS.items():
            did("edge-ota", "grant", "repo", fleet.device, "parts", version, folder=fleet.folder)
            did("edge-ota", "bundle", "repo", fleet.device, name, folder=fleet.folder)
        fleet.grant("parts", "1.0.0")
        made.configure(SLOW)
        made.start("1.0.0")
        yield made
    finally:
        fleet.stop()


def in_probation(device: Device, version: str) -> None:
    """The network's update to that version serves on probation."""
    device.assign(version)
    until(f"{version} on probation", lambda: device.serving()["update"]["state"] == "probation", 60)
    assert device.serving()["version"] == version


@pytest.mark.fault("F65")
def test_a_newer_release_on_a_stick_replaces_the_one_that_is_just_coming(device: Device) -> None:
    stick = device.fleet.folder / STICKS["1.2.0"]
    with watching(device.fleet) as observer:
        in_probation(device, "1.1.0")
        told = did("edge-agent", "sideload", stick, "--config", "agent.toml", folder=device.fleet.folder)
        assert told == "parts: 1.2.0 committed\n"
        line = device.serving()
        assert (line["version"], line["committed"]) == ("1.2.0", "1.2.0")
        ends = [e for e in observer.events if e["kind"] == "update" and e.get("outcome")]
        assert [(e["version"], e["reason"]) for e in ends if e["outcome"] == "failed"] == [("1.1.0", "superseded")]
    # and what the network still wants is older now
    device.look()
    until("the network's wish is refused", lambda: device.serving()["update"]["reason"] == "counter_rollback", 60)
    assert device.serving()["committed"] == "1.2.0"


@pytest.mark.fault("F65")
def test_an_older_release_on_a_stick_is_discarded_and_the_same_one_is_told_to_wait(
    device: Device,
) -> None:
    older, same = device.fleet.folder / STICKS["1.3.0"], device.fleet.folder / STICKS["1.4.0"]
    in_probation(device, "1.4.0")
    told = refused("edge-agent", "sideload", older, "--config", "agent.toml", folder=device.fleet.folder)
    assert told.reason == "superseded"
    told = refused("edge-agent", "sideload", same, "--config", "agent.toml", folder=device.fleet.folder)
    assert told.reason == "busy"
    until("1.4.0 committed", lambda: device.serving()["committed"] == "1.4.0", 60)
    again = did("edge-agent", "sideload", same, "--config", "agent.toml", folder=device.fleet.folder)
    assert again == "parts: 1.4.0 is installed already\n"
