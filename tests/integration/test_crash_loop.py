"""A committed release whose worker keeps dying, on a real daemon: rolled back, quarantined, told once; and the verbs of
`edge-agent update` that a person has in such moments."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.demo.fleet import PARTS, build_bad_release
from tests.demo.observer import Observer
from tests.fakes.broker import Broker
from tests.integration.console import Device, did, ended, make_fleet, refused, until, watching

UPDATE = "probation_scale = 0.001\nrun_timeout_s = 3\ncrash_limit = 3\ncrash_window_s = 60"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, repository: Path, clip: Path) -> Iterator[Device]:
    """Its daemon runs and nothing is granted."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet, made = make_fleet(tmp_path_factory.mktemp("crashes"), repository, clip, update=UPDATE)
    try:
        made.start()
        yield made
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def observer(device: Device) -> Iterator[Observer]:
    with watching(device.fleet) as seen:
        assert device.grant(seen, "1.0.0")["outcome"] == "committed"
        yield seen


def crash(device: Device, times: int) -> None:
    """Let the serving worker die, and come back, so often."""
    for _ in range(times):
        line = until("a serving worker", lambda: (now := device.serving())["worker_pid"] and now["delegate"] and now)
        os.kill(line["worker_pid"], signal.SIGSEGV)
        until("another worker", lambda pid=line["worker_pid"]: device.serving()["worker_pid"] != pid)


@pytest.mark.fault("F74")
def test_a_committed_release_that_keeps_crashing_is_rolled_back_and_not_fetched_again(
    device: Device, observer: Observer
) -> None:
    build_bad_release(device.fleet.folder / "repo", "1.2.0", PARTS / "1.0.0" / "int8.onnx", "onnx:cpu")  # a good one
    assert device.install(observer, "1.2.0")["outcome"] == "committed"
    seen = len(observer.events)
    crash(device, 3)

    def back() -> Any:
        return next((e for e in observer.events[seen:] if e.get("outcome") == "rolled_back"), None)

    event = observer.wait("the roll-back", back, 90)
    assert (event["line"], event["version"], event["reason"]) == ("parts", "1.0.0", "worker_crashed")
    assert "1.2.0 crashed 3 times within 60 s" in event["message"]
    until("serving 1.0.0", lambda: device.serving()["version"] == "1.0.0")
    results = device.serving()["results"]
    until("results of 1.0.0", lambda: device.serving()["results"] > results + 5)
    # the daemon looked at once for something newer, and refuses what it went back from
    assert ended(observer, "1.2.0", seen)["reason"] == "quarantined"
    assert [e["outcome"] for e in observer.events[seen:] if e.get("outcome") == "rolled_back"] == ["rolled_back"]


def test_with_nothing_to_go_back_to_the_line_goes_on_and_a_person_is_told_once(
    device: Device, observer: Observer
) -> None:
    seen = len(observer.events)
    crash(device, 4)

    def loops() -> list[dict[str, Any]]:
        return [e for e in observer.events[seen:] if e["kind"] == "crash_loop"]

    observer.wait("an alarm", loops, 90)
    results = until("a line", lambda: device.serving()["results"])
    until("results of 1.0.0", lambda: device.serving()["results"] > results + 5)
    (alarm,) = loops()
    assert (alarm["line"], alarm["version"], alarm["reason"]) == ("parts", "1.0.0", "worker_crashed")
    assert "publish a newer release" in alarm["hint"]


def test_a_person_lifts_a_quarantine_and_stops_an_update(device: Device, observer: Observer) -> None:
    folder, asked = device.fleet.folder, ("edge-agent", "update", "--config", device.config)
    lacking = refused(*asked, "cancel", folder=folder)
    assert (lacking.reason, lacking.done.code) == ("bad_usage", 64)
    assert refused(*asked, "cancel", "nope", folder=folder).reason == "unknown_line"
    assert "no update was running" in did(*asked, "cancel", "parts", folder=folder)

    device.stop()
    device.configure("probation_s = 3600\nrun_timeout_s = 3")
    device.start("1.0.0")
    seen = len(observer.events)
    assert "quarantine lifted: 1" in did(*asked, "retry", "parts", folder=folder)
    until("the probation of 1.2.0", lambda: device.serving()["update"]["state"] == "probation")
    assert [(lock["name"], lock["owner"]) for lock in device.ask()["locks"]] == [("line parts", "update")]
    assert "line parts  update for" in did("edge-agent", "status", "--config", device.config, folder=folder)
    assert "cancelled" in did(*asked, "cancel", "parts", folder=folder)

    def stopped() -> Any:
        return next((e for e in observer.events[seen:] if e.get("reason") == "operator"), None)

    assert observer.wait("the end of the update", stopped, 20)["outcome"] == "failed"
    until("serving 1.0.0", lambda: device.serving()["version"] == "1.0.0")
    assert device.ask()["locks"] == []
