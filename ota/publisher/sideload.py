"""A sideload directory: what one device needs for the releases it is granted, in the repository's own layout.

It holds signed metadata and sealed payloads alone: no key, nothing of the vault, no other device's document. All
roots are in it, so that a device that was away for years can follow them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import Targets

from ota.errors import PublishError, Reason
from ota.publisher import director, files
from ota.publisher.enroll import load_device
from ota.publisher.keys import release_role
from ota.publisher.publish import publish
from ota.publisher.repository import Listed, Repository, load_metadata
from ota.release import MAX_PAYLOAD_BYTES


@dataclass(frozen=True, slots=True)
class Sideload:
    """What was written; a device takes it until `expires`, judged by its own clock."""

    device: str
    releases: tuple[Listed, ...]
    files: int
    bytes: int
    expires: datetime


def write_sideload(repository: Repository, device: str, out: Path) -> Sideload:
    """Write the sideload directory of `device` to `out`, absent or empty, after renewing what it contains.

    Raises:
        PublishError: `unknown_device`; `unknown_release` when nothing was granted to it; `repository_exists` when
            `out` is not empty; `key_missing`, `busy`, `io_error`, `no_space`.
    """
    _refuse_used(out)
    load_device(repository, device)
    releases = director.desired_releases(repository, device)
    if not releases:
        raise PublishError(
            Reason.UNKNOWN_RELEASE,
            f"nothing was granted to {device}",
            hint=f"edge-ota grant {repository.path} {device} LINE VERSION",
        )
    publish(repository, [])
    director.renew(repository, only=device)
    copied = _Copy(out)
    for listed in releases:
        _copy_release(repository, listed, copied)
    desired = _present(repository.read_desired(device), "desired.json")
    copied.write(repository.desired_path(device).relative_to(repository.path), desired)
    _copy_metadata(repository, [listed.line for listed in releases], copied)
    expires = min(
        load_metadata(desired, "desired.json", Targets).signed.expires,
        repository.timestamp().signed.expires,
        repository.snapshot().signed.expires,
    )
    return Sideload(device, tuple(releases), copied.files, copied.bytes, expires)


class _Copy:
    """Writes files below `out` and counts them."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.files = 0
        self.bytes = 0

    def write(self, place: Path, data: bytes) -> None:
        files.make_directory((self._out / place).parent)
        files.write_atomic(self._out / place, data)
        self.files += 1
        self.bytes += len(data)


def _copy_release(repository: Repository, listed: Listed, copied: _Copy) -> None:
    release = repository.release(listed)
    copied.write(repository.target_path(listed.target, listed.sha256).relative_to(repository.path), release.raw)
    for component in (*release.components, release.golden):
        for payload in (component.full, *(delta.payload for delta in component.deltas)):
            place = repository.payload_path(payload.sha256)
            data = files.read_regular(place, MAX_PAYLOAD_BYTES)
            if data is None or hashlib.sha256(data).hexdigest() != payload.sha256:
                raise PublishError(Reason.STATE_CORRUPT, f"{place} is gone or damaged", hint="restore it from a backup")
            copied.write(place.relative_to(repository.path), data)


def _copy_metadata(repository: Repository, lines: Sequence[str], copied: _Copy) -> None:
    timestamp, snapshot = repository.timestamp().signed, repository.snapshot().signed
    wanted: list[tuple[str, int | None]] = [("root", version) for version in range(1, repository.root_version() + 1)]
    for role in ("targets", *(release_role(line) for line in lines)):
        wanted.append((role, snapshot.meta[f"{role}.json"].version))
    wanted += [("snapshot", timestamp.snapshot_meta.version), ("timestamp", None)]
    for role, version in wanted:
        place = repository.metadata_path(role, version).relative_to(repository.path)
        copied.write(place, _present(repository.read_metadata(role, version), str(place)))


def _present(data: bytes | None, what: str) -> bytes:
    if data is None:
        raise PublishError(Reason.STATE_CORRUPT, f"{what} is missing in the repository", hint="restore a backup")
    return data


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or os.listdir(out)):
        raise PublishError(
            Reason.REPOSITORY_EXISTS, f"{out} exists and is not an empty directory", hint="name a new directory"
        )
