"""Settings under probation, on a real daemon with a real broker: what does not work is taken back, over kills too."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ota.publisher import configure
from tests.demo.observer import Observer
from tests.fakes.broker import Broker
from tests.integration.console import Device, did, make_fleet, refused, run, until, watching

UPDATE = "probation_scale = 0.001\nrun_timeout_s = 3"
# settings say themselves how long they are on trial
BRIEF = UPDATE + "\nsettings_probation_s = 2"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, repository: Path, clip: Path) -> Iterator[Device]:
    """It runs parts 1.0.0."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet, made = make_fleet(tmp_path_factory.mktemp("settings"), repository, clip, update=UPDATE)
    try:
        with watching(fleet) as seen:
            made.start()
            assert made.grant(seen, "1.0.0")["outcome"] == "committed"
        yield made
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def observer(device: Device) -> Iterator[Observer]:
    with watching(device.fleet) as seen:
        yield seen


def document(device: Device, *, clip: Path | None = None, extra: str = "", update: str = UPDATE) -> str:
    """Settings that differ from agent.toml as asked."""
    text = device.config.read_text().replace(f"[update]\n{UPDATE}", f"[update]\n{update}")
    if clip is not None:
        text = text.replace(str(device.clip), str(clip))
    return text + extra


def written(device: Device, name: str, text: str) -> Path:
    path = device.fleet.folder / name
    path.write_text(text)
    return path


def shown(device: Device) -> Any:
    return until("an answer", lambda: device.ask("/config"))


def apply(device: Device, path: Path) -> Any:
    return run("edge-agent", "config", "apply", path, "--config", device.config, folder=device.fleet.folder)


def told(observer: Observer, seen: int) -> dict[str, Any]:
    """The next event about settings."""

    def found() -> Any:
        return next((e for e in observer.events[seen:] if e["kind"] == "settings"), None)

    event: dict[str, Any] = observer.wait("the end of a trial of settings", found, 90)
    return event


def serves(device: Device) -> None:
    results = until("a line", lambda: device.serving() and device.serving()["results"] + 1)
    until("more results", lambda: (line := device.serving()) and line["results"] != results and line["delegate"])
    assert device.serving()["version"] == "1.0.0"


def test_a_good_change_is_kept_and_serves(device: Device, observer: Observer) -> None:
    seen = len(observer.events)
    path = written(device, "good.toml", document(device, update=UPDATE + "\npoll_s = 1800"))
    done = apply(device, path)
    assert done.code == 0, done.err
    assert "committed" in done.out
    assert told(observer, seen)["outcome"] == "committed"
    force = shown(device)
    assert force["in_force"].startswith("settings ")
    assert force["trial"] == ""
    serves(device)
    assert "in_force: settings" in did(
        "edge-agent", "config", "show", "--config", device.config, folder=device.fleet.folder
    )
    # over a restart too
    device.stop()
    device.start("1.0.0")
    assert shown(device)["in_force"] == force["in_force"]


def test_a_change_that_does_not_bring_the_frames_is_taken_back(device: Device, observer: Observer) -> None:
    before, seen = shown(device)["in_force"], len(observer.events)
    text = document(device, clip=Path("/nowhere.avi"), update=BRIEF)
    done = apply(device, written(device, "camera.toml", text))
    assert done.code == 77
    assert "[settings_failed]" in done.err
    assert "source_missing" in done.err
    event = told(observer, seen)
    assert (event["outcome"], event["reason"]) == ("rolled_back", "settings_failed")
    assert "source_missing" in event["message"]
    assert shown(device)["in_force"] == before
    serves(device)


@pytest.mark.parametrize(
    ("text", "word"),
    [("pol_s = 1\n", "pol_s"), ('state_dir = "/elsewhere"\n', "state_dir"), ('profile = "toaster"\n', "toaster")],
)
def test_settings_that_cannot_be_used_change_nothing(device: Device, text: str, word: str) -> None:
    pid, before = device.ask()["process"]["pid"], shown(device)
    path = written(device, "bad.toml", text + device.config.read_text().replace('state_dir = "state"\n', ""))
    told = refused("edge-agent", "config", "apply", path, "--config", device.config, folder=device.fleet.folder)
    assert told.reason in ("bad_config", "bad_profile")
    assert word in told.message
    assert shown(device) == before
    assert device.ask()["process"]["pid"] == pid


def test_settings_of_the_fleet_that_do_not_bring_the_link_are_taken_back_and_not_tried_again(
    device: Device, observer: Observer
) -> None:
    before, seen = shown(device)["in_force"], len(observer.events)
    bad = document(device, extra="\n[broker]\nport = 1\n", update=BRIEF)
    configure.configure(device.repository(), device.fleet.device, bad.encode())
    device.look()
    event = told(observer, seen)
    assert (event["outcome"], event["reason"]) == ("rolled_back", "settings_failed")
    assert "broker_unreachable" in event["message"]
    force = until("the end", lambda: (s := device.ask("/config")) and s["state"] == "idle" and s)
    assert force["in_force"] == before
    assert event["sha256"] in force["quarantine"]
    seen, uptime = len(observer.events), device.ask()["process"]["uptime_s"]
    device.look()
    until("a second", lambda: device.ask()["process"]["uptime_s"] > uptime + 1)
    assert not [e for e in observer.events[seen:] if e["kind"] == "settings"]

    unknown = document(device, extra="\n[toaster]\nheat = 1\n")
    configure.configure(device.repository(), device.fleet.device, unknown.encode())
    device.look()
    event = told(observer, seen)
    assert (event["outcome"], event["reason"]) == ("rejected", "settings_refused")
    assert "toaster" in event["message"]

    seen = len(observer.events)
    good = document(device, update=UPDATE + "\npoll_s = 900")
    configure.configure(device.repository(), device.fleet.device, good.encode())
    device.look()
    assert told(observer, seen)["outcome"] == "committed"
    serves(device)


def test_a_device_killed_in_every_trial_goes_back_after_the_third(device: Device, observer: Observer) -> None:
    before, seen = shown(device)["in_force"], len(observer.events)
    path = written(device, "deadly.toml", document(device, extra="\n[broker]\nport = 1\n"))
    device.stop()
    told_beside = did("edge-agent", "config", "apply", path, "--config", device.config, folder=device.fleet.folder)
    assert "next start" in told_beside
    for attempt in (1, 2, 3):
        device.start()
        assert shown(device)["attempts"] == attempt
        assert device.fleet.agent is not None
        device.fleet.agent.send_signal(signal.SIGKILL)
        device.fleet.agent.wait()
    device.start("1.0.0")
    assert shown(device)["in_force"] == before
    event = told(observer, seen)
    assert (event["outcome"], event["reason"]) == ("rolled_back", "interrupted")


def test_a_hand_on_the_file_wins_over_settings(device: Device, observer: Observer) -> None:
    assert shown(device)["in_force"].startswith("settings ")
    seen = len(observer.events)
    device.stop()
    device.config.write_text(device.config.read_text() + "# changed by hand\n")
    device.start("1.0.0")
    assert shown(device)["in_force"] == str(device.config)
    assert "changed" in told(observer, seen)["message"]
    # what the fleet wanted was dealt with: it does not come back by itself
    uptime = device.ask()["process"]["uptime_s"]
    device.look()
    until("a second", lambda: device.ask()["process"]["uptime_s"] > uptime + 1)
    assert shown(device)["in_force"] == str(device.config)
