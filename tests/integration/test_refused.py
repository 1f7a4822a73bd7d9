"""Releases that are signed and sealed as they should be and must not run all the same: refused, rolled back, undone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ota.publisher.publish import publish
from tests.demo.fleet import PARTS, VECTORS, build_bad_release, damaged_copy
from tests.demo.observer import Observer
from tests.fakes.broker import Broker
from tests.integration.console import QUICK, Device, did, ended, make_fleet, refused, until, watching

NEVER_ENDING = "probation_s = 3600\nrun_timeout_s = 3"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, repository: Path, clip: Path) -> Iterator[Device]:
    """Its daemon runs and nothing is granted."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet, made = make_fleet(tmp_path_factory.mktemp("refused"), repository, clip)
    try:
        made.start()
        yield made
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def observer(device: Device) -> Iterator[Observer]:
    """Hears what the device says, from 1.0.0 being committed on."""
    with watching(device.fleet) as seen:
        assert device.grant(seen, "1.0.0")["outcome"] == "committed"
        yield seen


def restart(device: Device, update: str) -> None:
    """Start the daemon anew with these limits; it serves what is committed."""
    device.stop()
    device.configure(update)
    device.start("1.0.0")


def fetches_it_no_more(device: Device, observer: Observer, version: str, why: str) -> None:
    """A quarantined release is refused at the next look, before anything of it is fetched or run."""
    seen = len(observer.events)
    # outcomes overtake other events: of the trial before, something may still be on its way
    before_ms = max(event["wall_ms"] for event in observer.events)
    did("edge-agent", "update", "--config", device.config, folder=device.fleet.folder)
    again = ended(observer, version, seen)
    assert (again["outcome"], again["reason"]) == ("rejected", "quarantined")
    assert why in again["message"]
    assert again["traffic"]["fetched_bytes"] == 0
    since = [event for event in observer.events[seen:] if event["wall_ms"] > before_ms]
    assert not [e for e in since if e["kind"] == "verdicts" or e.get("state") in ("fetching", "testing")]


def damaged(folder: Path) -> Path:
    return damaged_copy(PARTS / "1.1.0" / "int8.onnx", folder / "damaged.onnx")


def crashing(_: Path) -> Path:
    return VECTORS / "crash.tflite"


def hanging(_: Path) -> Path:
    return VECTORS / "hang.onnx"


@pytest.mark.parametrize(
    ("version", "make", "delegate", "reason"),
    [
        pytest.param("1.2.0", damaged, "onnx:cpu", "golden_mismatch", marks=pytest.mark.fault("F72")),
        pytest.param("1.3.0", crashing, "litert:xnnpack", "worker_crashed", marks=pytest.mark.fault("F67")),
        pytest.param("1.4.0", hanging, "onnx:cpu", "worker_hung", marks=pytest.mark.fault("F68")),
    ],
)
def test_a_release_that_fails_its_trial_is_quarantined_and_disturbs_nothing(
    device: Device,
    observer: Observer,
    tmp_path: Path,
    version: str,
    make: Callable[[Path], Path],
    delegate: str,
    reason: str,
) -> None:
    build_bad_release(device.fleet.folder / "repo", version, make(tmp_path), delegate)
    before, first = device.serving(), observer.last_seq()
    end = device.install(observer, version)
    assert (end["outcome"], end["reason"]) == ("rejected", reason)

    last = observer.last_seq()
    after = device.serving()
    kept = ("version", "committed", "component", "delegate", "worker_pid", "restarts")
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert (after["version"], after["restarts"]) == ("1.0.0", 0)
    assert last > first
    observer.answered_through(last, 20)
    # a busy machine may miss a frame; no frame was in the hands of a worker that went away
    assert {why for _, why in observer.drops_between(first, last + 1)} <= {"backlog"}
    told = after["update"]
    assert (told["outcome"], told["reason"], told["last_version"]) == ("rejected", reason, version)
    assert told["hint"]

    fetches_it_no_more(device, observer, version, reason)
    assert device.serving()["worker_pid"] == before["worker_pid"]


def test_a_release_that_crashes_twice_in_probation_is_rolled_back(device: Device, observer: Observer) -> None:
    restart(device, NEVER_ENDING)
    publish(device.repository(), [("parts", "1.1.0")])
    seen = len(observer.events)
    device.assign("1.1.0")

    def on_probation() -> Any:
        line = device.serving()
        return line if line["version"] == "1.1.0" and line["update"]["state"] == "probation" else None

    first = until("the probation of 1.1.0", on_probation)
    assert first["committed"] == "1.0.0"
    os.kill(first["worker_pid"], signal.SIGKILL)
    second = until("its restart", lambda: (line := device.serving())["restarts"] == 1 and line)
    assert second["version"] == "1.1.0"
    os.kill(second["worker_pid"], signal.SIGSEGV)

    end = ended(observer, "1.1.0", seen)
    assert (end["outcome"], end["reason"]) == ("rolled_back", "worker_crashed")
    results = device.serving()["results"]
    until("results of 1.0.0", lambda: device.serving()["results"] > results + 5)
    after = device.serving()
    assert (after["version"], after["committed"]) == ("1.0.0", "1.0.0")
    assert after["worker_pid"] not in (first["worker_pid"], second["worker_pid"])
    fetches_it_no_more(device, observer, "1.1.0", "worker_crashed")


def test_an_operator_rolls_back_once_and_no_further(device: Device, observer: Observer) -> None:
    restart(device, QUICK)
    fleet = device.fleet
    asked = ("edge-agent", "rollback", "parts", "--config", device.config)
    early = refused(*asked, folder=fleet.folder)
    assert (early.reason, early.message) == ("no_previous", "parts has no previous release")

    build_bad_release(fleet.folder / "repo", "2.0.0", PARTS / "1.0.0" / "int8.onnx", "onnx:cpu")  # a good one
    assert device.install(observer, "2.0.0")["outcome"] == "committed"
    answer = did(*asked, folder=fleet.folder)
    assert "version: 1.0.0" in answer
    results = device.serving()["results"]
    until("results of 1.0.0", lambda: device.serving()["results"] > results + 5)
    assert (device.serving()["version"], device.serving()["committed"]) == ("1.0.0", "1.0.0")

    again = refused(*asked, folder=fleet.folder)
    assert again.reason == "no_previous"
    assert "edge-agent status" in again.hint
    assert device.serving()["version"] == "1.0.0"
    fetches_it_no_more(device, observer, "2.0.0", "operator")
