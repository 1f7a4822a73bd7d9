"""Whether a verified release may run on this device at all, decided before any payload is fetched. Pure."""

from __future__ import annotations

import re

from ota.client.machine import LineRecord
from ota.client.ports import Identity
from ota.errors import Reason, Rejected
from ota.release import Release

_REQUIREMENT = re.compile(r">=\s*([0-9]{1,5})\.([0-9]{1,5})(?:\.([0-9]{1,5}))?")


def check_quarantine(record: LineRecord, release_sha256: str, version: str) -> None:
    """Refuse a release that failed here before.

    Raises:
        Rejected: `quarantined`.
    """
    reason = record.quarantine.get(release_sha256)
    if reason is not None:
        raise Rejected(
            Reason.QUARANTINED,
            f"{record.line} {version} was tried and is quarantined: {reason.value}",
            hint="publish a newer release",
        )


def check_release(
    release: Release,
    record: LineRecord,
    identity: Identity,
    allow_rollback_to: int = 0,
    allow_rollback_from: int = 0,
) -> None:
    """Refuse a release that is older than what ran here, or made for other devices.

    Args:
        allow_rollback_to: lowest counter that the line's release role lets devices go back to; 0 is none.
        allow_rollback_from: highest counter that this order is meant for. An order that was withdrawn can be replayed,
            from a stick for one; devices that have gone beyond it since are not moved by it.

    Raises:
        Rejected: `counter_rollback` or `incompatible`.
    """
    counter, floor = release.release_counter, record.floor_counter
    ordered_back = 0 < allow_rollback_to <= counter < floor <= allow_rollback_from
    forged = counter == floor and release.sha256 != record.floor_sha256
    if forged or (counter < floor and not ordered_back):
        raise Rejected(
            Reason.COUNTER_ROLLBACK,
            f"{release.line} {release.version} has release counter {counter}, this device is at {floor}",
            hint="publish the older model again under a new version, or edge-ota allow-rollback",
        )
    if not agent_satisfies(release.requires.agent, identity.agent_version):
        raise Rejected(
            Reason.INCOMPATIBLE,
            f"{release.line} {release.version} requires agent {release.requires.agent}, "
            f"this is {identity.agent_version}",
            hint="update the agent",
        )
    if release.requires.profiles and identity.profile not in release.requires.profiles:
        raise Rejected(
            Reason.INCOMPATIBLE,
            f"{release.line} {release.version} is for {', '.join(release.requires.profiles)}, "
            f"this device is {identity.profile}",
            hint="grant a release for this device's profile",
        )


def agent_satisfies(requirement: str, version: str) -> bool:
    """Whether agent `version` (`X.Y.Z`) meets `requirement` (empty, or `>=X.Y` or `>=X.Y.Z`); a requirement of any
    other form is one that this agent does not understand and so does not meet."""
    if not requirement:
        return True
    match = _REQUIREMENT.fullmatch(requirement.strip())
    numbers = re.match(r"([0-9]+)\.([0-9]+)(?:\.([0-9]+))?", version)
    if match is None or numbers is None:
        return False
    wanted = tuple(int(part or 0) for part in match.groups())
    return tuple(int(part or 0) for part in numbers.groups()) >= wanted
