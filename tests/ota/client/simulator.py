"""A publisher in memory that signs good metadata, and on demand bad metadata that a real one never would.

Documents are kept as bytes under the names a transport asks for, so a test can replay, swap, delete or edit any of them
before, between and during updates. Layout and roles are those of FORMAT.md.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from securesystemslib.signer import CryptoSigner
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

from ota import delta, payload
from ota.errors import Reason, TransferError
from ota.release import Component, Delta, Payload, component_to_json, target_name

NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
LATER = NOW + datetime.timedelta(days=30)
PAST = NOW - datetime.timedelta(days=1)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def kid_of(key: X25519PrivateKey) -> str:
    return sha256(key.public_key().public_bytes_raw())[:16]


@dataclass
class Built:
    """One release: its bytes, its content keys by id, its plaintexts by component."""

    line: str
    version: str
    counter: int
    data: bytes
    ceks: dict[str, bytes]
    plain: dict[str, bytes]

    @property
    def path(self) -> str:
        return target_name(self.line, self.version)


@dataclass
class Simulator:
    """A repository. `documents` is what transports serve: ("root", 1) etc. to bytes."""

    documents: dict[tuple[str, int | None], bytes] = field(default_factory=dict)
    desired: dict[str, bytes] = field(default_factory=dict)
    targets: dict[str, bytes] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    built: dict[tuple[str, str], Built] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.signers = {
            role: CryptoSigner.generate_ed25519() for role in ("targets", "snapshot", "timestamp", "director")
        }
        self.root_signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
        self.root = Metadata(Root(version=1, expires=LATER, consistent_snapshot=True))
        for signer in self.root_signers:
            self.root.signed.add_key(signer.public_key, "root")
        self.root.signed.roles["root"].threshold = 2
        for role in ("targets", "snapshot", "timestamp"):
            self.root.signed.add_key(self.signers[role].public_key, role)
        director = self.signers["director"].public_key
        self.top = Metadata(
            Targets(
                version=1,
                expires=LATER,
                delegations=Delegations(
                    {director.keyid: director},
                    {"director": DelegatedRole("director", [director.keyid], 1, True, paths=["devices/*"])},
                ),
            )
        )
        self.roles: dict[str, Metadata[Targets]] = {}
        self.snapshot = Metadata(Snapshot(version=1, expires=LATER))
        self.timestamp = Metadata(Timestamp(version=1, expires=LATER))
        self.versions = {"director": 0}
        self.sign_root()
        self.publish()

    # -- signing -------------------------------------------------------------------------------------------------------

    def sign_root(self, *extra: CryptoSigner) -> None:
        """Sign the root as it is, with its first two keys and `extra`, under its version."""
        self.root.signatures.clear()
        for signer in (*self.root_signers[:2], *extra):
            self.root.sign(signer, append=True)
        self.documents["root", self.root.signed.version] = self.root.to_bytes()

    def next_root(self) -> None:
        """A further root version, otherwise the same."""
        self.root.signed.version += 1
        self.sign_root()

    def rotate(self, role: str) -> None:
        """New key for a role of the root."""
        old, new = self.signers[role], CryptoSigner.generate_ed25519()
        self.root.signed.revoke_key(old.public_key.keyid, role)
        self.root.signed.add_key(new.public_key, role)
        self.signers[role] = new
        self.next_root()

    def publish(self) -> None:
        """Sign targets, all release roles, snapshot and timestamp anew, each one version higher."""
        listed = {"targets": (self.top, self.signers["targets"])}
        listed |= {role: (document, self.signers[role]) for role, document in self.roles.items()}
        self.snapshot.signed.meta = {}
        for role, (document, signer) in listed.items():
            document.signed.version = self.versions[role] = self.versions.get(role, 0) + 1
            document.sign(signer)
            data = document.to_bytes()
            self.documents[role, document.signed.version] = data
            self.snapshot.signed.meta[f"{role}.json"] = MetaFile(
                document.signed.version, len(data), {"sha256": sha256(data)}
            )
        self.sign_snapshot()

    def sign_snapshot(self) -> None:
        self.snapshot.signed.version = self.versions["snapshot"] = self.versions.get("snapshot", 0) + 1
        self.snapshot.sign(self.signers["snapshot"])
        data = self.snapshot.to_bytes()
        self.documents["snapshot", self.snapshot.signed.version] = data
        self.timestamp.signed.snapshot_meta = MetaFile(
            self.snapshot.signed.version, len(data), {"sha256": sha256(data)}
        )
        self.sign_timestamp()

    def sign_timestamp(self) -> None:
        self.timestamp.signed.version = self.versions["timestamp"] = self.versions.get("timestamp", 0) + 1
        self.timestamp.sign(self.signers["timestamp"])
        self.documents["timestamp", None] = self.timestamp.to_bytes()

    # -- releases ------------------------------------------------------------------------------------------------------

    def build(
        self,
        line: str,
        version: str,
        models: Mapping[str, bytes],
        golden: bytes,
        *,
        counter: int | None = None,
        codec: str = "zstd",
        bases: Sequence[Built] = (),
        edit: Callable[[dict[str, Any]], None] | None = None,
        tamper: Callable[[str, str, bytes], bytes] | None = None,
    ) -> Built:
        """Seal and list a release. `tamper(component, kind, plain)` changes what is sealed, after it was signed;
        `edit` changes release.json before it is signed."""
        release = Built(line, version, counter or self._next_counter(line), b"", {}, {**models, "golden": golden})
        files = [self._component(release, name, "bytes", data, codec, bases, tamper) for name, data in models.items()]
        vectors = self._component(release, "golden", "golden", golden, codec, bases, tamper)
        document: dict[str, Any] = {
            "format": 1,
            "line": line,
            "version": version,
            "release_counter": release.counter,
            "issued": "2026-05-31T00:00:00+00:00",
            "requires": {"agent": "", "profiles": []},
            "components": [component_to_json(component) for component in files],
            "golden": component_to_json(vectors),
            "graph": {"task": "raw"},
            "budgets": {"p95_ms": None, "rss_bytes": None},
            "licence": "Apache-2.0",
            "metrics": {},
        }
        if edit is not None:
            edit(document)
        release.data = json.dumps(document).encode()
        self.built[line, version] = release
        self.targets[sha256(release.data)] = release.data
        self.list_release(release)
        return release

    def list_release(self, release: Built, path: str = "") -> None:
        """Let the line's role sign the release, delegating to it first if the line is new."""
        role = f"release-{release.line}"
        if role not in self.roles:
            self.signers[role] = CryptoSigner.generate_ed25519()
            key = self.signers[role].public_key
            delegation = DelegatedRole(role, [key.keyid], 1, True, paths=[f"{release.line}/*/release.json"])
            delegations = self.top.signed.delegations
            assert delegations is not None
            assert delegations.roles is not None
            delegations.roles[role] = delegation
            delegations.keys[key.keyid] = key
            self.roles[role] = Metadata(Targets(version=1, expires=LATER))
        path = path or release.path
        target = TargetFile.from_data(path, release.data, ["sha256"])
        target.unrecognized_fields["custom"] = {"release_counter": release.counter}
        self.roles[role].signed.targets[path] = target
        self.publish()

    def _next_counter(self, line: str) -> int:
        return 1 + max((built.counter for (known, _), built in self.built.items() if known == line), default=0)

    def _component(
        self,
        release: Built,
        name: str,
        format: str,
        plain: bytes,
        codec: str,
        bases: Sequence[Built],
        tamper: Callable[[str, str, bytes], bytes] | None,
    ) -> Component:
        cek, cek_id = payload.new_key(), payload.new_key()[:16].hex()
        release.ceks[cek_id] = cek

        def seal(kind: str, chosen: str, base: bytes | None) -> Payload:
            source = tamper(name, kind, plain) if tamper is not None else plain
            packed = source if chosen == "raw" else delta.encode(chosen, source, base)
            context = payload.payload_context(release.line, release.version, name, kind, sha256(plain), len(plain))
            sealed = payload.seal(packed, cek, context)
            self.payloads[sha256(sealed)] = sealed
            return Payload(sha256(sealed), len(sealed), chosen, "cobblestone-256", cek_id, payload.leaves(sealed))

        deltas = tuple(
            Delta(sha256(base.plain[name]), seal(f"delta:{sha256(base.plain[name])}", "zstd-patch", base.plain[name]))
            for base in bases
            if name in base.plain and base.plain[name] != plain
        )
        return Component(name, format, sha256(plain), len(plain), seal("full", codec, None), deltas, (), (), ())

    # -- granting ------------------------------------------------------------------------------------------------------

    def grant(
        self,
        device: str,
        key: X25519PrivateKey,
        *releases: Built,
        grants_for: str = "",
        named: str = "",
        expires: datetime.datetime = LATER,
        version: int | None = None,
        signer: CryptoSigner | None = None,
        edit: Callable[[Targets], None] | None = None,
    ) -> None:
        """Assign `releases` to a device. `grants_for` wraps the keys for another device, `named` names another."""
        grants = {}
        public = key.public_key().public_bytes_raw()
        for release in releases:
            for cek_id, cek in release.ceks.items():
                info = payload.grant_info(grants_for or device, release.line, release.version, cek_id)
                wrapped = payload.wrap_key(cek, public, info)
                grants[cek_id] = {"kid": kid_of(key), "wrapped": base64.b64encode(wrapped).decode()}
        self.versions["director"] = version or self.versions["director"] + 1
        signed = Targets(
            version=self.versions["director"],
            expires=expires,
            targets={r.path: TargetFile.from_data(r.path, r.data, ["sha256"]) for r in releases},
            unrecognized_fields={"device": named or device, "grants": grants},
        )
        if edit is not None:
            edit(signed)
        document = Metadata(signed)
        document.sign(signer or self.signers["director"])
        self.desired[device] = document.to_bytes()

    # -- for attacks ---------------------------------------------------------------------------------------------------

    def frozen(self) -> Simulator:
        """A copy as of now, to be replayed later."""
        clone = copy.copy(self)
        clone.documents = dict(self.documents)
        clone.desired = dict(self.desired)
        clone.targets = dict(self.targets)
        clone.payloads = dict(self.payloads)
        return clone

    def write(self, folder: Path, device: str) -> None:
        """Lay the repository out as a directory."""
        for name in ("metadata", f"devices/{device}", "targets", "payloads"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for (role, version), data in self.documents.items():
            prefix = "" if version is None else f"{version}."
            (folder / "metadata" / f"{prefix}{role}.json").write_bytes(data)
        (folder / "devices" / device / "desired.json").write_bytes(self.desired[device])
        for built in self.built.values():
            *folders, name = built.path.split("/")
            place = folder / "targets" / "/".join(folders)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{sha256(built.data)}.{name}").write_bytes(built.data)
        for digest, data in self.payloads.items():
            (folder / "payloads" / digest).write_bytes(data)


@dataclass
class SimulatedTransport:
    """Implements `ota.client.ports.Transport` over a simulator, with faults.

    `on_block(sha256, offset, data)` may change, delay or refuse a block; `asked` logs every request for one.
    `cut_after` blocks the transport says `source_unreachable`; `silent` roles never answer.
    """

    repository: Simulator
    device: str
    name: str = "simulated"
    on_block: Callable[[str, int, bytes], bytes] | None = None
    cut_after: int | None = None
    silent: frozenset[str] = frozenset()
    unreachable: bool = False
    asked: list[tuple[str, int]] = field(default_factory=list)
    documents_asked: list[tuple[str, int | None]] = field(default_factory=list)
    sent_bytes: int = 0
    outstanding: int = 0
    most_outstanding: int = 0

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        self.documents_asked.append((role, version))
        await self._answer(role)
        return self._found(self.repository.documents.get((role, version)), f"{version}.{role}", max_bytes)

    async def desired(self, max_bytes: int) -> bytes:
        await self._answer("desired")
        return self._found(self.repository.desired.get(self.device), "desired", max_bytes)

    async def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        await self._answer("target")
        return self._found(self.repository.targets.get(sha256), path, max_bytes)

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        self.asked.append((sha256, offset))
        self.outstanding += 1
        self.most_outstanding = max(self.most_outstanding, self.outstanding)
        try:
            await self._answer("block")
            if self.cut_after is not None:
                if self.cut_after == 0:
                    raise TransferError(Reason.SOURCE_UNREACHABLE, "cut")
                self.cut_after -= 1
            data = self._found(self.repository.payloads.get(sha256), sha256, 1 << 40)[offset : offset + length]
            if self.on_block is not None:
                data = self.on_block(sha256, offset, data)
            self.sent_bytes += len(data)
            return data
        finally:
            self.outstanding -= 1

    async def _answer(self, what: str) -> None:
        await asyncio.sleep(0)
        if self.unreachable:
            raise TransferError(Reason.SOURCE_UNREACHABLE, "not connected", retry=True)
        if what in self.silent:
            await asyncio.Event().wait()

    @staticmethod
    def _found(data: bytes | None, what: str, max_bytes: int) -> bytes:
        if data is None:
            raise TransferError(Reason.NOT_FOUND, f"{what} does not exist")
        if len(data) > max_bytes:
            raise TransferError(Reason.METADATA_TOO_LARGE, f"{what} has {len(data)} bytes")
        return data
