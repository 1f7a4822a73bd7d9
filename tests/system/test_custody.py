"""The storage key sealed to a TPM by a real systemd: what the guide says is typed, and the TPM is taken away.

The TPM is swtpm, outside the container but in its network, so that the container's PID 1 reaches it; its state is the
board's, and a container without that state is a copied disk in another board.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.documents import blocks
from tests.system.device import TPM, TPM_PORT, Device
from tests.system.product import BIN, STATE, status, until_results_flow

pytestmark = pytest.mark.system

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "custody.md"
KEYS = f"{STATE}/keys"
UNIT = "edge-agent.service"
PROGRAMS = ("swtpm", "tpm2_pcrextend")
CREDENTIALS_FAILED = "243"


class Board:
    """The TPM of one board; `power_on` measures a firmware into PCR 7, as a board does."""

    def __init__(self, device: Device, folder: Path) -> None:
        self._device = device
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def power_on(self) -> None:
        self._folder.mkdir(exist_ok=True)
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self._folder}"]
        command += ["--server", f"type=tcp,port={TPM_PORT},bindaddr=127.0.0.1"]
        command += ["--ctrl", f"type=tcp,port={TPM_PORT + 1},bindaddr=127.0.0.1"]
        command += ["--flags", "not-need-init,startup-clear"]
        self._process = subprocess.Popen([*self._inside(), *command], stdin=subprocess.DEVNULL)
        Device.until(self._listens, "swtpm", 10)
        self.measure(b"firmware")

    def power_off(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def measure(self, what: bytes) -> None:
        """Extend PCR 7, which the credential is bound to."""
        digest = what.hex().ljust(64, "0")
        environment = {**os.environ, "TPM2TOOLS_TCTI": TPM}
        subprocess.run([*self._inside(), "tpm2_pcrextend", f"7:sha256={digest}"], env=environment, check=True)

    def _inside(self) -> list[str]:
        return ["nsenter", "-t", str(self._device.leader), "-n", "--"]

    def _listens(self) -> bool:
        return f":{TPM_PORT:04X} " in self._device.run("cat", "/proc/net/tcp")


@pytest.fixture
def board(device: Device, tmp_path: Path) -> Iterator[Board]:
    """The board that the device was sealed on, powered."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent and os.environ.get("CI") == "true":
        pytest.fail(f"not installed: {absent}")
    if absent:
        pytest.skip(f"not installed: {absent}")
    board = Board(device, tmp_path / "tpm")
    board.power_on()
    yield board
    board.power_off()


def seal(device: Device, kind: str, *, keep_tls: bool = False) -> None:
    """What the guide types, as root, for a credential sealed to `kind`."""
    script = "\n".join(
        block.text.rstrip() for block in blocks(GUIDE) if block.info == "sh device" and "encrypt" in block.text
    )
    assert "--with-key=tpm2" in script
    script = script.replace("--with-key=tpm2", f"--with-key={kind}").replace("sudo ", "")
    script += " --keep-tls" if keep_tls else ""
    device.run("sh", "-euc", f"PATH={BIN}:$PATH SYSTEMD_TPM2_DEVICE={TPM}; export SYSTEMD_TPM2_DEVICE PATH\n{script}")


def restart(device: Device) -> None:
    """As an operator does who mended the cause; returns when systemd has an opinion."""
    device.ask("systemctl", "stop", "edge-agent-keyless.service", UNIT)
    device.ask("systemctl", "start", UNIT)


def keyless(device: Device) -> dict[str, Any]:
    """Wait for the daemon that runs without its key; its status."""
    device.until(
        lambda: any(c["reason"] == "sealed_key_unavailable" for c in status(device).get("conditions", [])),
        "the condition", 30, lambda: device.journal(UNIT),
    )  # fmt: skip
    return status(device)


def found(device: Device, *hexes: str) -> list[str]:
    """Which of these secrets lie in a file of the state directory."""
    script = (
        "import os, sys\n"
        "secrets = [bytes.fromhex(text) for text in sys.argv[2:]]\n"
        "for folder, _, names in os.walk(sys.argv[1]):\n"
        "    for name in names:\n"
        "        data = open(os.path.join(folder, name), 'rb').read()\n"
        "        for secret in secrets:\n"
        "            if secret in data: print(secret.hex())\n"
    )
    return device.run("python3", "-c", script, STATE, *hexes).split()


def key_files(device: Device) -> list[str]:
    """The secrets that enrolment made, in hex."""
    return [device.run("od", "-An", "-v", "-tx1", f"{KEYS}/{name}").replace("\n", "").replace(" ", "")
            for name in ("storage.key", "hpke.key", "device.key")]  # fmt: skip


@pytest.mark.fault("F54")
def test_a_storage_key_sealed_to_the_tpm_opens_the_models_on_this_board_and_on_no_other(
    serving: Device, board: Board, tmp_path: Path
) -> None:
    device = serving
    until_results_flow(device)
    secrets = key_files(device)
    seal(device, "tpm2")
    assert until_results_flow(device)["version"] == "1.0.0"
    custody = status(device)["custody"]
    assert (custody["kind"], custody["sealed_to"]) == ("systemd-credential", "tpm2")
    assert "opens no model" in custody["worth"]
    assert sorted(device.run("ls", KEYS).split()) == ["ring.cbs", "ring.copy.cbs", "sealed"]
    assert found(device, *secrets) == []
    restart(device)
    assert until_results_flow(device)["version"] == "1.0.0"
    # the TLS key comes out of the ring, through a memfd: there is no broker here, but a try
    device.until(
        lambda: "refused" in status(device)["link"]["message"], "a connection", 30, lambda: str(status(device))
    )

    # changed PCRs: the board started something else
    board.measure(b"other firmware")
    lost(device)
    board.power_off()
    board.power_on()
    mended(device)

    board.power_off()  # no TPM at all
    lost(device)

    other = Board(device, tmp_path / "other")  # the copied disk in another board
    other.power_on()
    lost(device)
    other.power_off()

    board.power_on()
    mended(device)


def lost(device: Device) -> None:
    """Without its key the daemon runs, says so, serves nothing and harms nothing."""
    files = device.run("sh", "-c", f"cd {STATE}/store && sha256sum *")
    device.run("systemctl", "stop", "edge-agent-keyless.service", UNIT)
    assert device.ask("systemctl", "start", UNIT).returncode != 0
    shown = keyless(device)
    assert "243/CREDENTIALS" in device.journal(UNIT)
    device.wait_active(UNIT)
    served = shown["lines"]["parts"]
    assert (served["version"], served["committed"], served["worker_pid"]) == ("", "1.0.0", 0)
    assert shown["link"]["state"] == "no_key"
    again = device.ask(f"{BIN}/edge-agent", "sideload", "/srv/1.1.0", "--json")
    assert "sealed_key_unavailable" in again.stdout + again.stderr, again
    assert device.run("sh", "-c", f"cd {STATE}/store && sha256sum *") == files
    assert device.main_pid(UNIT) != 0


def mended(device: Device) -> None:
    """Nothing was lost meanwhile."""
    restart(device)
    assert until_results_flow(device)["version"] == "1.0.0"
    assert [c for c in status(device)["conditions"] if c["type"] == "KeysAvailable"] == []


@pytest.mark.fault("F54")
def test_a_device_that_kept_its_tls_key_in_a_file_still_calls_home_when_its_tpm_is_gone(
    serving: Device, board: Board
) -> None:
    device = serving
    seal(device, "tpm2", keep_tls=True)
    assert "device.key" in device.run("ls", KEYS).split()
    board.power_off()
    device.run("systemctl", "stop", UNIT)
    assert device.ask("systemctl", "start", UNIT).returncode != 0
    assert keyless(device)["link"]["state"] in ("connecting", "waiting")


def test_status_tells_a_host_key_from_a_tpm(serving: Device) -> None:
    device = serving
    seal(device, "host")
    until_results_flow(device)
    custody = status(device)["custody"]
    assert (custody["kind"], custody["sealed_to"]) == ("systemd-credential", "host")
    assert "carries its keys with it" in custody["worth"]
    # true: with the two files of the copied card anybody has the key
    device.run("systemd-creds", "decrypt", "--name=storage.key", "/etc/edge-agent/storage.key.cred", "/root/stolen")
    device.run("chmod", "640", "/etc/edge-agent/storage.key.cred")
    device.run("chown", "root:root", "/etc/edge-agent/storage.key.cred")
    restart(device)
    until_results_flow(device)
    assert status(device)["custody"]["sealed_to"] == "unknown"
