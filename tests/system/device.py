"""A device as the tests see it: a container with a real systemd and the product installed as the packages install it.

The units, users and the prefix /opt/edge-agent are the shipped ones. What differs: the private virtual environment
borrows its packages, read-only, from the one that runs the tests, and the sources from the checkout.
"""

from __future__ import annotations

import json
import site
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.system.tree import ROOT

SOURCE = "/opt/source"
PACKAGES = "/opt/packages"
BOOT_TIMEOUT_S = 60.0
# where the container's systemd looks for a TPM; there is one only while a test runs swtpm in the container's network
TPM_PORT = 2321
TPM = f"swtpm:host=127.0.0.1,port={TPM_PORT}"
COMMAND_TIMEOUT_S = 60.0
INSTALL = f"""
set -eu
for kind in service socket path; do
    install -m 644 {SOURCE}/packaging/systemd/*.$kind /usr/lib/systemd/system/
done
install -m 644 {SOURCE}/packaging/systemd/sysusers.conf /usr/lib/sysusers.d/edge-agent.conf
install -m 644 {SOURCE}/packaging/systemd/tmpfiles.conf /usr/lib/tmpfiles.d/edge-agent.conf
systemd-sysusers
systemd-tmpfiles --create edge-agent.conf
python3 -m venv --without-pip /opt/edge-agent
printf '%s\\n' {SOURCE} {PACKAGES} >/opt/edge-agent/lib/python3.11/site-packages/borrowed.pth
for command in edge-agent:main edge-ota:ota_main; do
    printf '#!/opt/edge-agent/bin/python\\nimport sys\\nfrom agent.app import %s as run\\nsys.exit(run())\\n' \
        "${{command#*:}}" >"/opt/edge-agent/bin/${{command%:*}}"
    chmod 755 "/opt/edge-agent/bin/${{command%:*}}"
done
systemctl daemon-reload
"""


@dataclass(frozen=True, slots=True)
class Device:
    """A booted container. `leader` is its PID 1 as seen from here."""

    leader: int

    def run(self, *command: str, check: bool = True, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Standard output of `command`, run as the container's root. Raises AssertionError when it fails."""
        done = self.ask(*command, timeout_s=timeout_s)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def ask(self, *command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """`command` run as the container's root, whatever its exit status."""
        enter = ["nsenter", "-t", str(self.leader), "-a", "--", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        return subprocess.run(
            [*enter, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Create or replace a file of the container, folders included."""
        script = 'mkdir -p "$(dirname "$1")" && printf %s "$2" >"$1" && chmod "$3" "$1"'
        self.run("sh", "-c", script, "sh", path, text, f"{mode:o}")

    def property(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--property", name, "--value", unit).strip()

    def main_pid(self, unit: str) -> int:
        """The unit's main process as the container numbers it; 0 when there is none."""
        return int(self.property(unit, "MainPID"))

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", f"--unit={unit}")

    def wait_active(self, unit: str, timeout_s: float = 90.0) -> None:
        """Until `unit` is active. Raises AssertionError with its journal when it does not become so."""
        self.until(self._is_active(unit), f"{unit} active", timeout_s, lambda: self.journal(unit))

    def _is_active(self, unit: str) -> Callable[[], bool]:
        return lambda: self.property(unit, "ActiveState") == "active"

    def json_file(self, path: str, timeout_s: float = 20.0) -> Mapping[str, Any]:
        """The content of a JSON file that some process is about to write (whole, by rename)."""
        self.until(lambda: self.ask("test", "-e", path).returncode == 0, path, timeout_s)
        loaded: Mapping[str, Any] = json.loads(self.run("cat", path))
        return loaded

    @staticmethod
    def until(condition: Callable[[], bool], what: str, timeout_s: float, detail: Callable[[], str] = str) -> None:
        """Wait for `condition()`. Raises AssertionError naming `what`, with `detail()`, after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}\n{detail()}"
            time.sleep(0.1)


def _leader(container: subprocess.Popen[bytes], log: Path) -> int:
    """nspawn's first child, once systemd answers inside."""
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
    while time.monotonic() < deadline and container.poll() is None:
        pids = children.read_text().split()
        if pids:
            state = Device(int(pids[0])).ask("systemctl", "is-system-running").stdout.strip()
            if state in ("running", "degraded"):
                return int(pids[0])
        time.sleep(0.1)
    raise AssertionError(f"the container did not boot:\n{log.read_text(errors='replace')}")


@contextmanager
def booted(tree: Path, scratch: Path, binds: Mapping[Path, str]) -> Iterator[Device]:
    """A device that boots in about a second, with the product installed and nothing started.

    `binds` are host folders to show read-only inside; `scratch` takes the console log.
    """
    packages = next(Path(p) for p in site.getsitepackages() if Path(p).is_dir())
    shown = {ROOT: SOURCE, packages: PACKAGES, **binds}
    command = ["systemd-nspawn", "--quiet", f"--directory={tree}", "--boot", "--register=no", "--keep-unit"]
    command += ["--machine=edge-device", "--private-network", "--console=pipe", "--volatile=overlay"]
    command += [f"--bind-ro={host}:{inside}" for host, inside in shown.items()]
    command += [f"--setenv=SYSTEMD_TPM2_DEVICE={TPM}"]
    log = scratch / "console.log"
    with open(log, "wb") as console:
        container = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    try:
        device = Device(_leader(container, log))
        device.run("sh", "-c", INSTALL)
        yield device
    finally:
        container.terminate()  # nspawn passes it on as a power-off
        try:
            container.wait(20)
        except subprocess.TimeoutExpired:
            container.kill()
            container.wait()
