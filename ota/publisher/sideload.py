"""A stick: what one device needs for the releases it is granted, as a directory or a stored zip.

It holds signed metadata and sealed payloads alone: no key, nothing of the vault, no other device's document. All
roots are in it, so that a device that was away for years can follow them. A device that pins the root of the sticks
gets long-lived metadata of that repository (`sticks`); one enrolled before gets the fleet's own, which is short-lived.
Names are lower-case, short and unlike each other, files are smaller than 4 GiB and none is a link: FAT takes them all.
Invariant: `timestamp.json`, or the end of the zip, is written last, so what was cut short is no repository.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from tuf.api.metadata import Targets

from ota.errors import PublishError, Reason
from ota.publisher import director, files, sticks
from ota.publisher.enroll import load_device, revoked_error
from ota.publisher.keys import release_role
from ota.publisher.publish import publish
from ota.publisher.repository import Listed, Repository, load_metadata
from ota.release import MAX_PAYLOAD_BYTES

ZIP_SUFFIX = ".zip"


@dataclass(frozen=True, slots=True)
class Sideload:
    """What was written; a device takes it until `expires`, judged by its own clock. `own_root` tells whether it is
    signed for sticks, or with the fleet's short-lived metadata."""

    device: str
    releases: tuple[Listed, ...]
    files: int
    bytes: int
    expires: datetime
    own_root: bool


@dataclass(frozen=True, slots=True)
class _Metadata:
    """Signed documents by place below the stick's root, `timestamp.json` last, and when the first of them expires."""

    documents: dict[str, bytes]
    expires: datetime


def write_sideload(repository: Repository, device: str, out: Path) -> Sideload:
    """Write the stick of `device` after renewing what it contains: to the directory `out`, absent or empty, or to the
    zip file `out` if it ends in `.zip`.

    Raises:
        PublishError: `unknown_device`, `device_revoked`; `unknown_release` when nothing was granted to it;
            `repository_exists` when `out` is taken; `unsupported` for a zip above 2 GiB; `key_missing`, `busy`,
            `io_error`, `no_space`.
    """
    enrolled = load_device(repository, device)
    _refuse_used(out, device)
    if enrolled.revoked:
        raise revoked_error(enrolled)
    releases = director.desired_releases(repository, device)
    if not releases:
        raise PublishError(
            Reason.UNKNOWN_RELEASE,
            f"nothing was granted to {device}",
            hint=f"edge-ota grant {repository.path} {device} LINE VERSION",
        )
    publish(repository, [])
    own = sticks.pinned(repository, device)
    metadata = (
        _own_metadata(repository, own, device, releases) if own else _fleet_metadata(repository, device, releases)
    )
    with _zip(out) if out.suffix == ZIP_SUFFIX else _directory(out) as put:
        counted = _Counted(put)
        for listed in releases:
            _copy_release(repository, listed, counted)
        for place, data in metadata.documents.items():
            counted.put(place, data)
    return Sideload(device, tuple(releases), counted.files, counted.bytes, metadata.expires, own is not None)


class _Put(Protocol):
    def __call__(self, place: str, data: bytes) -> None:
        """Write `data` at `place`, which is new."""


class _Counted:
    """Counts what is put; payloads that two releases share are put once."""

    def __init__(self, put: _Put) -> None:
        self._put = put
        self._places: set[str] = set()
        self.bytes = 0

    @property
    def files(self) -> int:
        return len(self._places)

    def put(self, place: str, data: bytes) -> None:
        if place not in self._places:
            self._put(place, data)
            self._places.add(place)
            self.bytes += len(data)


@contextmanager
def _directory(out: Path) -> Iterator[_Put]:
    """A directory. What fails half-way is taken back: the same command can be given again."""
    written: list[Path] = []

    def put(place: str, data: bytes) -> None:
        files.write_new(out / place, data)
        written.append(out / place)

    try:
        yield put
    except BaseException:
        files.take_back(written, out)
        raise


@contextmanager
def _zip(out: Path) -> Iterator[_Put]:
    """A zip as `ota.client.transports.zip` reads it: stored, no zip64, no dates, in the order of writing."""
    try:
        with files.new_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:

            def put(place: str, data: bytes) -> None:
                entry = zipfile.ZipInfo(place)
                entry.external_attr = (stat.S_IFREG | files.PUBLIC_MODE) << 16
                archive.writestr(entry, data)

            yield put
    except zipfile.LargeZipFile as e:
        raise PublishError(
            Reason.UNSUPPORTED, f"{out} would be larger than 2 GiB", hint="name a directory instead"
        ) from e


def _own_metadata(repository: Repository, own: Repository, device: str, releases: list[Listed]) -> _Metadata:
    """Of the repository of sticks; the release roles are the fleet's own files."""
    with repository.locked():
        renewed = sticks.renew(repository, own)
        enrolled = load_device(repository, device)
        grants: dict[str, object] = {}
        for listed in releases:
            grants |= director.grants_for(repository, enrolled, repository.release(listed))
        desired = sticks.sign_desired(repository, own, device, releases, grants)
        documents = {f"devices/{device}/desired.json": desired}
        lines = [renewed.releases[listed.line] for listed in releases]
        # under the lock: the next stick's timestamp takes the place of this one's, and `garbage` what that overtook
        for source, names in ((repository, lines), (own, renewed.files)):
            for name in names:
                data = files.read_regular(source.path / "metadata" / name, MAX_PAYLOAD_BYTES)
                documents[f"metadata/{name}"] = _present(data, name)
    return _Metadata(documents, renewed.expires)


def _fleet_metadata(repository: Repository, device: str, releases: list[Listed]) -> _Metadata:
    """The fleet's own, byte for byte as devices get it online."""
    director.renew(repository, only=device)
    desired = _present(repository.read_desired(device), "desired.json")
    documents = {f"devices/{device}/desired.json": desired}
    timestamp, snapshot = repository.timestamp().signed, repository.snapshot().signed
    wanted: list[tuple[str, int | None]] = [("root", version) for version in range(1, repository.root_version() + 1)]
    for role in ("targets", *(release_role(listed.line) for listed in releases)):
        wanted.append((role, snapshot.meta[f"{role}.json"].version))
    wanted += [("snapshot", timestamp.snapshot_meta.version), ("timestamp", None)]
    for role, version in wanted:
        name = repository.metadata_path(role, version).name
        documents[f"metadata/{name}"] = _present(repository.read_metadata(role, version), name)
    expires = min(load_metadata(desired, "desired.json", Targets).signed.expires, timestamp.expires, snapshot.expires)
    return _Metadata(documents, expires)


def _copy_release(repository: Repository, listed: Listed, counted: _Counted) -> None:
    release = repository.release(listed)
    place = repository.target_path(listed.target, listed.sha256).relative_to(repository.path)
    counted.put(place.as_posix(), release.raw)
    for component in (*release.components, release.golden):
        for payload in (component.full, *(delta.payload for delta in component.deltas)):
            source = repository.payload_path(payload.sha256)
            data = files.read_regular(source, MAX_PAYLOAD_BYTES)
            if data is None or hashlib.sha256(data).hexdigest() != payload.sha256:
                raise PublishError(
                    Reason.STATE_CORRUPT, f"{source} is gone or damaged", hint="restore it from a backup"
                )
            counted.put(source.relative_to(repository.path).as_posix(), data)


def _present(data: bytes | None, what: str) -> bytes:
    if data is None:
        raise PublishError(Reason.STATE_CORRUPT, f"{what} is missing in the repository", hint="restore a backup")
    return data


def _refuse_used(out: Path, device: str) -> None:
    if os.path.lexists(out) and (out.suffix == ZIP_SUFFIX or not out.is_dir() or os.listdir(out)):
        raise PublishError(
            Reason.REPOSITORY_EXISTS,
            f"{out} exists and is not an empty directory",
            hint=f"name a new one, such as {out / device if out.is_dir() else out.with_name(f'{device}{out.suffix}')}",
        )
