"""The shipped units under a real systemd: they load cleanly, score well, and keep the worker from keys and network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.system.device import SOURCE, Device

pytestmark = pytest.mark.system

UNITS = ("edge-agent.service", "edge-worker.service", "edge-source.service")
LISTENER_PORT = 8099
PYTHON = "/opt/edge-agent/bin/python"


def replace_command(device: Device, unit: str, command: str) -> None:
    """Let `unit` start `command`; everything else stays as shipped."""
    device.write(f"/etc/systemd/system/{unit}.d/command.conf", f"[Service]\nExecStart=\nExecStart={command}\n")
    device.run("systemctl", "daemon-reload")


@pytest.fixture
def listener(device: Device) -> Iterator[None]:
    """Something on the device's loopback interface that answers whoever can reach it."""
    server = ["python3", "-m", "http.server", "-b", "127.0.0.1", str(LISTENER_PORT)]
    device.run("systemd-run", "--quiet", "--unit=listener", *server)
    device.until(lambda: f":{LISTENER_PORT:04X} " in device.run("cat", "/proc/net/tcp"), "listener", 10)
    yield
    device.run("systemctl", "stop", "listener.service")


@pytest.fixture
def running(device: Device, listener: None) -> Iterator[Device]:
    """The units: a stand-in with a key and sockets for the daemon, the probe in the places of the others."""
    device.write("/etc/edge-agent/agent.toml", "# broker credentials would stand here\n", mode=0o640)
    replace_command(device, "edge-agent.service", f"{PYTHON} -I {SOURCE}/tests/system/standin.py")
    probe = f"{PYTHON} -I {SOURCE}/tests/system/probe.py /run/edge-worker/probe.json {LISTENER_PORT} --stay"
    replace_command(device, "edge-worker.service", probe)
    replace_command(device, "edge-source.service", probe.replace("edge-worker", "edge-source"))
    # as if a camera and an accelerator were there; `c 1 3` is what anybody may open
    device.run("sh", "-c", "mkdir -p /dev/dri; for n in video0 dri/renderD128; do mknod -m 666 /dev/$n c 1 3; done")
    device.run("systemctl", "start", "edge-agent.service")
    device.wait_active("edge-agent.service")
    # pulled in by the daemon's unit but not ordered behind it: it may have probed before there was a socket
    device.run("systemctl", "restart", "edge-worker.service")
    device.wait_active("edge-worker.service")
    # the daemon's socket has started it, which may have been before the others were there
    device.until(lambda: device.main_pid("edge-source.service") != 0, "edge-source started by its socket", 60)
    device.run("systemctl", "restart", "edge-source.service")
    device.wait_active("edge-source.service")
    yield device
    device.run("rm", "-f", "/dev/video0", "/dev/dri/renderD128")


def from_worker(device: Device) -> Mapping[str, Any]:
    return device.json_file("/run/edge-worker/probe.json")


def from_source(device: Device) -> Mapping[str, Any]:
    return device.json_file("/run/edge-source/probe.json")


def from_root(device: Device) -> Mapping[str, Any]:
    device.run("python3", f"{SOURCE}/tests/system/probe.py", "/run/control.json", str(LISTENER_PORT))
    return json.loads(device.run("cat", "/run/control.json"))


@pytest.mark.parametrize("unit", UNITS)
def test_unit_loads_without_a_complaint(device: Device, unit: str) -> None:
    done = device.ask("systemd-analyze", "verify", "--man=no", f"/usr/lib/systemd/system/{unit}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", UNITS)
def test_unit_exposure_stays_below_two(device: Device, unit: str) -> None:
    path = f"/usr/lib/systemd/system/{unit}"
    device.run("systemd-analyze", "security", "--offline=true", "--threshold=20", path)


def test_exposure_gate_refuses_an_open_unit(device: Device) -> None:
    device.write("/run/open.service", "[Service]\nExecStart=/bin/true\n")
    done = device.ask("systemd-analyze", "security", "--offline=true", "--threshold=20", "/run/open.service")
    assert done.returncode != 0


def test_worker_cannot_read_a_key_nor_list_the_state_directory(running: Device) -> None:
    worker, root = from_worker(running), from_root(running)
    assert {k: worker[k] for k in ("read_key", "list_state", "read_config")} == {
        "read_key": "EACCES",
        "list_state": "EACCES",
        "read_config": "EACCES",
    }
    assert root["read_key"] == "ok b'planted'"
    assert root["list_state"] == "ok ['keys']"
    assert root["read_config"].startswith("ok")


def test_worker_cannot_open_a_network_socket_nor_connect(running: Device) -> None:
    worker, root = from_worker(running), from_root(running)
    attempts = ("inet", "inet6", "netlink", "packet", "connect")
    assert {k: worker[k] for k in attempts} == dict.fromkeys(attempts, "EAFNOSUPPORT")
    assert {k: root[k] for k in attempts} == dict.fromkeys(attempts[:-1], "ok opened") | {"connect": "ok connected"}


def test_worker_has_a_network_of_its_own_besides_the_socket_filter(running: Device) -> None:
    pid = str(running.main_pid("edge-worker.service"))
    names = "tail -n +3 /proc/self/net/dev | cut -d: -f1"
    assert running.run("nsenter", "-t", pid, "-n", "sh", "-c", names).split() == ["lo"]
    assert running.run("readlink", f"/proc/{pid}/ns/net") != running.run("readlink", "/proc/1/ns/net")


def test_worker_reaches_its_own_socket_and_no_other(running: Device) -> None:
    worker, root = from_worker(running), from_root(running)
    assert worker["worker_socket"] == "ok connected"
    assert worker["control_socket"] == "EACCES"
    assert worker["list_run"] == "EACCES"
    assert worker["bus"] in ("EACCES", "ENOENT")
    assert root["control_socket"] == root["bus"] == "ok connected"
    assert root["list_run"] == "ok ['control.sock', 'source.sock', 'worker.sock']"


def test_worker_sees_no_foreign_process_and_writes_nowhere_outside_its_own_folder(running: Device) -> None:
    worker, root = from_worker(running), from_root(running)
    folders = ("create_etc", "create_usr", "create_opt", "create_var", "create_home")
    assert all(worker[k] in ("EROFS", "EACCES") for k in folders), worker
    assert all(root[k] == "ok created" for k in folders), root
    assert (worker["foreign_processes"], worker["core_limit"]) == (0, [0, 0])
    assert root["foreign_processes"] > 0
    assert worker["cwd"] == "/run/edge-worker"
    assert worker["uid"] not in (0, int(running.run("id", "-u", "edge-agent")))


def test_network_source_has_the_network_and_neither_keys_nor_devices(running: Device) -> None:
    source, worker, root = from_source(running), from_worker(running), from_root(running)
    closed = ("read_key", "list_state", "read_config", "list_run", "control_socket", "worker_socket")
    assert {k: source[k] for k in closed} == dict.fromkeys(closed, "EACCES")
    assert source["bus"] in ("EACCES", "ENOENT")
    assert (source["connect"], source["source_socket"]) == ("ok connected", "ok connected")
    assert {k: source[k] for k in ("netlink", "packet")} == dict.fromkeys(("netlink", "packet"), "EAFNOSUPPORT")
    assert worker["source_socket"] == "EACCES"
    # what root sees, and the worker may open, is not there for it
    assert {k: source[k] for k in ("camera", "accelerator")} == {"camera": "ENOENT", "accelerator": "ENOENT"}
    assert root["camera"] == "ok ['video0']"
    assert root["accelerator"].startswith("ok")
    folders = ("create_etc", "create_usr", "create_opt", "create_var", "create_home")
    assert all(source[k] in ("EROFS", "EACCES") for k in folders), source
    assert (source["foreign_processes"], source["core_limit"], source["cwd"]) == (0, [0, 0], "/run/edge-source")
    ids = {running.run("id", "-u", name).strip() for name in ("edge-agent", "edge-worker", "root")}
    assert str(source["uid"]) not in ids


def test_network_source_never_runs_where_no_source_needs_the_network(running: Device) -> None:
    running.run("systemctl", "stop", "edge-agent.service")
    running.until(lambda: running.main_pid("edge-source.service") == 0, "edge-source stopped with the daemon", 60)
    quiet = "import os, socket, time; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); " \
        "s.sendto(b'READY=1', os.environ['NOTIFY_SOCKET']); time.sleep(1000)"  # fmt: skip
    replace_command(running, "edge-agent.service", f'{PYTHON} -I -c "{quiet}"')
    running.run("systemctl", "start", "edge-agent.service")
    running.until(lambda: running.property("edge-source.path", "ActiveState") == "active", "the path unit", 60)
    assert running.main_pid("edge-source.service") == 0


def test_state_stays_shut_by_each_layer_alone(running: Device) -> None:
    """File modes keep the worker's user out without the unit; the unit empties even root's view without the modes."""
    as_user = running.ask("runuser", "-u", "edge-worker", "--", "cat", "/var/lib/edge-agent/keys/device.key")
    assert (as_user.returncode, as_user.stdout) == (1, "")
    config = running.ask("runuser", "-u", "edge-worker", "--", "cat", "/etc/edge-agent/agent.toml")
    assert (config.returncode, config.stdout) == (1, "")
    pid = str(running.main_pid("edge-worker.service"))
    inside = running.run("nsenter", "-t", pid, "-m", "find", "/var/lib/edge-agent", "/etc/edge-agent").split()
    assert inside == ["/var/lib/edge-agent", "/etc/edge-agent"]


def test_folders_of_the_daemon_have_the_promised_owners_and_modes(running: Device) -> None:
    stat = running.run("stat", "-c", "%U:%G %a %n", "/var/lib/edge-agent", "/run/edge-agent", "/etc/edge-agent")
    assert stat.splitlines() == [
        "edge-agent:edge-agent 700 /var/lib/edge-agent",
        "edge-agent:edge-agent 711 /run/edge-agent",
        "root:edge-agent 750 /etc/edge-agent",
    ]


@pytest.mark.parametrize("unit", UNITS)
def test_even_root_in_the_units_place_would_find_the_system_read_only(running: Device, unit: str) -> None:
    pid = str(running.main_pid(unit))
    for folder in ("/etc", "/usr", "/opt/edge-agent", "/var/lib"):
        touched = running.ask("nsenter", "-t", pid, "-m", "touch", f"{folder}/written")
        assert "Read-only file system" in touched.stderr, (folder, touched)


@pytest.mark.parametrize("unit", UNITS)
def test_process_runs_without_capabilities_new_privileges_or_core_dumps(running: Device, unit: str) -> None:
    pid = running.main_pid(unit)
    lines = running.run("cat", f"/proc/{pid}/status").splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16)) == (0, 0)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    limits = running.run("cat", f"/proc/{pid}/limits").splitlines()
    assert [line.split()[4:6] for line in limits if line.startswith("Max core file size")] == [["0", "0"]]


def test_killed_daemon_comes_back_while_the_worker_stays(running: Device) -> None:
    daemon, worker = running.main_pid("edge-agent.service"), running.main_pid("edge-worker.service")
    running.run("kill", "-9", str(daemon))
    running.until(lambda: running.main_pid("edge-agent.service") not in (0, daemon), "daemon restarted", 15)
    running.wait_active("edge-agent.service")
    assert running.main_pid("edge-worker.service") == worker


def test_killed_worker_comes_back_while_the_daemon_stays(running: Device) -> None:
    daemon, worker = running.main_pid("edge-agent.service"), running.main_pid("edge-worker.service")
    running.run("kill", "-9", str(worker))
    running.until(lambda: running.main_pid("edge-worker.service") not in (0, worker), "worker restarted", 15)
    assert running.main_pid("edge-agent.service") == daemon


def test_stopping_the_daemon_stops_the_worker_and_restarting_it_does_not(running: Device) -> None:
    worker = running.main_pid("edge-worker.service")
    running.run("systemctl", "restart", "edge-agent.service")
    assert running.main_pid("edge-worker.service") == worker
    running.run("systemctl", "stop", "edge-agent.service")
    running.until(lambda: running.main_pid("edge-worker.service") == 0, "worker stopped", 15)
    assert running.property("edge-worker.service", "ActiveState") == "inactive"
