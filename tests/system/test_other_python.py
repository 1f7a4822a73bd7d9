"""The drop-in of the guide: the worker's unit under another interpreter, which has this program not installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.system.device import PACKAGES, Device
from tests.system.product import until_results_flow

pytestmark = pytest.mark.system

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "device.md"
VENDOR = "/opt/vendor"
# An interpreter of its own prefix with the packages of a worker and nothing of ours: the container has one version of
# Python, so that the packages can be those that its tests borrow.
MAKE_VENDOR = f"""
set -eu
python3 -m venv --without-pip {VENDOR}
theirs=$(echo {VENDOR}/lib/python3*/site-packages)
for path in {PACKAGES}/*; do
    case $(basename "$path") in
    agent*|ota*|edge_runtime_agent*|__editable__*|*.pth|cryptography*|tuf*|paho*) ;;
    *) ln -sfn "$path" "$theirs/" ;;
    esac
done
"""


def drop_in(device: Device) -> str:
    """The guide's, with this container's paths."""
    (text,) = re.findall(r"```ini\n# \S+python\.conf\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    code = "import agent.worker.start as s; print(s.__file__)"
    start = device.run("/opt/edge-agent/bin/python", "-I", "-c", code).strip()
    assert re.fullmatch(r"/.*/agent/worker/start\.py", start)
    text = re.sub(r"/opt/edge-agent/lib/\S+/start\.py", start, text)
    assert "/usr/bin/python3.10 -I" in text
    return text.replace("/usr/bin/python3.10", f"{VENDOR}/bin/python3")


def test_the_unit_serves_frames_under_another_interpreter(serving: Device) -> None:
    device = serving
    device.run("sh", "-c", MAKE_VENDOR)
    device.write("/etc/systemd/system/edge-worker.service.d/python.conf", drop_in(device))
    checked = device.ask("systemd-analyze", "verify", "--man=no", "edge-worker.service")
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    device.run("systemctl", "daemon-reload")
    device.run("systemctl", "restart", "edge-worker.service")
    until_results_flow(device)
    pid = device.main_pid("edge-worker.service")
    words = device.run("cat", f"/proc/{pid}/cmdline").split("\0")
    assert words[0] == f"{VENDOR}/bin/python3"
    children = device.run("pgrep", "-P", str(pid)).split()
    assert children
    for child in children:
        words = device.run("cat", f"/proc/{child}/cmdline").split("\0")
        assert words[0] == f"{VENDOR}/bin/python3"
        maps = device.run("cat", f"/proc/{child}/maps")
        assert "cryptography" not in maps
    names = "tail -n +3 /proc/self/net/dev | cut -d: -f1"
    assert device.run("nsenter", "-t", str(pid), "-n", "sh", "-c", names).split() == ["lo"]


def test_an_interpreter_that_lacks_numpy_is_told_in_the_journal_and_blames_no_release(serving: Device) -> None:
    device = serving
    device.run("sh", "-c", f"python3 -m venv --without-pip {VENDOR}-bare")
    text = drop_in(device).replace(f"{VENDOR}/bin", f"{VENDOR}-bare/bin")
    device.write("/etc/systemd/system/edge-worker.service.d/python.conf", text)
    device.run("systemctl", "daemon-reload")
    device.ask("systemctl", "restart", "edge-worker.service")
    wanted = "cannot run workers: it does not have numpy, cv2, zstandard"
    device.until(lambda: device.journal("edge-worker.service").count(wanted) > 1, wanted, 60)
    assert "crashed" not in device.journal("edge-agent.service")
    device.run("rm", "/etc/systemd/system/edge-worker.service.d/python.conf")
    device.run("systemctl", "daemon-reload")
    device.run("systemctl", "restart", "edge-worker.service")
    assert until_results_flow(device)["version"] == "1.0.0"
