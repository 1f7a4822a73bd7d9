"""Mutated metadata: whatever is done to a valid document, a refusal has a reason and nothing that was kept changes."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile

from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.repository import Repository
from ota.errors import OtaError
from tests.crash.memory import MemoryDisk
from tests.ota.client.conftest import DEVICE, FAST, LINE, model, run
from tests.ota.client.simulator import NOW, SimulatedTransport, Simulator, X25519PrivateKey

RELEASE = f"release-{LINE}"
ROLES = ("root", "timestamp", "snapshot", "targets", RELEASE, "director")
FOLDER = "trust/main"
FUZZ = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


class World:
    """A client that has seen the first publication, and a second one that it has not."""

    def __init__(self) -> None:
        simulator = Simulator()
        key = X25519PrivateKey.generate()
        for version in ("1.0.0", "1.1.0"):
            built = simulator.build(LINE, version, {"int8": model(1, 2000)}, b"golden")
            simulator.grant(DEVICE, key, built)
            if version == "1.0.0":
                self.pinned = simulator.documents["root", 1]
                simulator.next_root()
                self.disk = MemoryDisk()
                self.refresh(simulator, self.disk)
        simulator.next_root()
        self.simulator = simulator
        self.before = self.kept(self.disk)
        disk = self.disk.snapshot()
        self.refresh(simulator, disk)
        self.after = self.kept(disk)
        assert self.before.keys() == self.after.keys() == set(ROLES)
        assert all(self.before[role] != self.after[role] for role in ROLES)

    def refused(self, simulator: Simulator, disk: MemoryDisk) -> OtaError | None:
        """The refusal of a refresh, which has one line of text; anything else that it raises fails the test."""
        try:
            self.refresh(simulator, disk)
        except OtaError as e:
            refusal = e
        else:
            return None
        assert refusal.message
        assert "\n" not in refusal.message
        return refusal

    def refresh(self, simulator: Simulator, disk: MemoryDisk) -> None:
        fs = Fs(disk)
        repository = Repository(fs, Journal(fs), "main", self.pinned, FAST)
        run(repository.refresh([SimulatedTransport(simulator, DEVICE)], DEVICE, NOW))

    @staticmethod
    def kept(disk: MemoryDisk) -> dict[str, tuple[Any, Any]]:
        """What is signed, and the floor, by role."""
        fs = Fs(disk)
        floors = Journal(fs).record.floors["main"]
        names = [name.removesuffix(".json") for name in fs.names(FOLDER)]
        assert sorted(names) == sorted(floors)
        return {
            name: (json.loads(fs.read(f"{FOLDER}/{name}.json", 1 << 20) or b"")["signed"], floors[name])
            for name in names
        }

    def served_with(self, role: str, change: Callable[[bytes], bytes]) -> Simulator:
        """The second publication with the document of `role` changed."""
        simulator = self.simulator.frozen()
        if role == "director":
            simulator.desired[DEVICE] = change(simulator.desired[DEVICE])
        else:
            versions = {"root": 3, "timestamp": None}
            place = role, versions.get(role, simulator.versions.get(role))
            simulator.documents[place] = change(simulator.documents[place])
        return simulator

    def check(self, simulator: Simulator) -> None:
        """A refresh raises nothing else than a reason, and keeps of each role the first or the second document."""
        disk = self.disk.snapshot()
        self.refused(simulator, disk)
        for role, kept in self.kept(disk).items():
            assert kept in (self.before[role], self.after[role]), role


@functools.cache
def world() -> World:
    return World()


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of some bytes: one flipped, some cut out, put in or repeated, or the end cut off."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "truncate"]))
    where, length = draw(st.floats(0, 1)), draw(st.integers(1, 40))
    value, text = draw(st.integers(1, 255)), draw(st.binary(min_size=1, max_size=12))

    def change(data: bytes) -> bytes:
        at = int(where * (len(data) - 1))
        if kind == "flip":
            return data[:at] + bytes([data[at] ^ value]) + data[at + 1 :]
        if kind == "cut":
            return data[:at] + data[at + length :]
        if kind == "insert":
            return data[:at] + text + data[at:]
        return data[:at] if kind == "truncate" else data[: at + length] + data[at:]

    return change


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "root", "targets", "0" * 64, "2026-07-01T00:00:00Z", "-1", "../x", "a\nb", "\u00e4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "version", "x.json"]), inner),
    max_leaves=5,
)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Any], Any]:
    """A change of one value in the tree of a document: another one, gone, or its neighbour's."""
    steps, value = draw(st.lists(st.integers(0, 30), min_size=1, max_size=7)), draw(JSON)
    kind = draw(st.sampled_from(["replace", "remove", "swap"]))

    def change(tree: Any) -> Any:
        parent, key = {"": tree}, ""
        node = tree
        for step in steps:
            if not isinstance(node, (dict, list)) or not node:
                break
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, keys[step % len(keys)]
            node = node[key]
        if kind == "remove" and parent is not None and key != "":
            del parent[key]
        elif kind == "swap" and isinstance(parent, dict) and len(parent) > 1:
            other = next(name for name in parent if name != key)
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent[key] = value
        return tree

    return change


@FUZZ
@given(role=st.sampled_from(ROLES), edit=edits())
def test_changed_bytes_of_a_signed_document_change_nothing_that_is_kept(
    role: str, edit: Callable[[bytes], bytes]
) -> None:
    world().check(world().served_with(role, edit))


@FUZZ
@given(role=st.sampled_from(ROLES), change=changes())
def test_a_changed_value_in_a_signed_document_changes_nothing_that_is_kept(
    role: str, change: Callable[[Any], Any]
) -> None:
    def edit(data: bytes) -> bytes:
        document = json.loads(data)
        document["signed"] = change(document["signed"])
        return json.dumps(document).encode()

    world().check(world().served_with(role, edit))


@FUZZ
@given(role=st.sampled_from(ROLES), change=changes())
def test_a_changed_value_that_a_stolen_key_signed_is_accepted_or_refused_with_a_reason(
    role: str, change: Callable[[Any], Any]
) -> None:
    origin = world().simulator
    signers = origin.root_signers[:2] if role == "root" else [origin.signers[role]]
    simulator = world().served_with(role, lambda data: _signed(data, change, signers))
    if role not in ("root", "timestamp", "director"):
        _list_anew(simulator, role)
    disk = world().disk.snapshot()
    world().refused(simulator, disk)
    # whatever was kept of it is read again when the publisher is back
    world().refused(origin, disk)


def _signed(data: bytes, change: Callable[[Any], Any], signers: list[CryptoSigner]) -> bytes:
    document = json.loads(data)
    document["signed"] = change(document["signed"])
    try:
        body = (encode_canonical(document["signed"]) or "").encode()
    except FormatError:
        body = b""  # a float has no canonical form, so there is nothing to sign
    signatures = [CryptoSigner.sign(signer, body) for signer in signers]
    document["signatures"] = [{"keyid": item.keyid, "sig": item.signature} for item in signatures]
    return json.dumps(document).encode()


def _list_anew(simulator: Simulator, role: str) -> None:
    """Snapshot and timestamp list the changed document without its hash."""
    snapshot, timestamp = copy.deepcopy(simulator.snapshot), copy.deepcopy(simulator.timestamp)
    place = "snapshot", simulator.versions["snapshot"]
    if role != "snapshot":
        snapshot.signed.meta[f"{role}.json"] = MetaFile(simulator.versions[role])
        snapshot.sign(simulator.signers["snapshot"])
        simulator.documents[place] = snapshot.to_bytes()
    timestamp.signed.snapshot_meta = MetaFile(simulator.versions["snapshot"])
    timestamp.sign(simulator.signers["timestamp"])
    simulator.documents["timestamp", None] = Metadata.to_bytes(timestamp)
