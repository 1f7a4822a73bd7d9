"""Metadata that must not be believed, each case with its stable reason; the serving release never changes."""

from __future__ import annotations

import datetime
import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Metadata, TargetFile, Targets

from ota import BUILT, strictjson
from ota.client import trust
from ota.client.journal import Floor
from ota.client.limits import Limits
from ota.client.repository import raised_floor, reference_time
from ota.errors import OtaError, Reason, TransferError
from tests.ota.client.conftest import DEVICE, LINE, Device, QuickDisk, model, run
from tests.ota.client.simulator import LATER, NOW, PAST, Simulator


def _refused(device: Device, reason: Reason, *, outcome: str = "failed") -> None:
    served = dict(device.host.serving)
    event = device.check()
    assert (event.outcome, event.reason) == (outcome, reason), event
    assert device.host.serving == served
    assert device.serving == "1.0.0"


# -- rollback ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F29")
@pytest.mark.parametrize("what", ["timestamp", "desired"])
def test_a_replayed_older_document_is_refused(committed: Device, what: str) -> None:
    old = committed.repository.frozen()
    committed.release("1.1.0")
    assert committed.check().outcome == "committed"
    committed.events.clear()
    if what == "timestamp":
        committed.repository.documents["timestamp", None] = old.documents["timestamp", None]
    else:
        committed.repository.desired[DEVICE] = old.desired[DEVICE]
    event = committed.check()
    assert event.reason is Reason.METADATA_ROLLBACK
    assert committed.serving == "1.1.0"


@pytest.mark.parametrize("damage", ["delete", "empty", "zeros"])
def test_deleted_or_emptied_local_metadata_does_not_bring_old_versions_back(committed: Device, damage: str) -> None:
    old = committed.repository.frozen()
    for _ in range(3):
        committed.repository.next_root()
    committed.release("1.1.0")
    committed.check()

    def damage_all() -> None:
        for path in (committed.disk / "trust").rglob("*.json"):
            if damage == "delete":
                path.unlink()
            else:
                path.write_bytes(b"" if damage == "empty" else bytes(path.stat().st_size))

    damage_all()
    current = committed.repository.documents
    committed.repository.documents = {**current, ("timestamp", None): old.documents["timestamp", None]}
    assert committed.check().reason is Reason.METADATA_ROLLBACK
    damage_all()
    committed.repository.documents = {
        key: data for key, data in current.items() if key not in {("root", 3), ("root", 4)}
    }
    assert committed.check().reason is Reason.METADATA_ROLLBACK
    committed.repository.documents = current
    assert committed.check().outcome == "up_to_date"
    assert committed.serving == "1.1.0"


@pytest.mark.fault("F29")
def test_a_snapshot_that_lists_an_older_release_role_is_refused(committed: Device) -> None:
    committed.release("1.1.0")
    committed.check()
    role = f"release-{LINE}"
    meta = committed.repository.snapshot.signed.meta[f"{role}.json"]
    meta.version -= 1
    meta.hashes = None
    meta.length = None
    committed.repository.sign_snapshot()
    event = committed.check()
    assert event.reason is Reason.METADATA_ROLLBACK
    assert committed.serving == "1.1.0"


@pytest.mark.fault("F32")
def test_after_a_fast_forward_by_a_stolen_key_a_rotation_of_that_key_frees_the_floor(committed: Device) -> None:
    simulator = committed.repository
    simulator.versions["timestamp"] = 2**31
    simulator.sign_timestamp()
    assert committed.check().outcome == "up_to_date"
    simulator.versions["timestamp"] = 10
    simulator.sign_timestamp()
    _refused(committed, Reason.METADATA_ROLLBACK)
    simulator.rotate("timestamp")
    simulator.sign_timestamp()
    assert committed.check().outcome == "up_to_date"


@pytest.mark.fault("F32")
@pytest.mark.parametrize("role", ["targets", f"release-{LINE}"])
def test_a_role_that_was_wound_forward_is_freed_by_new_keys_of_the_snapshot(committed: Device, role: str) -> None:
    simulator = committed.repository
    simulator.versions[role] = 2**31
    simulator.publish()
    assert committed.check().outcome == "up_to_date"
    simulator.versions[role] = 10
    simulator.publish()
    _refused(committed, Reason.METADATA_ROLLBACK)
    simulator.rotate("snapshot")
    simulator.publish()
    assert committed.check().outcome == "up_to_date"


@pytest.mark.fault("F29")
def test_a_floor_that_a_cut_kept_from_the_journal_is_set_by_the_document_that_was_kept(committed: Device) -> None:
    old = committed.repository.documents["timestamp", None]
    committed.repository.next_root()
    committed.repository.sign_timestamp()
    current = committed.repository.documents["timestamp", None]
    journal = {path: path.read_bytes() for path in (committed.disk / "state").iterdir()}  # type: ignore[union-attr]
    committed.check()
    for path, data in journal.items():
        path.write_bytes(data)
    committed.check()

    def lose() -> None:
        for path in (committed.disk / "trust").rglob("*.json"):  # type: ignore[union-attr]
            path.unlink()

    lose()
    committed.repository.documents["timestamp", None] = old
    _refused(committed, Reason.METADATA_ROLLBACK)
    lose()
    committed.repository.documents["timestamp", None] = current
    del committed.repository.documents["root", 2]
    _refused(committed, Reason.METADATA_ROLLBACK)


# -- expiry and the clock ----------------------------------------------------------------------------------------------


@pytest.mark.fault("F33")
@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", f"release-{LINE}", "director"])
def test_expired_metadata_is_refused_and_named(committed: Device, role: str) -> None:
    simulator = committed.repository
    documents: dict[str, Metadata[Any]] = {
        "root": simulator.root,
        "timestamp": simulator.timestamp,
        "snapshot": simulator.snapshot,
        "targets": simulator.top,
        **simulator.roles,
    }
    if role == "director":
        committed.release("1.1.0", grant=False)
        committed.grant(simulator.built[LINE, "1.1.0"], expires=PAST)
    else:
        documents[role].signed.expires = PAST
        if role == "root":
            simulator.next_root()
        committed.release("1.1.0")
    reasons = {
        "root": Reason.ROOT_EXPIRED,
        "timestamp": Reason.TIMESTAMP_EXPIRED,
        "snapshot": Reason.SNAPSHOT_EXPIRED,
        "targets": Reason.TARGETS_EXPIRED,
        "director": Reason.DESIRED_EXPIRED,
    }
    _refused(
        committed,
        reasons.get(role, Reason.DELEGATED_EXPIRED),
        outcome="rejected" if role.startswith("release") else "failed",
    )
    expected = "desired.json" if role == "director" else role
    assert expected in [event for event in committed.events if event.reason][-1].message


@pytest.mark.fault("F30")
def test_a_timestamp_frozen_for_ever_expires_while_the_release_keeps_serving(committed: Device) -> None:
    committed.repository.timestamp.signed.expires = NOW + datetime.timedelta(days=7)
    committed.release("1.1.0")
    committed.now = NOW + datetime.timedelta(days=7)
    _refused(committed, Reason.TIMESTAMP_EXPIRED)


@pytest.mark.fault("F39")
def test_a_clock_that_fell_back_to_1970_is_judged_at_the_signed_floor(committed: Device) -> None:
    simulator = committed.repository
    committed.now = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    simulator.timestamp.signed.expires = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)
    committed.release("1.1.0")
    _refused(committed, Reason.TIMESTAMP_EXPIRED)
    simulator.timestamp.signed.expires = LATER
    simulator.sign_timestamp()
    assert committed.check().outcome == "committed"


@pytest.mark.fault("F39")
def test_a_device_that_knows_no_date_yet_is_judged_at_the_day_its_software_was_made(device: Device) -> None:
    device.with_limits(built=NOW)
    device.now = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    device.repository.timestamp.signed.expires = PAST
    device.release("1.0.0")
    event = device.check()
    assert (event.outcome, event.reason) == ("failed", Reason.TIMESTAMP_EXPIRED)
    device.repository.timestamp.signed.expires = LATER
    device.repository.sign_timestamp()
    assert device.check().outcome == "committed"


def test_the_reference_time_is_the_latest_of_clock_floor_and_build() -> None:
    early, middle, late = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (1970, 2026, 2099))
    assert reference_time(early, "", middle) == middle
    assert reference_time(early, middle.isoformat(), early) == middle
    assert reference_time(late, middle.isoformat(), middle) == late


def test_the_shipped_build_date_is_past_and_before_the_ceiling_of_signed_dates() -> None:
    assert datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) < BUILT <= datetime.datetime.now(datetime.UTC)
    assert Limits().clock_ceiling - BUILT > datetime.timedelta(days=10 * 365)


@pytest.mark.fault("F40")
@pytest.mark.parametrize("issued", ["2099-01-01T00:00:00+00:00", "2026-08-01T00:00:00+00:00", "2026-06-01", "soon"])
def test_a_signed_date_out_of_bounds_does_not_move_the_clock_floor(committed: Device, issued: str) -> None:
    floor = committed.boot().record.clock_floor
    assert floor == "2026-05-31T00:00:00+00:00"
    committed.release("1.1.0", edit=lambda release: release.update(issued=issued))
    assert committed.check().outcome == "committed"
    assert committed.boot().record.clock_floor == floor


def test_the_clock_floor_only_rises() -> None:
    ceiling = Limits().clock_ceiling
    early, late = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
    assert raised_floor("", early, LATER, ceiling) == early
    assert raised_floor(early, late, LATER, ceiling) == late
    assert raised_floor(late, early, LATER, ceiling) == late


# -- signatures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "director", f"release-{LINE}"])
def test_a_document_signed_by_a_stranger_is_refused(committed: Device, role: str) -> None:
    stranger = CryptoSigner.generate_ed25519()
    if role == "director":
        built = committed.release("1.1.0", grant=False)
        committed.grant(built, signer=stranger)
    else:
        committed.repository.signers[role] = stranger
        committed.release("1.1.0")
    _refused(committed, Reason.BAD_SIGNATURE, outcome="rejected" if role.startswith("release") else "failed")


@pytest.mark.fault("F34")
def test_a_threshold_met_by_one_key_under_two_ids_is_refused(committed: Device) -> None:
    simulator = committed.repository
    one = simulator.root_signers[0]
    document = json.loads(simulator.root.to_bytes())
    key = document["signed"]["keys"][one.public_key.keyid]
    document["signed"]["keys"]["f" * 64] = dict(key, keyval=dict(key["keyval"]))
    document["signed"]["roles"]["root"]["keyids"] = [one.public_key.keyid, "f" * 64]
    root = Metadata.from_dict(document)
    root.signed.version += 1
    root.signatures.clear()
    signature = one.sign(root.signed_bytes)
    forged = json.loads(root.to_bytes())
    forged["signatures"] = [{"keyid": keyid, "sig": signature.signature} for keyid in (one.public_key.keyid, "f" * 64)]
    other = simulator.root_signers[1].sign(root.signed_bytes)
    forged["signatures"].append({"keyid": other.keyid, "sig": other.signature})
    simulator.documents["root", root.signed.version] = json.dumps(forged).encode()
    _refused(committed, Reason.BAD_SIGNATURE)


@pytest.mark.fault("F34")
def test_two_signatures_by_one_key_are_refused(committed: Device) -> None:
    simulator = committed.repository
    simulator.next_root()
    document = json.loads(simulator.documents["root", simulator.root.signed.version])
    document["signatures"] = [document["signatures"][0]] * 2
    simulator.documents["root", simulator.root.signed.version] = json.dumps(document).encode()
    _refused(committed, Reason.BAD_JSON)


@pytest.mark.fault("F34")
def test_a_root_signed_by_fewer_keys_than_the_threshold_is_refused(committed: Device) -> None:
    simulator = committed.repository
    simulator.next_root()
    document = json.loads(simulator.documents["root", simulator.root.signed.version])
    del document["signatures"][0]
    simulator.documents["root", simulator.root.signed.version] = json.dumps(document).encode()
    _refused(committed, Reason.BAD_SIGNATURE)


# -- roots -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F35")
def test_roots_are_walked_one_by_one_and_a_gap_or_strangers_end_the_walk(committed: Device) -> None:
    simulator = committed.repository
    for _ in range(4):
        simulator.rotate("timestamp")
    simulator.sign_timestamp()
    assert committed.check().outcome == "up_to_date"
    asked = committed.transport.documents_asked
    assert [version for role, version in asked if role == "root"][-5:] == [2, 3, 4, 5, 6]
    for _ in range(2):
        simulator.rotate("timestamp")
    simulator.sign_timestamp()
    seventh = simulator.documents.pop(("root", 6))
    _refused(committed, Reason.BAD_SIGNATURE)  # the walk ends before the gap, at a root without the new timestamp key
    simulator.documents["root", 6] = simulator.documents["root", 7]
    _refused(committed, Reason.METADATA_ROLLBACK)
    simulator.documents["root", 6] = seventh
    simulator.root_signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
    simulator.next_root()
    _refused(committed, Reason.BAD_SIGNATURE)


@pytest.mark.fault("F37")
def test_an_endless_chain_of_roots_is_cut(committed: Device) -> None:
    committed.with_limits(root_rotations=5)
    for _ in range(5):
        committed.repository.next_root()
    _refused(committed, Reason.METADATA_MISMATCH)


@pytest.mark.fault("F37")
def test_ten_thousand_delegations_are_refused_by_their_size(committed: Device) -> None:
    delegations = committed.repository.top.signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    director = delegations.roles["director"]
    for number in range(10_000):
        name = f"release-{number}"
        delegations.roles[name] = DelegatedRole(name, director.keyids, 1, True, paths=[f"{number}/*/release.json"])
    committed.release("1.1.0")
    _refused(committed, Reason.METADATA_TOO_LARGE)


# -- mixing ------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F31")
@pytest.mark.parametrize("role", ["snapshot", "targets", f"release-{LINE}"])
def test_a_document_of_another_publication_in_its_place_is_refused(committed: Device, role: str) -> None:
    simulator = committed.repository
    old = simulator.documents[role, simulator.versions[role]]
    committed.release("1.1.0")
    simulator.documents[role, simulator.versions[role]] = old
    outcome = "rejected" if role.startswith("release") else "failed"
    _refused(committed, Reason.METADATA_MISMATCH, outcome=outcome)


@pytest.mark.fault("F42")
@pytest.mark.parametrize("lie", ["unlisted", "other_hash", "other_length"])
def test_the_director_cannot_assign_what_the_release_role_did_not_sign(committed: Device, lie: str) -> None:
    built = committed.release("1.1.0", grant=False)

    def edit(desired: Targets) -> None:
        target = desired.targets[built.path]
        if lie == "unlisted":
            desired.targets = {f"{LINE}/6.6.6/release.json": target}
        elif lie == "other_hash":
            target.hashes["sha256"] = "0" * 64
        else:
            target.length += 1

    committed.grant(built, edit=edit)
    _refused(committed, Reason.METADATA_MISMATCH, outcome="rejected")


@pytest.mark.fault("F43")
def test_a_release_role_cannot_sign_for_another_line(committed: Device) -> None:
    data = model(3)
    meter = committed.repository.build("meter", "1.1.0", {"int8": data}, data)
    built = committed.release("1.1.0", grant=False)
    role = committed.repository.roles["release-meter"].signed
    role.targets[f"{LINE}/1.1.0/release.json"] = TargetFile.from_data("x", meter.data, ["sha256"])
    del committed.repository.roles[f"release-{LINE}"].signed.targets[built.path]
    committed.repository.publish()

    def edit(desired: Targets) -> None:
        desired.targets = {built.path: TargetFile.from_data("x", meter.data, ["sha256"])}

    committed.grant(built, edit=edit)
    _refused(committed, Reason.METADATA_MISMATCH, outcome="rejected")


def test_the_assignment_of_another_device_is_refused(committed: Device) -> None:
    built = committed.release("1.1.0", grant=False)
    committed.grant(built, named="cam-2")
    _refused(committed, Reason.NOT_FOR_THIS_DEVICE)


def test_a_bad_assignment_of_one_line_does_not_stop_another(committed: Device) -> None:
    good = committed.release("1.1.0", grant=False)
    data = model(4)
    bad = committed.repository.build("meter", "1.0.0", {"int8": data}, data)

    def edit(desired: Targets) -> None:
        desired.targets[bad.path].hashes["sha256"] = "0" * 64

    committed.grant(good, bad, edit=edit)
    events = {event.line: event for event in run(committed.reboot().check())}
    assert events["meter"].reason is Reason.METADATA_MISMATCH
    assert events[LINE].outcome == "committed"


@pytest.mark.fault("F44")
@pytest.mark.parametrize(
    "path",
    [
        "../person/1.1.0/release.json",
        "/person/1.1.0/release.json",
        "person/%2e%2e/release.json",
        "person\\1.1.0\\release.json",
        "person/1.1.0/release.json\0",
        "person/1.1.0/../release.json",
        "Person/1.1.0/release.json",
        "person//release.json",
        "person/1.1.0/model.onnx",
        "person/" + "1" * 300 + "/release.json",
    ],
)
def test_target_names_out_of_the_grammar_are_refused(committed: Device, path: str) -> None:
    built = committed.release("1.1.0", grant=False)
    committed.grant(built, edit=lambda desired: desired.targets.update({path: desired.targets.pop(built.path)}))
    _refused(committed, Reason.BAD_TARGET_NAME)


# -- forms -------------------------------------------------------------------------------------------------------------

_HOSTILE: list[tuple[str, Callable[[bytes], bytes], Reason]] = [
    ("larger than the limit", lambda data: data + b" " * 20_000, Reason.METADATA_TOO_LARGE),
    ("nested too deep", lambda data: b'{"signed":' + b"[" * 5000 + b"]" * 5000 + b"}", Reason.BAD_JSON),
    ("long integer", lambda data: data.replace(b'"version":', b'"version":' + b"9" * 5000, 1), Reason.BAD_JSON),
    ("key twice", lambda data: data.replace(b'{"signatures"', b'{"signatures":[],"signatures"', 1), Reason.BAD_JSON),
    ("NaN", lambda data: data.replace(b'"version":', b'"x":NaN,"version":', 1), Reason.BAD_JSON),
    ("infinity", lambda data: data.replace(b'"version":', b'"x":1e999,"version":', 1), Reason.BAD_JSON),
    ("lone surrogate", lambda data: data.replace(b'"_type"', b'"x":"\\ud800","_type"', 1), Reason.BAD_JSON),
    ("not UTF-8", lambda data: data.replace(b'"_type"', b'"x":"\xff","_type"', 1), Reason.BAD_JSON),
    ("not an object", lambda data: b"[]", Reason.BAD_JSON),
    ("version a float", lambda data: data.replace(b'"version":', b'"version":1.', 1), Reason.BAD_JSON),
    ("empty", lambda data: b"", Reason.BAD_JSON),
]


@pytest.mark.fault("F38")
@pytest.mark.parametrize(("name", "change", "reason"), _HOSTILE, ids=[row[0] for row in _HOSTILE])
def test_hostile_json_is_refused_before_it_is_parsed(
    committed: Device, name: str, change: Callable[[bytes], bytes], reason: Reason
) -> None:
    documents = committed.repository.documents
    documents["timestamp", None] = change(documents["timestamp", None])
    _refused(committed, reason)


def test_a_key_twice_among_very_many_is_found_before_anybody_waits_for_it() -> None:
    members = [b'"a%d":1' % number for number in range(80_000)]
    began_s = time.process_time()
    with pytest.raises(OtaError, match="appears twice"):
        strictjson.loads(b"{%s}" % b",".join([*members, b'"z":1,"z":1']), max_bytes=1 << 20, what="hostile")
    assert time.process_time() - began_s < 10


class FailingDisk(QuickDisk):
    """Files in `bad` cannot be read until another one takes their place."""

    bad: set[str]

    def read(self, path: str, offset: int, length: int) -> bytes:
        if path in self.bad:
            raise OSError(errno.EIO, "bad block")
        return super().read(path, offset, length)

    def rename(self, source: str, destination: str) -> None:
        super().rename(source, destination)
        self.bad.discard(destination)


def test_metadata_that_the_disk_no_longer_gives_back_is_fetched_and_written_anew(committed: Device) -> None:
    assert isinstance(committed.disk, Path)
    committed.repository.next_root()
    committed.release("1.1.0", grant=False)
    committed.check()
    names = [f"trust/main/{path.name}" for path in (committed.disk / "trust/main").glob("*.json")]
    assert len(names) == 6
    committed.release("1.2.0")
    committed.disk = disk = FailingDisk(committed.disk)
    disk.bad = set(names)
    assert committed.check().outcome == "committed"
    assert not disk.bad
    assert committed.serving == "1.2.0"


def test_the_walk_asks_for_documents_by_role_version_and_size(device: Device) -> None:
    """The generator alone, without transport or disk: what it asks for, in order, and what it answers."""
    built = device.release("1.0.0")
    walk = trust.refresh(device.pinned_root, {}, {}, DEVICE, NOW, Limits())
    asked: list[tuple[str, int | None]] = []
    effect = walk.send(None)
    desired = None
    while desired is None:
        answer = None
        if isinstance(effect, trust.FetchMetadata):
            asked.append((effect.role, effect.version))
            answer = device.repository.documents.get((effect.role, effect.version))
        elif isinstance(effect, trust.FetchDesired):
            asked.append(("desired", None))
            answer = device.repository.desired[DEVICE]
        try:
            effect = walk.send(answer)
        except StopIteration as e:
            desired = e.value
    role = f"release-{LINE}"
    versions = device.repository.versions
    assert asked == [
        ("root", 2),
        ("timestamp", None),
        ("snapshot", versions["snapshot"]),
        ("targets", versions["targets"]),
        ("desired", None),
        (role, versions[role]),
    ]
    assert desired.assignments[LINE].length == len(built.data)
    assert set(desired.grants) == set(built.ceks)


def test_a_desired_document_that_vanished_is_not_taken_for_an_empty_one(committed: Device) -> None:
    del committed.repository.desired[DEVICE]
    _refused(committed, Reason.NOT_FOUND)


def test_a_pinned_root_that_signed_nothing_of_the_repository_trusts_nothing(committed: Device) -> None:
    walk = trust.refresh(Simulator().documents["root", 1], {}, {"root": Floor(1, "")}, DEVICE, NOW, Limits())
    walk.send(None)
    walk.send(None)
    with pytest.raises(OtaError) as refusal:
        walk.send(committed.repository.documents["timestamp", None])
    assert refusal.value.reason is Reason.BAD_SIGNATURE


def test_missing_documents_are_reported_as_missing(committed: Device) -> None:
    del committed.repository.documents["timestamp", None]
    walk = trust.refresh(committed.pinned_root, {}, {}, DEVICE, NOW, Limits())
    walk.send(None)
    walk.send(None)
    with pytest.raises(TransferError):
        walk.send(None)


@pytest.mark.fault("F36")
def test_a_release_key_rotated_during_a_download_ends_the_update_only_if_the_release_is_gone(
    committed: Device,
) -> None:
    built = committed.release("1.1.0")
    committed.transport.cut_after = 1
    committed.check()
    committed.transport.cut_after = None
    simulator, role = committed.repository, f"release-{LINE}"
    delegations = simulator.top.signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    simulator.signers[role] = CryptoSigner.generate_ed25519()
    key = simulator.signers[role].public_key
    delegations.roles[role].keyids = [key.keyid]
    delegations.keys[key.keyid] = key
    del simulator.roles[role].signed.targets[built.path]
    simulator.publish()
    _refused(committed, Reason.METADATA_MISMATCH, outcome="rejected")
    simulator.list_release(built)
    assert committed.check().outcome == "committed"


def test_a_hash_that_names_another_file_is_refused_and_the_file_stays(committed: Device) -> None:
    """Who holds the release's and the director's key could have had any document of the device removed."""
    built = committed.release("1.1.0", grant=False)
    assert isinstance(committed.disk, Path)
    victim = committed.disk / "victim.json"
    victim.write_text("{}")
    path = {"sha256": "../victim"}
    committed.repository.roles[f"release-{LINE}"].signed.targets[built.path].hashes = path
    committed.repository.publish()
    committed.grant(built, edit=lambda signed: setattr(signed.targets[built.path], "hashes", path))
    _refused(committed, Reason.METADATA_MISMATCH, outcome="rejected")
    assert victim.exists()
