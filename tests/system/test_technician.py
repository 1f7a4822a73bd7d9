"""People beside a device: a technician without root, with a living daemon and a dead one; an operator; a stranger. And
the unit that raises the clock, as far as a container without a clock of its own can tell (tests/vm does the rest)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.device import Device
from tests.system.product import BIN, CONFIG, SLOW_S, STATE, until_results_flow

pytestmark = pytest.mark.system

UNITS = ("edge-agent-clock.service", "edge-agent-sideload.service", "edge-agent-sideload.socket")
PEOPLE = {"nadia": "edge-technician", "omar": "edge-technician,edge-operator", "eve": "users"}


@pytest.fixture
def people(device: Device) -> Iterator[None]:
    """A technician, an operator and a stranger with accounts on the device."""
    for name, groups in PEOPLE.items():
        device.run("useradd", "--no-create-home", "--groups", groups, name)
    yield
    for name in PEOPLE:
        device.run("userdel", name)


@pytest.fixture
def enrolled(published: None, device: Device) -> Device:
    """Enrolled, nothing installed, no daemon; the socket for its absence listens."""
    device.run("sh", "-c", f"cp -a /root/enrolled/. {STATE}/")
    device.write("/etc/edge-agent/agent.toml", CONFIG, 0o640)
    device.run("chown", "root:edge-agent", "/etc/edge-agent/agent.toml")
    device.run("systemctl", "start", "edge-agent-sideload.socket")
    return device


def sideload(device: Device, who: str, *words: str) -> subprocess.CompletedProcess[str]:
    return device.ask("runuser", "-u", who, "--", f"{BIN}/edge-agent", "sideload", *words, timeout_s=SLOW_S)


def records(device: Device) -> list[dict[str, Any]]:
    return [json.loads(line) for line in device.run("cat", f"{STATE}/audit/records.jsonl").splitlines()]


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_load_without_a_complaint(device: Device, unit: str) -> None:
    checked = device.ask("systemd-analyze", "verify", "--man=no", f"/usr/lib/systemd/system/{unit}")
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(("unit", "threshold"), [("edge-agent-clock.service", 17), ("edge-agent-sideload.service", 25)])
def test_the_units_are_exposed_to_little(device: Device, unit: str, threshold: int) -> None:
    """The threshold is ten times the score that systemd gives at most."""
    asked = ("systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={threshold}")
    scored = device.ask(*asked, f"/usr/lib/systemd/system/{unit}")
    assert scored.returncode == 0, scored.stdout.splitlines()[-1]


def test_the_clock_unit_may_set_the_clock_and_nothing_else(device: Device) -> None:
    shown = {name: device.property("edge-agent-clock.service", name) for name in ("AmbientCapabilities", "User")}
    assert shown == {"AmbientCapabilities": "cap_sys_time", "User": "edge-agent"}
    assert device.property("edge-agent-clock.service", "CapabilityBoundingSet") == "cap_sys_time"
    assert "edge-agent-clock.service" in device.property("edge-agent.service", "Wants")
    assert "edge-agent.service" in device.property("edge-agent-clock.service", "Before")
    assert device.property("edge-agent.service", "CapabilityBoundingSet") == ""


def test_a_clock_unit_that_fails_does_not_keep_the_daemon_from_serving(serving: Device) -> None:
    """A container may not set the clock at all: only what the unit is told to run can fail here."""
    command = "[Service]\nExecStart=\nExecStart=/bin/false\n"
    serving.write("/etc/systemd/system/edge-agent-clock.service.d/fails.conf", command)
    serving.run("systemctl", "daemon-reload")
    serving.run("systemctl", "stop", "edge-agent.service")
    serving.run("systemctl", "start", "edge-agent.service")
    assert serving.property("edge-agent-clock.service", "Result") == "exit-code"
    assert until_results_flow(serving)["version"] == "1.0.0"


def test_the_clock_is_looked_at_before_every_start_of_the_daemon(serving: Device) -> None:
    before = serving.property("edge-agent-clock.service", "InvocationID")
    serving.run("systemctl", "restart", "edge-agent.service")
    assert serving.property("edge-agent-clock.service", "InvocationID") != before
    assert "verdict: past_the_floor" in serving.journal("edge-agent-clock.service")
    bounding = int(
        dict(line.split(":\t", 1) for line in serving.run("cat", "/proc/1/status").splitlines() if ":\t" in line)[
            "CapBnd"
        ],
        16,
    )
    assert not bounding & 1 << 25, "this container could set the clock of the machine that runs the tests"


def test_a_technician_installs_beside_a_living_daemon_and_a_stranger_does_not(serving: Device, people: None) -> None:
    refused = sideload(serving, "eve", "/srv/1.1.0")
    assert refused.returncode == 69
    assert "permission denied" in refused.stderr
    done = sideload(serving, "nadia", "/srv/1.1.0")
    assert (done.returncode, done.stdout) == (0, "parts: 1.1.0 committed\n"), done.stderr
    assert "parts  1.1.0 on" in serving.run("runuser", "-u", "nadia", "--", f"{BIN}/edge-agent", "status")
    assert [(r["user"], r["outcome"]) for r in records(serving)][-1] == ("nadia", "parts 1.1.0 committed")
    expired = sideload(serving, "nadia", "--allow-expired", "/srv/1.1.0")
    assert expired.returncode == 77
    assert "[not_permitted]" in expired.stderr
    allowed = sideload(serving, "omar", "--allow-expired", "/srv/1.1.0")
    assert allowed.stdout == "parts: 1.1.0 is installed already\n", allowed.stderr
    assert records(serving)[-1]["facts"] == {"path": "/srv/1.1.0", "allow_expired": True}


def test_a_technician_installs_while_the_daemon_is_dead_and_it_serves_when_it_lives(
    enrolled: Device, people: None
) -> None:
    refused = sideload(enrolled, "eve", "/srv/1.0.0")
    assert refused.returncode != 0
    done = sideload(enrolled, "nadia", "/srv/1.0.0")
    assert (done.returncode, done.stdout) == (0, "parts: 1.0.0 committed\n"), done.stderr + enrolled.journal(
        "edge-agent-sideload.service"
    )
    assert [(r["user"], r["outcome"]) for r in records(enrolled)] == [("nadia", "parts 1.0.0 committed")]
    owners = enrolled.run("find", STATE, "-not", "-user", "edge-agent").split()
    assert owners == []
    enrolled.run("systemctl", "start", "edge-agent.service")
    assert until_results_flow(enrolled)["version"] == "1.0.0"
    # the stand-in leaves the state to a daemon that lives
    enrolled.until(
        lambda: enrolled.property("edge-agent-sideload.service", "ActiveState") == "inactive", "it ended by itself", 40
    )
    assert enrolled.property("edge-agent-sideload.service", "Result") == "success"
