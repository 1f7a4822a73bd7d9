"""The product under its shipped units: the demo's clip is answered, its model replaced, a killed part comes back."""

from __future__ import annotations

import pytest

from tests.system.device import SOURCE, Device
from tests.system.product import BIN, SLOW_S, STATE, line, status, until_results_flow

pytestmark = pytest.mark.system

FORBIDDEN_IN_DAEMON = ("numpy", "cv2", "onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime")


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
    # a busy machine may fall behind the live clip; the switch loses nothing
    assert set(after["dropped"]) <= {"backlog"}
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
