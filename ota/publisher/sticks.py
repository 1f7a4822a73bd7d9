"""The repository of sticks: a TUF repository of its own for what travels by hand, below `sticks/` of the fleet's.

A stick may lie in a drawer for months, so its timestamp, snapshot and `desired.json` live `stick_days`, far longer than
the online ones. That must not weaken what is online: root, targets, snapshot, timestamp and director have keys of their
own here, devices pin this root beside the other one, and their floors are kept apart. The documents of the release
roles are the online ones, byte for byte, signed by the same keys, so a stick can carry nothing that was not released.
Not here: what goes onto one stick (`sideload`), releases and their roles (`publish`).
Invariants: nothing here is ever served online, nothing online is signed by a key of this repository; all writes happen
under the lock of the fleet's repository; `timestamp.json` is written last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import DelegatedRole, Delegations, Key, Metadata, TargetFile, Targets

from ota import strictjson
from ota.errors import PublishError, Reason
from ota.publisher import files
from ota.publisher.create import sign_first
from ota.publisher.keys import ROOT_KEYS, release_role
from ota.publisher.publish import check_signed, is_signed, meta_file
from ota.publisher.repository import Listed, Repository

FOLDER = "sticks"
SIGNERS = (*ROOT_KEYS, "targets", "snapshot", "timestamp", "director")
_DIRECTOR = "director"
_ROTATE = "edge-ota sticks REPO --rotate"
_MAX_RECORD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Renewed:
    """Metadata for a stick made now: names of its files in `sticks/metadata`, `timestamp.json` last; by line the file
    in the fleet's own `metadata/`; and when the first of them expires."""

    files: tuple[str, ...]
    releases: Mapping[str, str]
    expires: datetime


def opened(repository: Repository) -> Repository | None:
    """The repository of sticks, or None for a fleet that has none."""
    made = _beside(repository)
    return made if made.metadata_path("timestamp", None).is_file() else None


def create(repository: Repository) -> Repository:
    """Make the repository of sticks with new keys; one that is there stays. The caller holds the lock.

    Raises:
        PublishError: `io_error`, `no_space`, `unsafe_file`.
    """
    found = opened(repository)
    if found is not None:
        return found
    made = _beside(repository)
    for name in ("", "metadata", "devices"):
        files.make_directory(made.path / name)
    files.make_directory(made.keys.directory, files.SECRET_DIRECTORY_MODE)
    for name in SIGNERS:
        if not made.keys.has(name):  # an interrupted run left some
            made.keys.create_signer(name)
    sign_first(made)
    return made


def pin(repository: Repository, device: str) -> str | None:
    """The root that `device` is to pin for sticks, noted as pinned; None for a fleet without sticks. The caller holds
    the lock.

    Raises:
        PublishError: `state_corrupt`, `io_error`, `no_space`.
    """
    sticks = opened(repository)
    if sticks is None:
        return None
    root = sticks.read_metadata("root", sticks.root_version())
    if root is None:
        raise PublishError(Reason.STATE_CORRUPT, "the root of the sticks cannot be read", hint="restore a backup")
    _store_version(sticks, device, _version(sticks, device) or 0)
    return root.decode()


def pinned(repository: Repository, device: str) -> Repository | None:
    """The repository of sticks when `device` pins its root, else None: that device trusts the fleet's root alone."""
    sticks = opened(repository)
    return sticks if sticks is not None and _version(sticks, device) is not None else None


def renew(repository: Repository, sticks: Repository) -> Renewed:
    """Sign targets (when the fleet's lines or keys changed, or they get old), snapshot and timestamp for a new stick.
    The caller holds the lock and has renewed the fleet's own metadata.

    Raises:
        PublishError: `key_missing`, `bad_signature`, `io_error`, `no_space`.
    """
    fleet = repository.snapshot().signed.meta
    listed = {name: meta for name, meta in fleet.items() if name.startswith("release-")}
    root, targets = sticks.root().signed, sticks.targets()
    wanted = _delegations(repository, sticks)
    horizon = sticks.expiry(sticks.settings.timestamp_days)
    known = targets.signed.delegations
    # a key that lies elsewhere as it may is missed only when there is no other way
    at_hand = sticks.keys.has("targets")
    aged = targets.signed.expires < (horizon if at_hand else sticks.now())
    if aged or not is_signed(root, "targets", targets) or known is None or known.to_dict() != wanted.to_dict():
        targets.signed.delegations = wanted
        targets.signed.version += 1
        targets.signed.expires = sticks.expiry(sticks.settings.targets_days)
        targets.sign(sticks.keys.signer("targets"))
        check_signed(root, "targets", targets, _ROTATE)
    targets_bytes = targets.to_bytes()

    snapshot, timestamp = sticks.snapshot(), sticks.timestamp()
    snapshot.signed.meta = {"targets.json": meta_file(targets.signed.version, targets_bytes), **listed}
    for metadata, name in ((snapshot, "snapshot"), (timestamp, "timestamp")):
        metadata.signed.version += 1
        metadata.signed.expires = horizon
        if name == "timestamp":
            timestamp.signed.snapshot_meta = meta_file(snapshot.signed.version, snapshot.to_bytes())
        metadata.sign(sticks.keys.signer(name))
        check_signed(root, name, metadata, _ROTATE)
    places = {
        sticks.metadata_path("targets", targets.signed.version): targets_bytes,
        sticks.metadata_path("snapshot", snapshot.signed.version): snapshot.to_bytes(),
        sticks.metadata_path("timestamp", None): timestamp.to_bytes(),
    }
    for place, data in places.items():
        files.write_atomic(place, data)
    roots = [f"{version}.root.json" for version in range(1, sticks.root_version() + 1)]
    lines = repository.release_roles()
    return Renewed(
        (*roots, *(place.name for place in places)),
        {line: f"{role.signed.version}.{release_role(line)}.json" for line, role in lines.items()},
        min([horizon, targets.signed.expires, root.expires, *(role.signed.expires for role in lines.values())]),
    )


def sign_desired(
    repository: Repository, sticks: Repository, device: str, releases: list[Listed], grants: Mapping[str, Any]
) -> bytes:
    """The document of `device` for its sticks. The caller holds the lock.

    Raises:
        PublishError: `key_missing`, `bad_signature`, `state_corrupt`, `io_error`, `no_space`.
    """
    version = (_version(sticks, device) or 0) + 1
    document = Targets(
        version=version,
        expires=sticks.expiry(sticks.settings.desired_days),
        targets={
            listed.target: TargetFile(listed.length, {"sha256": listed.sha256}, listed.target) for listed in releases
        },
        unrecognized_fields={"device": device, "grants": dict(grants)},
    )
    metadata = Metadata(document)
    metadata.sign(sticks.keys.signer(_DIRECTOR))
    check_signed(sticks.targets().signed, _DIRECTOR, metadata, _ROTATE)
    # first: a lost document must not start again at a version that its device refuses as a rollback
    _store_version(sticks, device, version)
    data = metadata.to_bytes()
    files.write_atomic(sticks.desired_path(device), data)
    return data


def _beside(repository: Repository) -> Repository:
    days = repository.settings.stick_days
    limits = replace(repository.settings, timestamp_days=days, snapshot_days=days, desired_days=days)
    return Repository(repository.path / FOLDER, limits, repository.now)


def _delegations(repository: Repository, sticks: Repository) -> Delegations:
    """The fleet's delegations of its lines, and a director of our own."""
    director = sticks.keys.signer(_DIRECTOR).public_key
    keys: dict[str, Key] = {director.keyid: director}
    roles = {_DIRECTOR: DelegatedRole(_DIRECTOR, [director.keyid], 1, True, paths=["devices/*"])}
    fleet = repository.targets().signed.delegations
    for line in repository.release_roles():
        name = release_role(line)
        if fleet is None or fleet.roles is None:
            raise PublishError(Reason.STATE_CORRUPT, f"nobody is entrusted with {name}", hint="restore a backup")
        roles[name] = fleet.roles[name]
        keys |= {keyid: fleet.keys[keyid] for keyid in fleet.roles[name].keyids}
    return Delegations(keys, roles)


def _record_path(sticks: Repository, device: str) -> Path:
    return sticks.device_path(device) / "stick.json"


def _version(sticks: Repository, device: str) -> int | None:
    """Version of the device's last document here, 0 before the first, None for one that does not pin this root."""
    place = _record_path(sticks, device)
    data = files.read_regular(place, _MAX_RECORD_BYTES)
    if data is None:
        return None
    record = strictjson.loads(data, max_bytes=_MAX_RECORD_BYTES, what=str(place))
    try:
        return int(record["desired_version"])
    except (KeyError, TypeError, ValueError) as e:
        raise PublishError(Reason.STATE_CORRUPT, f"{place} is not understood: {e!r}", hint="restore it") from e


def _store_version(sticks: Repository, device: str, version: int) -> None:
    place = _record_path(sticks, device)
    files.make_directory(place.parent)
    files.write_atomic(place, strictjson.canonical({"desired_version": version, "version": 1}) + b"\n")
