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


def check_release(release: Release, record: LineRecord, identity: Identity) -> None:
    """Refuse a release that is older than what ran here, or made for other devices.

    Raises:
        Rejected: `counter_rollback` or `incompatible`.
    """
    counter = release.release_counter
    if counter < record.floor_counter or (counter == record.floor_counter and release.sha256 != record.floor_sha256):
        raise Rejected(
            Reason.COUNTER_ROLLBACK,
            f"{release.line} {release.version} has release counter {counter}, this device is at {record.floor_counter}",
            hint="publish the older model again under a new version",
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
