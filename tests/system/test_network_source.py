"""A network camera under the shipped units: read in edge-source.service, while its model has no network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.device import SOURCE, Device
from tests.system.product import BIN, CONFIG, SLOW_S, STATE, status, until_results_flow

pytestmark = pytest.mark.system

PORT = 8097
PASSWORD = "s3cret/word"
CAMERA = f'kind = "http"\nurl = "http://127.0.0.1:{PORT}/video"\ncredentials_file = "credential:belt"\n'


@pytest.fixture
def watching(published: None, device: Device) -> Iterator[Device]:
    """The device serves parts 1.0.0 from an HTTP camera whose password is a credential of the daemon's unit."""
    camera = [f"{BIN}/python", "-I", f"{SOURCE}/tests/fakes/mjpegserver.py", str(PORT), f"viewer:{PASSWORD}"]
    device.run("systemd-run", "--quiet", "--unit=camera", *camera)
    device.run("sh", "-c", f"cp -a /root/enrolled/. {STATE}/")
    head, tail = CONFIG.index('kind = "video"'), CONFIG.index("[[line]]")
    device.write("/etc/edge-agent/agent.toml", CONFIG[:head] + CAMERA + CONFIG[tail:])
    device.run("chown", "root:edge-agent", "/etc/edge-agent/agent.toml")
    device.write("/root/belt.secret", f"viewer:{PASSWORD}\n", mode=0o600)
    drop_in = "[Service]\nLoadCredential=belt:/root/belt.secret\n"
    device.write("/etc/systemd/system/edge-agent.service.d/camera.conf", drop_in)
    device.run("systemctl", "daemon-reload")
    device.run("systemctl", "start", "edge-agent.service")
    device.run(f"{BIN}/edge-agent", "sideload", "/srv/1.0.0", timeout_s=SLOW_S)
    yield device
    device.run("systemctl", "stop", "camera.service")


def test_camera_is_read_with_the_network_and_its_model_runs_without(watching: Device) -> None:
    served = until_results_flow(watching, 20)
    document = status(watching)
    source = document["sources"]["belt"]
    assert (source["state"], source["isolation"], document["isolation"]) == ("streaming", "unit", "unit")
    reader = watching.run("pgrep", "-u", "edge-source", "-f", "main --network source").split()[0]
    networks = [watching.run("readlink", f"/proc/{pid}/ns/net") for pid in ("1", reader, str(served["worker_pid"]))]
    assert networks[0] == networks[1] != networks[2]
    assert watching.run("stat", "-c", "%U", f"/proc/{served['worker_pid']}").strip() == "edge-worker"


def test_password_is_in_no_status_log_or_command_line(watching: Device) -> None:
    until_results_flow(watching)
    watching.run("systemctl", "restart", "camera.service", check=False)
    watching.run("kill", "-9", str(watching.main_pid("edge-source.service")))
    watching.until(lambda: status(watching)["sources"]["belt"]["restarts"] > 0, "the source was lost", 60)
    until_results_flow(watching)
    said = [watching.run(f"{BIN}/edge-agent", "status", *more) for more in ([], ["--json"])]
    said.append(watching.run("journalctl", "-o", "export", "_SYSTEMD_UNIT=edge-agent.service"))
    said.append(watching.run("journalctl", "-o", "export", "_SYSTEMD_UNIT=edge-source.service"))
    ours = "for user in edge-agent edge-source edge-worker; do ps -ww -u $user -o args=; done"
    said.append(watching.run("sh", "-c", ours))
    assert all(len(text) > 100 for text in said[:3])
    assert "main --network source" in said[4]
    assert not [text for text in said if PASSWORD in text or "s3cret" in text]


def test_killed_network_unit_is_back_while_daemon_and_model_stay(watching: Device) -> None:
    until_results_flow(watching)
    daemon, worker = watching.main_pid("edge-agent.service"), watching.main_pid("edge-worker.service")
    host = watching.main_pid("edge-source.service")
    watching.run("kill", "-9", str(host))
    watching.until(lambda: watching.main_pid("edge-source.service") not in (0, host), "edge-source restarted", 60)
    until_results_flow(watching)
    assert (watching.main_pid("edge-agent.service"), watching.main_pid("edge-worker.service")) == (daemon, worker)
    assert status(watching)["sources"]["belt"]["state"] == "streaming"
