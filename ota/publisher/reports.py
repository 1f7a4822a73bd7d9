"""What every verb of `edge-ota` takes and answers, and how releases and devices are printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ota.publisher import director
from ota.publisher.enroll import Device
from ota.publisher.recorder import Recorder
from ota.publisher.repository import Clock, Repository
from ota.release import Component, Payload, Release


@dataclass(frozen=True, slots=True)
class Report:
    """What a verb answers: lines for a person, `data` for a program. `warnings` go to stderr either way; `status` is
    not 0 when what was asked for was done but for a part that a warning names."""

    data: dict[str, Any]
    lines: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    status: int = 0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the verbs take from outside."""

    recorder: Recorder | None
    now: Clock


Verb = Callable[[argparse.Namespace, Surroundings], Report | int]
Add = Callable[[str, Verb, str], argparse.ArgumentParser]
"""Adds a verb with its name, what it does and its help, and returns its parser."""


def release_lines(repository: Repository, release: Release) -> list[str]:
    """Sizes of every payload, in bytes and as a share of what it replaces."""
    versions = _versions_by_plaintext(repository, release.line)
    lines = []
    for component in (*release.components, release.golden):
        full = component.full
        lines.append(
            f"  {component.name}: {component.plain_length} bytes, full {full.length} bytes {full.codec} "
            f"({_percent(full.length, component.plain_length)} of the file)"
        )
        for delta in component.deltas:
            lines.append(
                f"    from {versions.get(delta.base_sha256, delta.base_sha256[:12])}: {delta.payload.length} bytes "
                f"{delta.payload.codec} ({_percent(delta.payload.length, full.length)} of the full payload)"
            )
    return lines


def release_data(repository: Repository, release: Release, *, signed: bool) -> dict[str, Any]:
    """The same as plain values."""
    versions = _versions_by_plaintext(repository, release.line)

    def sizes(component: Component) -> dict[str, Any]:
        return {
            "name": component.name,
            "format": component.format,
            "plain_sha256": component.plain_sha256,
            "plain_bytes": component.plain_length,
            "full": _payload_data(component.full),
            "deltas": [
                {
                    "base_sha256": delta.base_sha256,
                    "base_version": versions.get(delta.base_sha256),
                    **_payload_data(delta.payload),
                }
                for delta in component.deltas
            ],
            "delegates": list(component.delegates),
        }

    return {
        "line": release.line,
        "version": release.version,
        "counter": release.release_counter,
        "issued": release.issued,
        "signed": signed,
        "sha256": release.sha256,
        "licence": release.licence,
        "components": [sizes(component) for component in release.components],
        "golden": sizes(release.golden),
    }


def _payload_data(payload: Payload) -> dict[str, Any]:
    return {"sha256": payload.sha256, "bytes": payload.length, "codec": payload.codec}


def _versions_by_plaintext(repository: Repository, line: str) -> dict[str, str]:
    return {
        component.plain_sha256: release.version
        for release in repository.releases(line)
        for component in (*release.components, release.golden)
    }


def device_data(repository: Repository, device: Device) -> dict[str, Any]:
    """One device and what it was granted."""
    return {
        "device": device.device,
        "kid": device.kid,
        "certificate_serial": f"{device.certificate_serial:x}",
        "certificate_expires": device.certificate_expires,
        "enrolled": device.enrolled,
        "desired_version": device.desired_version,
        "revoked": device.revoked,
        "decommissioned": device.decommissioned,
        "desired": [
            {"line": listed.line, "version": listed.version}
            for listed in director.desired_releases(repository, device.device)
        ],
    }


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
