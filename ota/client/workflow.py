"""The TUF client workflow (specification 1.0, section 5) as sans-IO generators: what to ask for, what to believe.

They yield requests and effects and receive bytes; they open no file and no socket and read no clock. Signatures,
thresholds and the formats are python-tuf's (`verify`); order, floors and limits are ours. What a fleet makes of it,
one role per line and one document per device, is `trust`'s.
Invariants: every version that verified becomes a floor bound to the keys that vouched for it, so neither deleted files
nor a replay bring an older version back, and a signed rotation of those keys frees the floor again; a document is
handed out as `Trusted` as soon as it verified and before the next one is asked for; silence ends nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tuf.api.exceptions import LengthOrHashMismatchError

from ota.client.journal import Floor
from ota.client.limits import Limits
from ota.client.tufmetadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from ota.client.verify import absent, check_fresh, joined, keys_digest, load, mismatch, rollback, verify
from ota.errors import OtaError, Reason, RootUnreachable, TransferError, TrustError

_S = TypeVar("_S", Root, Timestamp, Snapshot, Targets)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FetchMetadata:
    """Wants the bytes of one document, or None when the source says that it does not exist; any other failure of the
    source is thrown into the generator. `version` is None where the file's name has none."""

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
Steps = Generator[Effect, bytes | None, _T]


@dataclass(frozen=True, slots=True)
class TopLevel:
    """Verified top-level metadata of one moment."""

    root: Root
    snapshot: Snapshot
    targets: Targets
    snapshot_keys: str


class Workflow:
    """One check of one repository.

    Args:
        stored: documents that `Trusted` made durable earlier, by role; damaged ones are fetched again.
        floors: by role, as `Trusted` gave them.
        reference: the one time at which everything is judged.
    """

    def __init__(
        self, stored: Mapping[str, bytes], floors: Mapping[str, Floor], reference: datetime.datetime, limits: Limits
    ) -> None:
        self._stored = stored
        self._floors = dict(floors)
        self._reference = reference
        self._limits = limits

    def top_level(self, pinned_root: bytes) -> Steps[TopLevel]:
        """Walk from the pinned root to the targets.

        Raises (from the generator):
            TrustError: `bad_signature`, `metadata_rollback`, `metadata_mismatch`, `metadata_too_large`, and one
                `…_expired` per role.
            OtaError: `bad_json`.
            TransferError: `not_found` for a document that must exist; `root_unreachable`; whatever was thrown in.
        """
        root = yield from self._root(pinned_root)
        timestamp = yield from self._timestamp(root)
        snapshot_keys = joined(keys_digest(root, Timestamp.type), keys_digest(root, Snapshot.type))
        snapshot = yield from self._snapshot(root, timestamp, snapshot_keys)
        targets = yield from self._targets(root, root, snapshot, snapshot_keys, Targets.type)
        return TopLevel(root, snapshot, targets, snapshot_keys)

    def delegated(self, top: TopLevel, delegator: Targets, role: str) -> Steps[Targets]:
        """The document of a role that `delegator` entrusts and the snapshot lists; raises as `top_level`."""
        return (yield from self._targets(top.root, delegator, top.snapshot, top.snapshot_keys, role))

    def find(self, top: TopLevel, path: str) -> Steps[TargetFile | None]:
        """What the first role in pre-order that lists `path` says of it (5.6.7); None when no trusted role does.

        Raises (from the generator):
            As `top_level`; `metadata_mismatch` also after `Limits.delegations` delegated roles.
        """
        pending: list[tuple[Targets, str]] = []
        visited = {Targets.type}
        targets = top.targets
        while path not in targets.targets:
            children: list[tuple[Targets, str]] = []
            if targets.delegations is not None:
                for name, terminating in targets.delegations.get_roles_for_target(path):
                    children.append((targets, name))
                    if terminating:
                        pending.clear()
                        break
            pending.extend(reversed(children))
            while pending and pending[-1][1] in visited:
                pending.pop()
            if not pending:
                return None
            if len(visited) > self._limits.delegations:
                raise mismatch(f"{path[:80]!r}: more than {self._limits.delegations} delegated roles on the way to it")
            delegator, role = pending.pop()
            visited.add(role)
            targets = yield from self.delegated(top, delegator, role)
        return targets.targets[path]

    def trusted(self, role: str, data: bytes, version: int, keys: str) -> Trusted:
        """The effect that keeps a document which verified, and its version as the floor of whoever holds `keys`."""
        floor = Floor(version, keys)
        self._floors[role] = floor
        return Trusted(role, data, floor)

    def check_floor(self, role: str, version: int, keys: str) -> None:
        """Refuse a version below the floor, as long as the same keys vouch for it.

        Raises:
            TrustError: `metadata_rollback`.
        """
        floor = self._floors.get(role)
        if floor is not None and floor.keys_sha256 == keys and version < floor.version:
            raise rollback(role, version, floor.version)

    def known(self, role: str) -> bool:
        """Whether a document of this role verified here before."""
        return role in self._floors

    # -- root, 5.3 -----------------------------------------------------------------------------------------------------

    def _root(self, pinned: bytes) -> Steps[Root]:
        limit = self._limits.root_max_bytes
        floor = self._floors[Root.type].version if Root.type in self._floors else 0
        root = load(Root, Root.type, pinned, limit)
        verify(root.signed, Root.type, root)
        root, data = self._later_root(root, pinned)
        # kept, but its floor was lost in a cut: a root that was fetched sets its floor as it comes
        floor_due = root.signed.version > floor and data is not pinned
        for _ in range(self._limits.root_rotations):
            version = root.signed.version + 1
            answer = yield from self._ask_root(version, limit)
            if answer is None:
                break
            following = load(Root, Root.type, answer, limit)
            verify(root.signed, Root.type, following)
            verify(following.signed, Root.type, following)
            if following.signed.version != version:
                raise rollback(Root.type, following.signed.version, version)
            root, data, floor_due = following, answer, False
            # a walk that starts again at the pinned root passes below the floor and must not lower it
            yield self.trusted(Root.type, data, max(version, floor), keys_digest(root.signed, Root.type))
        else:
            raise TrustError(
                Reason.METADATA_MISMATCH,
                f"more than {self._limits.root_rotations} root rotations in one check",
                hint="the repository is broken or hostile: compare its root with the operator's",
            )
        if root.signed.version < floor:
            raise rollback(Root.type, root.signed.version, floor)
        if floor_due:
            yield self.trusted(Root.type, data, root.signed.version, keys_digest(root.signed, Root.type))
        check_fresh(root.signed, Root.type, self._reference)
        return root.signed

    def _ask_root(self, version: int, limit: int) -> Steps[bytes | None]:
        try:
            return (yield FetchMetadata(Root.type, version, limit))
        except TransferError as e:
            if e.reason is not Reason.TRANSFER_TIMEOUT:
                raise
            silence = e
        try:
            yield FetchMetadata(Timestamp.type, None, self._limits.timestamp_max_bytes)
        except TransferError as e:
            if e.reason is Reason.TRANSFER_TIMEOUT:
                raise silence from e
            raise
        raise RootUnreachable(
            Reason.ROOT_UNREACHABLE,
            f"root {version} was asked for in vain while other metadata is answered",
            hint="something between here and the publisher drops these requests: check the broker, or use a stick",
            retry=True,
        ) from silence

    def _later_root(self, pinned: Metadata[Root], data: bytes) -> tuple[Metadata[Root], bytes]:
        """The stored root with its bytes, if it is whole and not older than the pinned one; else the pinned one, from
        which the walk reaches the same end."""
        stored = self._stored.get(Root.type)
        if stored is None:
            return pinned, data
        try:
            root = load(Root, "stored root", stored, self._limits.root_max_bytes)
            verify(root.signed, Root.type, root)
        except OtaError:
            return pinned, data
        return (root, stored) if root.signed.version >= pinned.signed.version else (pinned, data)

    # -- timestamp and snapshot, 5.4 and 5.5 ---------------------------------------------------------------------------

    def _timestamp(self, root: Root) -> Steps[Timestamp]:
        role, limit = Timestamp.type, self._limits.timestamp_max_bytes
        keys = keys_digest(root, role)
        data = yield FetchMetadata(role, None, limit)
        if data is None:
            raise absent(role)
        document = load(Timestamp, role, data, limit)
        verify(root, role, document)
        self.check_floor(role, document.signed.version, keys)
        kept = self._kept(Timestamp, root, role, limit)
        if kept is not None:
            kept_data, before = kept
            if before.version == document.signed.version:
                # 5.4.3.1: a version says one thing; what it said first stays
                data, document.signed = kept_data, before
            elif document.signed.version < before.version:
                raise rollback(role, document.signed.version, before.version)
            else:
                self._check_not_older(Snapshot.type, document.signed.snapshot_meta, before.snapshot_meta)
        listed = document.signed.snapshot_meta.version
        self.check_floor(Snapshot.type, listed, joined(keys, keys_digest(root, Snapshot.type)))
        check_fresh(document.signed, role, self._reference)
        yield self.trusted(role, data, document.signed.version, keys)
        return document.signed

    def _snapshot(self, root: Root, timestamp: Timestamp, keys: str) -> Steps[Snapshot]:
        kept = self._kept(Snapshot, root, Snapshot.type, self._limits.snapshot_max_bytes)

        def check(snapshot: Snapshot) -> None:
            """5.5.5; before anything is made durable."""
            targets = snapshot.meta.get(f"{Targets.type}.json")
            if targets is None:
                raise mismatch("the snapshot does not list targets")
            self.check_floor(Targets.type, targets.version, joined(keys, keys_digest(root, Targets.type)))
            for name, before in kept[1].meta.items() if kept is not None else ():
                now = snapshot.meta.get(name)
                if now is None:
                    raise mismatch(f"the snapshot no longer lists {name[:80]!r}")
                self._check_not_older(name.removesuffix(".json"), now, before)

        limit = self._limits.snapshot_max_bytes
        role, meta = Snapshot.type, timestamp.snapshot_meta
        return (yield from self._listed(Snapshot, root, root, role, meta, keys, limit, check))

    def _kept(self, kind: type[_S], root: Root, role: str, limit: int) -> tuple[bytes, _S] | None:
        """The stored document, of whatever age, if it is whole and the role's present keys signed it."""
        data = self._stored.get(role)
        if data is None:
            return None
        try:
            document = load(kind, f"stored {role}", data, limit)
            verify(root, role, document)
        except OtaError:
            return None
        return data, document.signed

    def _check_not_older(self, role: str, now: MetaFile, before: MetaFile) -> None:
        if now.version < before.version:
            raise rollback(role, now.version, before.version)

    # -- targets, 5.6 --------------------------------------------------------------------------------------------------

    def _targets(
        self, root: Root, delegator: Root | Targets, snapshot: Snapshot, snapshot_keys: str, role: str
    ) -> Steps[Targets]:
        meta = snapshot.meta.get(f"{role}.json")
        if meta is None:
            raise mismatch(f"the snapshot does not list {role[:80]!r}")
        # a rotation of the snapshot's keys frees these floors too: it is how a fast-forward is undone (5.3.11)
        keys = joined(snapshot_keys, keys_digest(delegator, role))
        limit = self._limits.targets_max_bytes
        return (yield from self._listed(Targets, root, delegator, role, meta, keys, limit, lambda _: None))

    def _listed(
        self,
        kind: type[_S],
        root: Root,
        delegator: Root | Targets,
        role: str,
        meta: MetaFile,
        keys: str,
        limit: int,
        check: Callable[[_S], None],
    ) -> Steps[_S]:
        """A document that another one lists: the stored copy if it is the listed one, else fetched."""
        self.check_floor(role, meta.version, keys)

        def judged(data: bytes) -> _S:
            signed = self._check_listed(kind, delegator, role, meta, data, limit)
            check(signed)
            return signed

        data = self._stored.get(role)
        if data is not None:
            try:
                signed = judged(data)
            except OtaError:
                data = None  # superseded, damaged or expired: the source has the listed one
        if data is None:
            data = yield FetchMetadata(role, meta.version if root.consistent_snapshot else None, limit)
            if data is None:
                raise absent(f"{role} version {meta.version}")
            signed = judged(data)
        yield self.trusted(role, data, signed.version, keys)
        return signed

    def _check_listed(
        self, kind: type[_S], delegator: Root | Targets, role: str, meta: MetaFile, data: bytes, limit: int
    ) -> _S:
        try:
            meta.verify_length_and_hashes(data)
        except LengthOrHashMismatchError as e:
            raise mismatch(f"{role} is not the document that was listed: {e}") from e
        document = load(kind, role, data, limit)
        verify(delegator, role, document)
        if document.signed.version != meta.version:
            raise mismatch(f"{role} has version {document.signed.version}, {meta.version} is listed")
        check_fresh(document.signed, role, self._reference)
        return document.signed
