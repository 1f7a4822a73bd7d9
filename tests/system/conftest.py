"""One container for all system tests; each test starts and stops the units it needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import tree
from tests.system.device import Device, booted
from tests.system.product import BIN, CONFIG, PREPARE, SLOW_S, STATE


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """The booted container. Under CI=true a missing program is a failure, elsewhere a named skip."""
    reason = tree.missing()
    if reason:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    shared = tree.ROOT.parent / "shared" / "data"
    binds: dict[Path, str] = {shared: "/opt/shared-data"} if shared.is_dir() else {}
    # whoever runs the tests may keep files to himself; the container's users must be able to read their system
    umask = os.umask(0o022)
    try:
        with tree.tree() as root, booted(root, tmp_path_factory.mktemp("container"), binds) as device:
            yield device
    finally:
        os.umask(umask)


@pytest.fixture
def device(machine: Device) -> Iterator[Device]:
    """The container with both units stopped, without drop-ins and with an empty state directory, before and after."""
    _clean(machine)
    yield machine
    _clean(machine)


def _clean(machine: Device) -> None:
    machine.run("systemctl", "stop", "edge-agent-keyless.service", "edge-agent.service", "edge-worker.service")
    machine.run("systemctl", "stop", "edge-source.path", "edge-source.service")
    machine.run("systemctl", "stop", "edge-agent-sideload.socket", "edge-agent-sideload.service")
    machine.run("sh", "-c", "rm -rf /etc/systemd/system/edge-*.service.d /etc/edge-agent/* /var/lib/edge-agent/*")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "reset-failed")


@pytest.fixture(scope="session")
def published(machine: Device) -> None:
    """Two releases on sticks, and the state of a device that is enrolled for them."""
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
