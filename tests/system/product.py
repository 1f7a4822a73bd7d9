"""The product published and installed in the container: what the tests of the running device start from."""

from __future__ import annotations

import json
from typing import Any

from tests.system.device import SOURCE, Device

BIN = "/opt/edge-agent/bin"
STATE = "/var/lib/edge-agent"
CONFIG = """
workers = "unit"

[[source]]
name = "belt"
kind = "video"
path = "/srv/clip.avi"
policy = "live"
loop = true

[[line]]
name = "parts"
source = "belt"
delegates = ["litert:xnnpack"]

[update]
probation_s = 0.5
probation_results = 10
"""
# A publisher with two releases of the demo's line and a device that is enrolled with it; one directory a release, as a
# technician would carry it. The enrolled state is kept aside, so that each test starts from it.
PREPARE = f"""
set -eu
umask 022
PATH={BIN}:$PATH
cd /root
python -I {SOURCE}/models/parts/clip.py /srv/clip.avi --seconds 4
chgrp edge-agent /etc/edge-agent/agent.toml
chmod 640 /etc/edge-agent/agent.toml
runuser -u edge-agent -- {BIN}/edge-agent enroll --device belt-1 >request.json
edge-ota init fleet
edge-ota enroll fleet request.json --broker 127.0.0.1:8883 --out enrolment.json
install -o edge-agent -m 600 enrolment.json /run/enrolment.json
runuser -u edge-agent -- {BIN}/edge-agent enroll --bundle /run/enrolment.json
for version in 1.0.0 1.1.0; do
    edge-ota release fleet --spec {SOURCE}/models/parts/$version/spec.toml
    edge-ota publish fleet
    edge-ota grant fleet belt-1 parts $version
    edge-ota bundle fleet belt-1 /srv/$version
    chmod -R a+rX /srv/$version
done
cp -a {STATE} /root/enrolled
"""
SLOW_S = 300.0  # for what takes seconds on a machine that has nothing else to do


def status(device: Device) -> dict[str, Any]:
    asked = device.ask(f"{BIN}/edge-agent", "status", "--json")
    return json.loads(asked.stdout) if asked.returncode == 0 else {}


def line(device: Device) -> dict[str, Any]:
    return status(device).get("lines", {}).get("parts", {})


def until_results_flow(device: Device, more: int = 10) -> dict[str, Any]:
    """Wait for `more` further results of whatever serves; returns the line's status then."""
    seen = line(device)

    def flowing() -> bool:
        nonlocal seen
        now = line(device)
        if now.get("results", 0) < seen.get("results", 0) or not seen:  # a new daemon counts from 0
            seen = now
        return bool(seen) and now.get("results", 0) >= seen["results"] + more

    device.until(flowing, f"{more} more results", 30, lambda: device.journal("edge-agent.service"))
    return line(device)
