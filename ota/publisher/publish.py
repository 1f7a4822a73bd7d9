"""Signing: turns prepared releases into new metadata, and renews what is past half of its life.

Writes go in the order a client reads backwards: targets, roles, snapshot, and `timestamp.json` last, so a cut at any
point leaves either the old or the new repository. What an interrupted run left behind is written anew by the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from ota.client.limits import Limits
from ota.errors import PublishError, Reason
from ota.publisher import files
from ota.publisher.keys import release_role
from ota.publisher.repository import Repository
from ota.release import Release, target_name

ALLOW_ROLLBACK_TO = "allow_rollback_to"
_MAX_BYTES = Limits().targets_max_bytes
# of root keys, which people have to meet for
_ROOT_NOTICE = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class Published:
    """What one run signed. `roles` maps each newly signed role to its version; `waiting` has what ought to be signed
    anew by a key that is not here, by its role, with the day on which it expires; `unsigned` are releases that were not
    named and stay prepared, by line and version, with the name of the key that is not here."""

    releases: tuple[Release, ...]
    roles: dict[str, int]
    timestamp_expires: datetime
    waiting: dict[str, datetime]
    unsigned: dict[tuple[str, str], str]


def meta_file(version: int, data: bytes) -> MetaFile:
    """The entry of a metadata document in a snapshot or timestamp, with length and hash."""
    return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def publish(
    repository: Repository,
    wanted: Sequence[tuple[str, str]] | None = None,
    *,
    rekey: str | None = None,
    back_to: tuple[str, int] | None = None,
) -> Published:
    """Sign prepared releases and a new timestamp; without any prepared release the timestamp is renewed alone.

    Args:
        wanted: (line, version) pairs, or None for everything prepared whose keys are here.
        rekey: a delegated role that is to be delegated to its present key alone.
        back_to: a line with releases, and the lowest counter that its devices may go back to; 0 for none.

    Raises:
        PublishError: `unknown_release`, `key_missing`, `metadata_too_large`, `busy`, `io_error`, `no_space`.
    """
    with repository.locked():
        chosen = _choose(repository, wanted)
        pending = _Pending(repository)
        unsigned: dict[tuple[str, str], str] = {}
        for release in tuple(chosen):
            key = pending.missing_key(release)
            if key is not None and wanted is None:
                # most of all the timestamp must not wait for it
                unsigned[release.line, release.version] = key
                chosen.remove(release)
            else:
                pending.add(release)
        if rekey is not None:
            pending.rekey(rekey)
        if back_to is not None:
            pending.allow_back(*back_to)
        pending.renew()
        result = Published(tuple(chosen), pending.versions, pending.sign_and_write(), pending.waiting, unsigned)
        for release in chosen:
            discard_prepared(repository, release.line, release.version)
        return result


def discard_prepared(repository: Repository, line: str, version: str) -> None:
    """Forget that a release waits to be signed; its payloads stay."""
    path = repository.prepared_path(line, version)
    files.remove(path)
    for directory in (path.parent, path.parent.parent):
        if not any(directory.iterdir()):
            directory.rmdir()


def past_half(expires: datetime, days: int, now: datetime) -> bool:
    """Whether less than half of a life of `days` is left."""
    return expires - now < timedelta(days=days) / 2


class _Pending:
    """The next state of the repository, in memory until `sign_and_write`."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._timestamp: Metadata[Timestamp] = repository.timestamp()
        self._snapshot: Metadata[Snapshot] = repository.snapshot()
        self._targets: Metadata[Targets] = repository.targets()
        self._roles = repository.release_roles()
        self._root = repository.root().signed
        self._changed: dict[str, Metadata[Targets]] = {}
        self._snapshot_due = False
        self._target_files: dict[str, Release] = {}
        self.versions: dict[str, int] = {}
        self.waiting: dict[str, datetime] = {}

    def missing_key(self, release: Release) -> str | None:
        """The name of a key that `add` and signing would miss."""
        # a new line's own key is made on the way
        name = release_role(release.line) if release.line in self._roles else "targets"
        return None if self._repository.keys.has(name) else name

    def add(self, release: Release) -> None:
        """List `release` in its line's role; a new line is delegated first."""
        role = self._roles.get(release.line)
        if role is None:
            self._delegate(release.line)
            # version 0 is never written: _change makes it 1
            role = self._roles[release.line] = Metadata(Targets(version=1))
            role.signed.version = 0
        self._change(release_role(release.line), role, self._repository.settings.release_days)
        target = TargetFile.from_data(target_name(release.line, release.version), release.raw)
        target.unrecognized_fields["custom"] = {"release_counter": release.release_counter}
        role.signed.targets[target.path] = target
        # an order to go back meant the releases before this one
        role.signed.unrecognized_fields.pop(ALLOW_ROLLBACK_TO, None)
        self._target_files[target.path] = release

    def allow_back(self, line: str, counter: int) -> None:
        """Let devices of `line` go back to `counter`; with 0 no longer."""
        role = self._roles[line]
        self._change(release_role(line), role, self._repository.settings.release_days)
        role.signed.unrecognized_fields.pop(ALLOW_ROLLBACK_TO, None)
        if counter:
            role.signed.unrecognized_fields[ALLOW_ROLLBACK_TO] = counter

    def rekey(self, name: str) -> None:
        """Delegate the role `name` to its present key alone; `renew` then signs it anew."""
        signed = self._targets.signed
        if signed.delegations is None or name not in (signed.delegations.roles or {}):
            raise PublishError(Reason.KEY_MISSING, f"there is no role {name}", hint="name a line that has releases")
        for keyid in list((signed.delegations.roles or {})[name].keyids):
            signed.revoke_key(keyid, name)
        signed.add_key(self._repository.keys.signer(name).public_key, name)
        self._change("targets", self._targets, self._repository.settings.targets_days)

    def renew(self) -> None:
        """Mark what is past half of its life, or signed by a key that was replaced."""
        now, limits = self._repository.now(), self._repository.settings
        targets = self._targets
        if self._ages("targets", targets, limits.targets_days) or not is_signed(self._root, "targets", targets):
            self._change("targets", targets, limits.targets_days)
        for line, role in self._roles.items():
            name = release_role(line)
            if self._ages(name, role, limits.release_days) or not is_signed(targets.signed, name, role):
                self._change(name, role, limits.release_days)
        if self._root.expires - now < _ROOT_NOTICE:
            self.waiting["root"] = self._root.expires
        self._snapshot_due = past_half(self._snapshot.signed.expires, limits.snapshot_days, now) or not is_signed(
            self._root, "snapshot", self._snapshot
        )

    def _ages(self, name: str, role: Metadata[Targets], days: int) -> bool:
        """Whether to renew what is past half of its life. A key that is kept elsewhere holds up nothing else, the
        timestamp least of all: what it signed is good for the other half."""
        if name in self._changed or not past_half(role.signed.expires, days, self._repository.now()):
            return False
        if self._repository.keys.has(name):
            return True
        self.waiting[name] = role.signed.expires
        return False

    def sign_and_write(self) -> datetime:
        """Sign everything first, then write; returns when the new timestamp expires."""
        repository, limits = self._repository, self._repository.settings
        documents: list[tuple[str, int, bytes]] = []
        for name, role in self._changed.items():
            data = self._sign(name, role)
            check_size(name, len(data), _MAX_BYTES)
            documents.append((name, role.signed.version, data))
        snapshot = self._snapshot.signed
        if documents or self._snapshot_due:
            snapshot.version += 1
            snapshot.expires = repository.expiry(limits.snapshot_days)
            for name, version, data in documents:
                snapshot.meta[f"{name}.json"] = meta_file(version, data)
            data = self._sign("snapshot", self._snapshot)
            documents.append(("snapshot", snapshot.version, data))
            self._timestamp.signed.snapshot_meta = meta_file(snapshot.version, data)
        timestamp = self._timestamp.signed
        timestamp.version += 1
        timestamp.expires = repository.expiry(limits.timestamp_days)
        timestamp_bytes = self._sign("timestamp", self._timestamp)

        for path, release in self._target_files.items():
            place = repository.target_path(path, release.sha256)
            files.make_directory(place.parent)
            files.write_atomic(place, release.raw)
        for name, version, data in documents:
            files.write_atomic(repository.metadata_path(name, version), data)
        files.write_atomic(repository.metadata_path("timestamp", None), timestamp_bytes)
        self.versions |= {name: version for name, version, _ in documents} | {"timestamp": timestamp.version}
        return timestamp.expires

    def _delegate(self, line: str) -> None:
        keys, name = self._repository.keys, release_role(line)
        # an interrupted first publication has left the line's key
        key = (keys.signer(name) if keys.has(name) else keys.create_signer(name)).public_key
        delegations = self._targets.signed.delegations
        if delegations is None or delegations.roles is None:
            delegations = self._targets.signed.delegations = Delegations({}, {})
        role = DelegatedRole(name, [], 1, True, paths=[target_name(line, "*")])
        delegations.roles = {**(delegations.roles or {}), name: role}
        self._targets.signed.add_key(key, name)
        self._change("targets", self._targets, self._repository.settings.targets_days)

    def _change(self, name: str, role: Metadata[Targets], days: int) -> None:
        if name not in self._changed:
            self._changed[name] = role
            role.signed.version += 1
            role.signed.expires = self._repository.expiry(days)

    def _sign(self, name: str, metadata: _Online) -> bytes:
        metadata.sign(self._repository.keys.signer(name))
        delegator = self._targets.signed if name.startswith("release-") else self._root
        check_signed(delegator, name, metadata)
        return metadata.to_bytes()


_Online = Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]


def is_signed(delegator: Root | Targets, name: str, metadata: _Online) -> bool:
    """Whether clients that trust `delegator` would accept the signatures of `metadata`. This is about our own keys
    having changed; nothing that comes from outside is judged by it."""
    return delegator.get_verification_result(name, metadata.signed_bytes, metadata.signatures).verified


def check_size(name: str, length: int, max_bytes: int, way_out: str = "spread the releases over more lines") -> None:
    """What a device would not read is not written.

    Raises:
        PublishError: `metadata_too_large`.
    """
    if length > max_bytes:
        raise PublishError(
            Reason.METADATA_TOO_LARGE,
            f"the signed document of {name} would have {length} bytes, and a device reads {max_bytes}",
            hint=f"nothing was signed; {way_out}",
        )


def check_signed(
    delegator: Root | Targets, name: str, metadata: _Online, command: str = "edge-ota rotate REPO"
) -> None:
    """What was signed has to verify for a client, before it is written. `command` replaces keys of this repository.

    Raises:
        PublishError: `bad_signature` when the key at hand is not the one that clients know.
    """
    try:
        delegator.verify_delegate(name, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError as e:
        raise PublishError(
            Reason.BAD_SIGNATURE,
            f"key {name}.pem is not the one that clients know for the role {name}",
            hint=f"restore it; or finish an interrupted change of keys: {command} {name}",
        ) from e


def _choose(repository: Repository, wanted: Sequence[tuple[str, str]] | None) -> list[Release]:
    prepared = repository.prepared()
    if wanted is None:
        return prepared
    by_name = {(release.line, release.version): release for release in prepared}
    for line, version in wanted:
        if (line, version) not in by_name:
            known = ", ".join(f"{r.line} {r.version}" for r in prepared)
            raise PublishError(
                Reason.UNKNOWN_RELEASE,
                f"release {line} {version} is not waiting to be signed",
                hint=f"waiting: {known}" if known else "edge-ota release builds one",
            )
    return [by_name[pair] for pair in dict.fromkeys(wanted)]
