"""The board as the daemon sees it from inside the shipped unit: the sandbox lets device tree, processor, PCI and USB
ids be read, and how warm it is.

The container shows the files of other boards where the kernel would show the host's. All of the unit is as shipped but
for its processor: the sandbox mounts /proc anew, so a drop-in has to put another /proc/cpuinfo there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.device import SOURCE, Device
from tests.system.product import BIN, CONFIG, STATE, status

pytestmark = pytest.mark.system

BOARDS = f"{SOURCE}/tests/vectors/boards"
# what is shown where; /sys is read-only, so whole folders are replaced by what a copy holds
SHOWN = f"""
set -eu
mkdir -p /run/board/bus /run/board/firmware/devicetree/base
cp -r {BOARDS}/raspberry-pi-5-hailo-8l/sys/bus/pci {BOARDS}/raspberry-pi-4-coral-usb/sys/bus/usb /run/board/bus/
cp {BOARDS}/raspberry-pi-5/proc/device-tree/* /run/board/firmware/devicetree/base/
cp {BOARDS}/intel-n100/proc/cpuinfo /run/board/cpuinfo
mkdir -p /run/board/thermal/thermal_zone0
echo 61500 >/run/board/thermal/thermal_zone0/temp
echo critical >/run/board/thermal/thermal_zone0/trip_point_0_type
echo 105000 >/run/board/thermal/thermal_zone0/trip_point_0_temp
chmod -R a+rX /run/board
mount --bind /run/board/bus /sys/bus
mount --bind /run/board/thermal /sys/class/thermal
mount -o remount,rw /sys
mkdir -p /sys/firmware
mount --bind /run/board/firmware /sys/firmware
mount -o remount,ro /sys
"""
HIDDEN = "umount /sys/firmware /sys/class/thermal /sys/bus"
PROCESSOR = "[Service]\nBindReadOnlyPaths=/run/board/cpuinfo:/proc/cpuinfo\n"


@pytest.fixture
def board(published: None, device: Device) -> Iterator[Device]:
    """The daemon runs in its unit on a board with an N100, a Hailo-8L, a Coral at USB, and a Raspberry Pi's tree."""
    device.run("sh", "-c", SHOWN)
    device.write("/etc/systemd/system/edge-agent.service.d/processor.conf", PROCESSOR)
    device.run("systemctl", "daemon-reload")
    device.run("sh", "-c", f"cp -a /root/enrolled/. {STATE}/")
    device.write("/etc/edge-agent/agent.toml", CONFIG)
    device.run("chown", "root:edge-agent", "/etc/edge-agent/agent.toml")
    device.run("systemctl", "start", "edge-agent.service")
    yield device
    device.run("systemctl", "stop", "edge-agent.service")
    device.run("sh", "-c", HIDDEN)


def explained(device: Device) -> dict[str, Any]:
    """What the daemon's user is told behind the mounts of the daemon's unit."""
    pid = str(device.main_pid("edge-agent.service"))
    user = device.run("id", "-u", "edge-agent").strip()
    inside = ["nsenter", "-t", pid, "-m", "--", "setpriv", "--reuid", user, "--clear-groups", "--no-new-privs"]
    return json.loads(device.run(*inside, f"{BIN}/edge-agent", "profile", "explain", "--json"))


def test_the_daemon_in_its_unit_knows_its_board_and_what_is_plugged_in(board: Device) -> None:
    board.until(lambda: bool(status(board)), "status", 90, lambda: board.journal("edge-agent.service"))
    told = status(board)["device"]
    assert told["profile"] == "intel-n100"
    assert "Intel(R) N100" in told["recognised"]
    assert told["accessories"] == "coral-usb, hailo-8"


def test_the_units_sandbox_hides_none_of_the_files_that_recognition_reads(board: Device) -> None:
    told = explained(board)
    assert told["profile"] == "intel-n100"
    assert told["board"]["compatible"] == ["raspberrypi,5-model-b", "brcm,bcm2712"]
    assert told["board"]["model"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert (told["board"]["pci"], told["board"]["usb"]) == (["1e60:2864"], ["1a6e:089a"])
    assert {a["name"] for a in told["accessories"] if a["plugged"]} == {"coral-usb", "hailo-8"}


def test_the_governor_sees_from_inside_the_unit_that_the_board_gets_hot(board: Device) -> None:
    board.until(lambda: bool(status(board)), "status", 90, lambda: board.journal("edge-agent.service"))

    def governor() -> dict[str, Any]:
        return status(board)["governor"]

    board.until(lambda: governor()["vitals"]["temperature_c"] == 61.5, "a temperature", 60)
    assert governor()["level"] == 0
    board.write("/run/board/thermal/thermal_zone0/temp", "97000\n")
    board.until(lambda: governor()["rung"] == "fps/2", "the first rung", 60, lambda: str(governor()))
    told = [c for c in status(board)["conditions"] if c["type"] == "FullRate"]
    assert told, status(board)["conditions"]
    assert "8.0 °C below the temperature at which the board switches off" in told[0]["message"]
    assert "edge_governor_level" in board.run(f"{BIN}/edge-agent", "metrics")


def test_without_a_board_to_recognise_the_unit_falls_to_the_generic_profile(published: None, device: Device) -> None:
    device.run("sh", "-c", f"cp -a /root/enrolled/. {STATE}/")
    device.write("/etc/edge-agent/agent.toml", CONFIG)
    device.run("chown", "root:edge-agent", "/etc/edge-agent/agent.toml")
    device.run("systemctl", "start", "edge-agent.service")
    device.until(lambda: bool(status(device)), "status", 90, lambda: device.journal("edge-agent.service"))
    machine = device.run("uname", "-m").strip()
    assert re.fullmatch(rf"generic-{machine}|intel-.*", status(device)["device"]["profile"])
