"""The product under its shipped units: the demo's clip is answered, its model replaced, a killed part comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.system.device import SOURCE, Device

pytestmark = pytest.mark.system

BIN = "/opt/edge-agent/bin"
STATE = "/var/lib/edge-agent"
CONFIG = """
workers = "unit"

[[source]]
name = "belt"
kind = "video"
path = "/srv/clip.avi"
policy = "live"
loop = true

[[line]]
name = "parts"
source = "belt"

[update]
probation_s = 0.5
probation_results = 10
"""
# A publisher with two releases of the demo's line and a device that is enrolled with it; one directory a release, as a
# technician would carry it. The enrolled state is kept aside, so that each test starts from it.
PREPARE = f"""
set -eu
umask 022
PATH={BIN}:$PATH
cd /root
python -I {SOURCE}/models/parts/clip.py /srv/clip.avi --seconds 4
chgrp edge-agent /etc/edge-agent/agent.toml
chmod 640 /etc/edge-agent/agent.toml
runuser -u edge-agent -- {BIN}/edge-agent enroll --device belt-1 >request.json
edge-ota init fleet
edge-ota enroll fleet request.json --broker 127.0.0.1:8883 --out enrolment.json
install -o edge-agent -m 600 enrolment.json /run/enrolment.json
runuser -u edge-agent -- {BIN}/edge-agent enroll --bundle /run/enrolment.json
for version in 1.0.0 1.1.0; do
    edge-ota release fleet --spec {SOURCE}/models/parts/$version/spec.toml
    edge-ota publish fleet
    edge-ota grant fleet belt-1 parts $version
    edge-ota bundle fleet belt-1 /srv/$version
    chmod -R a+rX /srv/$version
done
cp -a {STATE} /root/enrolled
"""
SLOW_S = 300.0  # for what takes seconds on a machine that has nothing else to do
FORBIDDEN_IN_DAEMON = ("numpy", "cv2", "onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime")


@pytest.fixture(scope="module")
def published(machine: Device) -> None:
    machine.write("/etc/edge-agent/agent.toml", CONFIG)
    machine.run("sh", "-c", PREPARE, timeout_s=SLOW_S)


@pytest.fixture
def serving(published: None, device: Device) -> Device:
    """Both units run as shipped, and the device serves parts 1.0.0 from the looping clip."""
    device.run("sh", "-c", f"cp -a /root/enrolled/. {STATE}/")
    device.write("/etc/edge-agent/agent.toml", CONFIG)
    device.run("chown", "root:edge-agent", "/etc/edge-agent/agent.toml")
    device.run("systemctl", "start", "edge-agent.service")
    device.run(f"{BIN}/edge-agent", "sideload", "/srv/1.0.0", timeout_s=SLOW_S)
    return device


def status(device: Device) -> dict[str, Any]:
    asked = device.ask(f"{BIN}/edge-agent", "status", "--json")
    return json.loads(asked.stdout) if asked.returncode == 0 else {}


def line(device: Device) -> dict[str, Any]:
    return status(device).get("lines", {}).get("parts", {})


def until_results_flow(device: Device, more: int = 10) -> dict[str, Any]:
    """Wait for `more` further results of whatever serves; returns the line's status then."""
    seen = line(device)

    def flowing() -> bool:
        nonlocal seen
        now = line(device)
        if now.get("results", 0) < seen.get("results", 0) or not seen:  # a new daemon counts from 0
            seen = now
        return bool(seen) and now.get("results", 0) >= seen["results"] + more

    device.until(flowing, f"{more} more results", 30, lambda: device.journal("edge-agent.service"))
    return line(device)


def test_clip_is_answered_in_isolation(serving: Device) -> None:
    served = until_results_flow(serving, 30)
    assert status(serving)["isolation"] == "unit"
    assert (served["version"], served["committed"], served["update"]["outcome"]) == ("1.0.0", "1.0.0", "committed")
    assert served["delegate"]
    assert served["restarts"] == 0
    worker = f"/proc/{served['worker_pid']}"
    assert serving.run("stat", "-c", "%U", worker).strip() == "edge-worker"
    assert serving.run("readlink", f"{worker}/ns/net") != serving.run("readlink", "/proc/1/ns/net")


def test_new_release_replaces_the_old_one_and_the_daemon_loads_no_runtime_for_it(serving: Device) -> None:
    before = until_results_flow(serving)
    serving.run(f"{BIN}/edge-agent", "sideload", "/srv/1.1.0", timeout_s=SLOW_S)
    after = until_results_flow(serving)
    assert (after["version"], after["committed"]) == ("1.1.0", "1.1.0")
    assert after["worker_pid"] != before["worker_pid"]
    assert after["restarts"] == 0
    assert set(after["dropped"]) <= {
        "backlog"
    }  # a busy machine may fall behind the live clip; the switch loses nothing
    daemon = serving.main_pid("edge-agent.service")
    mapped, foreign = (serving.run("cat", f"/proc/{pid}/maps") for pid in (daemon, after["worker_pid"]))
    assert [name for name in FORBIDDEN_IN_DAEMON if f"/{name}" in mapped] == []
    assert "/numpy" in foreign


@pytest.mark.fault("F56")
def test_no_file_holds_the_model_in_clear_while_it_runs_nor_after_its_worker_died(serving: Device) -> None:
    component = until_results_flow(serving)["component"]
    model = f"{SOURCE}/models/parts/1.0.0/{component}"
    search = (
        "import os, sys\n"
        "canary = open(sys.argv[1], 'rb').read()[40000:40064]\n"
        "for top in sys.argv[2:]:\n"
        "    for folder, _, names in os.walk(top):\n"
        "        for path in (os.path.join(folder, n) for n in names):\n"
        "            if os.path.isfile(path) and not os.path.islink(path) and canary in open(path, 'rb').read():\n"
        "                print(path)\n"
    )

    def found(*folders: str) -> list[str]:
        return serving.run("python3", "-c", search, model, *folders).split()

    private = (STATE, "/run/edge-agent", "/run/edge-worker", "/tmp", "/var/tmp", "/dev/shm")
    assert found(*private) == []
    serving.run("kill", "-SEGV", str(line(serving)["worker_pid"]))
    until_results_flow(serving)
    assert found(*private) == []
    assert model in found(f"{SOURCE}/models/parts/1.0.0")


def test_killed_daemon_serves_the_committed_release_again(serving: Device) -> None:
    until_results_flow(serving)
    daemon = serving.main_pid("edge-agent.service")
    serving.run("kill", "-9", str(daemon))
    serving.until(lambda: serving.main_pid("edge-agent.service") not in (0, daemon), "daemon restarted", 15)
    serving.wait_active("edge-agent.service")
    served = until_results_flow(serving)
    assert (served["version"], status(serving)["isolation"]) == ("1.0.0", "unit")


def test_killed_worker_unit_serves_again_under_the_same_daemon(serving: Device) -> None:
    until_results_flow(serving)
    daemon, host = serving.main_pid("edge-agent.service"), serving.main_pid("edge-worker.service")
    serving.run("kill", "-9", str(host))
    serving.until(lambda: serving.main_pid("edge-worker.service") not in (0, host), "worker unit restarted", 15)
    served = until_results_flow(serving)
    assert (served["version"], status(serving)["isolation"]) == ("1.0.0", "unit")
    assert serving.main_pid("edge-agent.service") == daemon


@pytest.mark.fault("F96")
def test_daemon_that_no_longer_beats_is_replaced_and_serves_again(serving: Device) -> None:
    """The limits are shortened; that the daemon beats, and that systemd acts, is what is tested."""
    limits = "[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n"
    serving.write("/etc/systemd/system/edge-agent.service.d/watchdog.conf", limits)
    serving.run("systemctl", "daemon-reload")
    serving.run("systemctl", "restart", "edge-agent.service")
    until_results_flow(serving, 100)  # three seconds at 30 a second: a healthy daemon outlives its watchdog
    daemon = serving.main_pid("edge-agent.service")
    assert serving.property("edge-agent.service", "NRestarts") == "0"
    serving.run("kill", "-STOP", str(daemon))
    serving.until(lambda: serving.main_pid("edge-agent.service") not in (0, daemon), "daemon replaced", 20)
    serving.wait_active("edge-agent.service")
    assert until_results_flow(serving)["version"] == "1.0.0"
    assert "watchdog" in serving.journal("edge-agent.service").lower()


def test_both_units_stop_cleanly(serving: Device) -> None:
    until_results_flow(serving)
    serving.run("systemctl", "stop", "edge-agent.service")
    for unit in ("edge-agent.service", "edge-worker.service"):
        serving.until(lambda unit=unit: serving.main_pid(unit) == 0, f"{unit} stopped", 15)
        assert serving.property(unit, "Result") == "success"
