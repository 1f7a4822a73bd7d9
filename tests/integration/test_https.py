"""A device whose broker is gone installs over HTTPS, and what agent.toml forbids waits without failing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ota.publisher import director
from tests.fakes.broker import Broker, Identity
from tests.fakes.webserver import WebServer
from tests.integration.console import QUICK, make_fleet, until


def test_without_a_broker_a_release_comes_over_https_once_the_network_is_free(
    tmp_path: Path, repository: Path, clip: Path
) -> None:
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    if not WebServer.available() and os.environ.get("CI") != "true":
        pytest.skip("nginx is not installed (Debian package nginx-light)")
    fleet, device = make_fleet(tmp_path, repository, clip)
    server = Identity("broker", *(str(fleet.keys / name) for name in ("ca.pem", "broker.pem", "broker.key")))
    try:
        assert fleet.broker is not None
        fleet.broker.stop()
        director.grant(device.repository(), fleet.device, "parts", "1.0.0")
        with WebServer(tmp_path / "web", tmp_path / "repo", server) as web:
            https = f'{QUICK}\nhttps = "{web.url}"'
            device.configure(f'{https}\nmetered = true\non_metered = "never"')
            device.start()
            until("the update waits", lambda: device.ask()["lines"]["parts"]["update"]["waits_for"] == "metered", 60)
            assert device.ask()["lines"]["parts"]["update"]["outcome"] == "", "waiting is no failure"
            assert not [line for line in web.requests() if "/payloads/" in line]
            assert [line for line in web.requests() if "/metadata/timestamp.json" in line]
            device.stop()
            device.configure(https)
            device.start()
            until("1.0.0 serves", lambda: device.ask()["lines"]["parts"]["committed"] == "1.0.0", 90)
            assert [line for line in web.requests() if "/payloads/" in line and " 206 " in line]
        device.stop()
    finally:
        fleet.stop()
