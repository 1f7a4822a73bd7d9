"""The TUF client workflow as a sans-IO generator: which metadata to ask for, whether to believe it, what it assigns.

It yields requests and effects and receives bytes; it opens no file and no socket and reads no clock. Signatures,
thresholds and the metadata formats are python-tuf's; order, floors and limits are ours (TUF specification 1.0, section
5, with one delegated role per line and one `director` document per device outside the snapshot).
Invariants: no byte is parsed by python-tuf before `strictjson` has read it; every version that verified becomes a floor
bound to the role's keys, so neither deleted files nor a replay bring an older version back, and a signed rotation of
the keys frees the floor again; a release counts as assigned only if the line's own release role lists the same hash.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tuf.api.exceptions import LengthOrHashMismatchError, RepositoryError, UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from ota import strictjson
from ota.client.desired import Assignment, Desired, parse_grants, split_path
from ota.client.journal import Floor
from ota.client.limits import Limits
from ota.errors import OtaError, Reason, TransferError, TrustError
from ota.release import MAX_RELEASE_BYTES

MAX_ASSIGNMENTS = 64
_MAX_VERSION = 1 << 53
_DIRECTOR = "director"
_S = TypeVar("_S", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, slots=True)
class FetchMetadata:
    """Wants the bytes of one document, or None when the source says that it does not exist."""

    role: str
    version: int | None
    max_bytes: int


@dataclass(frozen=True, slots=True)
class FetchDesired:
    """Wants the bytes of this device's desired.json, or None when the source says that there is none."""

    max_bytes: int


@dataclass(frozen=True, slots=True)
class Trusted:
    """Effect: `data` verified as `role`; make it and its floor durable before going on. Answer with None."""

    role: str
    data: bytes
    floor: Floor


Effect = FetchMetadata | FetchDesired | Trusted
Refresh = Generator[Effect, bytes | None, Desired]


def refresh(
    pinned_root: bytes,
    stored: Mapping[str, bytes],
    floors: Mapping[str, Floor],
    device: str,
    reference: datetime.datetime,
    limits: Limits,
) -> Refresh:
    """Walk from the trusted root to this device's assignments.

    Args:
        pinned_root: root metadata that enrolment wrote.
        stored: documents that `Trusted` made durable earlier, by role; damaged ones are fetched again.
        floors: by role, as `Trusted` gave them.
        device: this device's id.
        reference: the one time at which everything is judged.

    Raises (from the generator):
        TrustError: `bad_signature`, `metadata_expired`, `metadata_rollback`, `metadata_mismatch`,
            `not_for_this_device`.
        OtaError: `bad_json`.
        TransferError: `not_found` for a document that must exist.
    """
    return _Walk(floors, reference, limits).run(pinned_root, stored, device)


class _Walk:
    def __init__(self, floors: Mapping[str, Floor], reference: datetime.datetime, limits: Limits) -> None:
        self._floors = dict(floors)
        self._reference = reference
        self._limits = limits

    def run(self, pinned_root: bytes, stored: Mapping[str, bytes], device: str) -> Refresh:
        root = yield from self._root(pinned_root, stored.get(Root.type))
        timestamp = yield from self._timestamp(root)
        snapshot = yield from self._snapshot(root, timestamp, stored.get(Snapshot.type))
        targets = yield from self._delegated(root, snapshot, Targets.type, stored.get(Targets.type))
        data = yield FetchDesired(self._limits.desired_max_bytes)
        if data is None:
            if _DIRECTOR in self._floors:
                raise _absent("desired.json of this device, which existed before,")
            return Desired()
        return (yield from self._desired(targets, snapshot, data, stored, device))

    def _root(self, pinned: bytes, stored: bytes | None) -> Generator[Effect, bytes | None, Root]:
        limit = self._limits.root_max_bytes
        floor = self._floors["root"].version if "root" in self._floors else 0
        root = _load(Root, "root", pinned, limit)
        _verify(root.signed, "root", root)
        if stored is not None:
            root = _later_root(root, stored, limit)
        for _ in range(self._limits.root_rotations):
            version = root.signed.version + 1
            data = yield FetchMetadata("root", version, limit)
            if data is None:
                break
            following = _load(Root, "root", data, limit)
            _verify(root.signed, "root", following)
            _verify(following.signed, "root", following)
            if following.signed.version != version:
                raise _rollback("root", following.signed.version, version)
            root = following
            # a walk that starts again at the pinned root passes below the floor and must not lower it
            yield self._trusted(root.signed, "root", data, max(version, floor))
        else:
            raise TrustError(
                Reason.METADATA_MISMATCH,
                f"more than {self._limits.root_rotations} root rotations in one check",
                hint="the repository is broken or hostile: compare its root with the operator's",
            )
        if root.signed.version < floor:
            raise _rollback("root", root.signed.version, floor)
        self._fresh(root.signed, "root")
        return root.signed

    def _timestamp(self, root: Root) -> Generator[Effect, bytes | None, Timestamp]:
        limit = self._limits.timestamp_max_bytes
        data = yield FetchMetadata("timestamp", None, limit)
        if data is None:
            raise _absent("timestamp")
        document = _load(Timestamp, "timestamp", data, limit)
        _verify(root, "timestamp", document)
        timestamp = document.signed
        self._not_older(root, "timestamp", timestamp.version)
        self._fresh(timestamp, "timestamp")
        self._not_older(root, "snapshot", timestamp.snapshot_meta.version)
        yield self._trusted(root, "timestamp", data, timestamp.version)
        return timestamp

    def _snapshot(
        self, root: Root, timestamp: Timestamp, stored: bytes | None
    ) -> Generator[Effect, bytes | None, Snapshot]:
        meta = timestamp.snapshot_meta
        document = yield from self._listed(Snapshot, root, "snapshot", meta, stored, self._limits.snapshot_max_bytes)
        return document.signed

    def _delegated(
        self, delegator: Root | Targets, snapshot: Snapshot, role: str, stored: bytes | None
    ) -> Generator[Effect, bytes | None, Targets]:
        meta = snapshot.meta.get(f"{role}.json")
        if meta is None:
            raise _mismatch(f"the snapshot does not list {role}")
        document = yield from self._listed(Targets, delegator, role, meta, stored, self._limits.targets_max_bytes)
        return document.signed

    def _listed(
        self,
        kind: type[_S],
        delegator: Root | Targets,
        role: str,
        meta: MetaFile,
        stored: bytes | None,
        limit: int,
    ) -> Generator[Effect, bytes | None, Metadata[_S]]:
        """A document that another one lists: the stored copy if it is the listed one, else fetched."""
        self._not_older(delegator, role, meta.version)
        if stored is not None:
            try:
                return self._check_listed(kind, delegator, role, meta, stored, limit)
            except OtaError:
                pass  # superseded, damaged or expired: the source has the listed one
        data = yield FetchMetadata(role, meta.version, limit)
        if data is None:
            raise _absent(f"{role} version {meta.version}")
        document = self._check_listed(kind, delegator, role, meta, data, limit)
        yield self._trusted(delegator, role, data, document.signed.version)
        return document

    def _check_listed(
        self, kind: type[_S], delegator: Root | Targets, role: str, meta: MetaFile, data: bytes, limit: int
    ) -> Metadata[_S]:
        try:
            meta.verify_length_and_hashes(data)
        except LengthOrHashMismatchError as e:
            raise _mismatch(f"{role} is not the document that was listed: {e}") from e
        document = _load(kind, role, data, limit)
        _verify(delegator, role, document)
        if document.signed.version != meta.version:
            raise _mismatch(f"{role} has version {document.signed.version}, {meta.version} is listed")
        self._fresh(document.signed, role)
        return document

    def _desired(
        self, targets: Targets, snapshot: Snapshot, data: bytes, stored: Mapping[str, bytes], device: str
    ) -> Refresh:
        document = _load(Targets, "desired.json", data, self._limits.desired_max_bytes)
        _verify(targets, _DIRECTOR, document, what="desired.json")
        signed = document.signed
        named = signed.unrecognized_fields.get("device")
        if named != device:
            raise TrustError(
                Reason.NOT_FOR_THIS_DEVICE,
                f"desired.json names device {str(named)[:60]!r}, this one is {device!r}",
                hint="look at the topic or folder that it was put into",
            )
        self._not_older(targets, _DIRECTOR, signed.version)
        self._fresh(signed, "desired.json")
        grants = parse_grants(signed.unrecognized_fields.get("grants", {}))
        yield self._trusted(targets, _DIRECTOR, data, signed.version)
        if len(signed.targets) > MAX_ASSIGNMENTS:
            raise _mismatch(f"desired.json assigns more than {MAX_ASSIGNMENTS} releases")
        assignments: dict[str, Assignment] = {}
        refused: dict[str, OtaError] = {}
        for path, wanted in signed.targets.items():
            line, version = split_path(path)
            if line in assignments or line in refused:
                raise _mismatch(f"desired.json assigns two releases of line {line}")
            role = f"release-{line}"
            try:
                listing = yield from self._delegated(targets, snapshot, role, stored.get(role))
                assignments[line] = _agreed(targets, listing, role, path, wanted, line, version)
            except TransferError as e:
                if e.reason is not Reason.NOT_FOUND:
                    raise
                refused[line] = e
            except OtaError as e:
                refused[line] = e
        return Desired(assignments, refused, grants)

    def _trusted(self, delegator: Root | Targets, role: str, data: bytes, version: int) -> Trusted:
        floor = Floor(version, _keys_digest(delegator, role))
        self._floors[role] = floor
        return Trusted(role, data, floor)

    def _not_older(self, delegator: Root | Targets, role: str, version: int) -> None:
        floor = self._floors.get(role)
        if floor is not None and floor.keys_sha256 == _keys_digest(delegator, role) and version < floor.version:
            raise _rollback(role, version, floor.version)

    def _fresh(self, signed: Signed, what: str) -> None:
        if signed.is_expired(self._reference):
            raise TrustError(
                Reason.METADATA_EXPIRED,
                f"{what} expired at {signed.expires:%Y-%m-%dT%H:%M:%SZ}",
                hint="the operator must sign it anew; also check this device's clock",
                retry=True,
            )


def _load(kind: type[_S], what: str, data: bytes, limit: int) -> Metadata[_S]:
    if len(data) > limit:
        raise TrustError(Reason.METADATA_TOO_LARGE, f"{what}: {len(data)} bytes, more than the {limit} allowed")
    value = strictjson.loads(data, max_bytes=limit, what=what)
    _check_shape(value, what)
    try:
        document = Metadata.from_bytes(data)
    except RepositoryError as e:
        raise OtaError(Reason.BAD_JSON, f"{what}: {e}", hint="it was not made by edge-ota") from e
    if not isinstance(document.signed, kind):
        raise _mismatch(f"{what}: a {document.signed.type} document in its place")
    return document


def _check_shape(value: Any, what: str) -> None:
    """Types that python-tuf would take over unchecked from the JSON and compare later."""
    signed = value.get("signed") if isinstance(value, dict) else None
    version = signed.get("version") if isinstance(signed, dict) else None
    if type(version) is not int or not 1 <= version < _MAX_VERSION:
        raise OtaError(Reason.BAD_JSON, f"{what}: version {str(version)[:40]!r} is not a positive integer")


def _verify(delegator: Root | Targets, role: str, document: Metadata[Any], what: str = "") -> None:
    what = what or role
    _keys_digest(delegator, role)
    try:
        delegator.verify_delegate(role, document.signed_bytes, document.signatures)
    except UnsignedMetadataError as e:
        raise TrustError(
            Reason.BAD_SIGNATURE,
            f"{what}: {e}",
            hint="somebody else signed it, or its keys were rotated without a new root",
        ) from e
    except RepositoryError as e:
        # floats, for one, have no canonical form, so nobody can have signed them
        raise OtaError(Reason.BAD_JSON, f"{what} has no canonical form", hint="it was not made by edge-ota") from e


def _keys_digest(delegator: Root | Targets, role: str) -> str:
    """One value per set of keys, in which a key under two ids counts as the forgery of a threshold that it is."""
    try:
        delegation = delegator.get_delegated_role(role)
        keys = [delegator.get_key(keyid) for keyid in delegation.keyids]
    except ValueError as e:
        raise _mismatch(f"nobody is entrusted with {role}: {e}") from e
    public = sorted(str(key.keyval.get("public", "")) for key in keys)
    if len(set(public)) != len(public):
        raise TrustError(Reason.BAD_SIGNATURE, f"{role}: one key stands under two key ids")
    return hashlib.sha256("\0".join([str(delegation.threshold), *public]).encode()).hexdigest()


def _later_root(pinned: Metadata[Root], stored: bytes, limit: int) -> Metadata[Root]:
    """The stored root, if it is whole and not older than the pinned one; else the pinned one, from which the walk
    reaches the same end."""
    try:
        root = _load(Root, "stored root", stored, limit)
        _verify(root.signed, "root", root)
    except OtaError:
        return pinned
    return root if root.signed.version >= pinned.signed.version else pinned


def _agreed(
    targets: Targets, listing: Targets, role: str, path: str, wanted: TargetFile, line: str, version: str
) -> Assignment:
    delegation = targets.get_delegated_role(role)
    known = listing.targets.get(path)
    allowed = isinstance(delegation, DelegatedRole) and delegation.is_delegated_path(path)
    if known is None or not allowed:
        raise _mismatch(f"{path} is assigned, but {role} does not list it")
    sha256 = known.hashes.get("sha256")
    if sha256 is None or known.length != wanted.length or wanted.hashes.get("sha256") != sha256:
        raise _mismatch(f"{path} is assigned with another hash or length than {role} signs")
    if known.length > MAX_RELEASE_BYTES:
        raise TrustError(Reason.METADATA_TOO_LARGE, f"{path} has {known.length} bytes")
    return Assignment(line, version, path, known.length, sha256, listing.expires)


def _rollback(role: str, version: int, floor: int) -> TrustError:
    return TrustError(
        Reason.METADATA_ROLLBACK,
        f"{role} version {version} where {floor} was due",
        hint="an old copy was replayed, or the repository was restored from a backup: publish again",
    )


def _mismatch(message: str) -> TrustError:
    return TrustError(Reason.METADATA_MISMATCH, message, hint="the repository is inconsistent: publish again")


def _absent(what: str) -> TransferError:
    return TransferError(Reason.NOT_FOUND, f"{what} is not at the source", hint="publish it", retry=True)
