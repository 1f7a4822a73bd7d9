"""What a daemon that runs has loaded: nothing of the other side's, nothing that it has no use for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.demo.footprint import FOREIGN, NEEDLESS, runtimes_mapped
from tests.fakes.broker import Broker
from tests.integration.console import Device, make_fleet, until, watching


def loaded(device: Device) -> set[str]:
    """Top-level names of the modules that the daemon has loaded."""
    return set(device.ask("/modules")["modules"])


def test_a_daemon_loads_no_runtime_and_nothing_needless_be_it_idle_or_after_an_update_by_delta(
    tmp_path: Path, repository: Path, clip: Path
) -> None:
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet, device = make_fleet(tmp_path, repository, clip)
    try:
        pid = device.start()
        until("the link", lambda: device.ask()["link"]["state"] == "connected", 60)
        assert not loaded(device) & (FOREIGN | NEEDLESS)
        with watching(fleet) as observer:
            assert device.grant(observer, "1.0.0")["outcome"] == "committed"
            update = device.install(observer, "1.1.0")
        assert update["outcome"] == "committed"
        assert update["traffic"]["delta_bytes"] > 0
        assert not loaded(device) & (FOREIGN | NEEDLESS)
        assert not runtimes_mapped(pid)
    finally:
        fleet.stop()
