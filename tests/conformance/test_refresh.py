"""The command's metadata: what it asks for, what it keeps, and what it refuses, with a real server in between."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from ota.errors import OtaError, Reason
from tests.conformance.conftest import MakeCommand
from tests.conformance.served import TOP, Commands, Site

SCHEMES = ("ed25519", "ecdsa-sha2-nistp256", "rsassa-pss-sha256", "rsa-pkcs1v15-sha256")


@functools.cache
def _signer(scheme: str) -> CryptoSigner:
    if scheme == "ed25519":
        return CryptoSigner.generate_ed25519()
    if scheme.startswith("ecdsa"):
        return CryptoSigner.generate_ecdsa()
    return CryptoSigner.generate_rsa(scheme=scheme)


def _refused(command: Commands, capsys: pytest.CaptureFixture[str], reason: Reason) -> None:
    before = command.kept()
    capsys.readouterr()
    assert command.refresh() == 1
    assert f"[{reason.value}]" in capsys.readouterr().err
    for role, version in before.items():
        assert command.kept()[role] >= version


def test_a_refresh_asks_in_order_and_keeps_the_served_bytes(command: Commands, site: Site) -> None:
    assert command.refresh() == 0
    assert site.metadata_asked() == ["2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"]
    for role in TOP:
        assert (command.metadata / f"{role}.json").read_bytes() == site.files[f"metadata/{role}.json"]
    assert {path.name for path in command.metadata.glob("*.json")} == {f"{role}.json" for role in TOP}


def test_what_is_kept_is_not_asked_for_again(command: Commands, site: Site) -> None:
    command.refresh()
    site.metadata_asked()
    assert command.refresh() == 0
    assert site.metadata_asked() == ["2.root.json", "timestamp.json"]


def test_without_consistent_snapshots_only_roots_are_asked_for_by_version(command_for: MakeCommand) -> None:
    site = Site(consistent=False)
    command = command_for(site)
    site.add("targets", "a/file", b"bytes")
    site.publish()
    assert command.download("a/file") == 0
    assert site.asked[-1] == "targets/a/file"
    assert site.metadata_asked() == ["2.root.json", "timestamp.json", "snapshot.json", "targets.json"]


def test_listed_documents_need_neither_hash_nor_length(command_for: MakeCommand) -> None:
    site = Site(hashes=False)
    command = command_for(site)
    assert command.refresh() == 0
    site.publish()
    assert command.refresh() == 0
    assert command.kept() == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}


def test_the_command_runs_as_a_process_of_its_own(command: Commands) -> None:
    arguments = ["--metadata-url", f"{command.url}/metadata", "--metadata-dir", str(command.metadata), "refresh"]
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "ota.client.conformance", *arguments], env=environment, check=False, timeout=60
    )
    assert done.returncode == 0
    assert command.kept()["targets"] == 1


# -- trusted roots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["not json", "another signature", "no version"])
def test_a_bad_trusted_root_is_refused_before_anything_is_asked(command: Commands, site: Site, damage: str) -> None:
    document = json.loads(site.files["metadata/1.root.json"])
    if damage == "another signature":
        document["signatures"][0]["sig"] = "00" * 64
    elif damage == "no version":
        del document["signed"]["version"]
    command.init(b"[" if damage == "not json" else json.dumps(document).encode())
    assert command.refresh() == 1
    assert site.asked == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("role", ["root", "targets"])
def test_a_role_is_rotated_to_a_key_of_every_type(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str], scheme: str, role: str
) -> None:
    assert command.refresh() == 0
    site.rotate(role, key=_signer(scheme))
    site.publish()
    assert command.refresh() == 0
    assert command.kept() == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}
    newest = Metadata.from_bytes(site.files["metadata/root.json"])
    broken = next(iter(newest.signatures.values())).signature
    if role == "root":
        site.next_root()
    else:
        site.publish()
    file = f"metadata/3.{role}.json"
    site.files[file] = _with_signature(site.files[file], broken)
    if role == "targets":
        site.snapshot.signed.meta["targets.json"] = site.meta(3, site.files[file])
        site.sign_snapshot()
        site.sign_timestamp()
    _refused(command, capsys, Reason.BAD_SIGNATURE)


def _with_signature(data: bytes, signature: str) -> bytes:
    document = json.loads(data)
    for item in document["signatures"]:
        item["sig"] = signature
    return json.dumps(document).encode()


def test_many_roots_are_followed_one_by_one(command: Commands, site: Site) -> None:
    for _ in range(40):
        site.rotate("root", "snapshot")
    site.publish()
    assert command.refresh() == 0
    assert command.kept()["root"] == 41
    assert site.metadata_asked()[:41] == [f"{version}.root.json" for version in range(2, 43)]


def test_a_root_that_the_old_keys_did_not_sign_ends_the_refresh_at_the_old_one(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.rotate("root")
    document = site.root
    document.signatures.clear()
    document.sign(site.signers["root"][0])
    site.files["metadata/2.root.json"] = document.to_bytes()
    _refused(command, capsys, Reason.BAD_SIGNATURE)
    assert command.kept() == {"root": 1}


def test_a_root_under_the_number_of_another_is_refused(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.next_root()
    site.next_root()
    site.files["metadata/2.root.json"] = site.files["metadata/3.root.json"]
    _refused(command, capsys, Reason.METADATA_ROLLBACK)


def test_a_threshold_is_met_by_any_combination_of_distinct_keys_and_by_nothing_less(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [CryptoSigner.generate_ed25519() for _ in range(4)]
    site.rotate("timestamp", key=keys[0])
    for key in keys[1:]:
        site.root.signed.add_key(key.public_key, "timestamp")
    site.root.signed.roles["timestamp"].threshold = 3
    site.next_root()
    for combination in ([0, 1, 2], [3, 1, 0], [1, 2, 3], [0, 1, 2, 3]):
        site.signers["timestamp"] = [keys[number] for number in combination]
        site.sign_timestamp()
        assert command.refresh() == 0
    site.signers["timestamp"] = [keys[0], keys[1], CryptoSigner.generate_ed25519()]
    site.sign_timestamp()
    _refused(command, capsys, Reason.BAD_SIGNATURE)


@pytest.mark.parametrize("role", ["root", "timestamp"])
def test_a_key_id_without_a_key_counts_for_nothing_and_keeps_nobody_out(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    site.root.signed.roles[role].keyids.append("d" * 64)
    site.next_root()
    assert command.refresh() == 0
    site.root.signed.roles[role].threshold = 2
    site.next_root()
    _refused(command, capsys, Reason.BAD_SIGNATURE)


def test_a_key_of_an_unknown_type_is_named(command: Commands, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(site.files["metadata/1.root.json"])
    key = {"keytype": "of-tomorrow", "scheme": "of-tomorrow-65", "keyval": {"public": "00"}}
    document["signed"] |= {"keys": document["signed"]["keys"] | {"d" * 64: key}, "version": 2}
    site.files["metadata/2.root.json"] = json.dumps(document).encode()
    assert command.refresh() == 1
    assert "of-tomorrow-65" in capsys.readouterr().err


def test_large_documents_of_other_repositories_are_read(command: Commands, site: Site) -> None:
    site.root.signed.unrecognized_fields["note"] = "n" * 400_000
    site.next_root()
    site.targets["targets"].signed.unrecognized_fields["note"] = "n" * 4_000_000
    site.snapshot.signed.unrecognized_fields["note"] = "n" * 1_500_000
    site.publish()
    assert command.refresh() == 0
    assert command.kept() == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}


def test_a_wrong_signature_beside_enough_right_ones_does_no_harm(command: Commands, site: Site) -> None:
    second = CryptoSigner.generate_ecdsa()
    site.root.signed.add_key(second.public_key, "timestamp")
    site.next_root()
    document = json.loads(site.files["metadata/timestamp.json"])
    for nonsense in ("", "00", "no hexadecimal number"):
        document["signatures"] = [document["signatures"][0], {"keyid": second.public_key.keyid, "sig": nonsense}]
        site.files["metadata/timestamp.json"] = json.dumps(document).encode()
        assert command.refresh() == 0


@pytest.mark.fault("F34")
@pytest.mark.parametrize("spelling", ["same", "upper case", "pem with blanks"])
def test_one_key_in_two_spellings_under_two_ids_meets_no_threshold_of_two(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    signer = CryptoSigner.generate_ecdsa() if "pem" in spelling else CryptoSigner.generate_ed25519()
    site.rotate("timestamp", key=signer)
    document = json.loads(site.files["metadata/root.json"])
    key = json.loads(json.dumps(document["signed"]["keys"][signer.public_key.keyid]))
    if spelling == "upper case":
        key["keyval"]["public"] = key["keyval"]["public"].upper()
    elif "pem" in spelling:
        key["keyval"]["public"] += "\n \n"
    document["signed"]["keys"]["e" * 64] = key
    document["signed"]["roles"]["timestamp"] = {"keyids": [signer.public_key.keyid, "e" * 64], "threshold": 2}
    document["signed"]["version"] = 3
    root = Metadata[Root].from_dict(document)
    root.signatures.clear()
    root.sign(site.signers["root"][0])
    site.files["metadata/3.root.json"] = root.to_bytes()
    timestamp = json.loads(site.files["metadata/timestamp.json"])
    signature = signer.sign(site.timestamp.signed_bytes).signature
    timestamp["signatures"] = [{"keyid": id, "sig": signature} for id in (signer.public_key.keyid, "e" * 64)]
    site.files["metadata/timestamp.json"] = json.dumps(timestamp).encode()
    _refused(command, capsys, Reason.BAD_SIGNATURE)


# -- replay, freeze and mixtures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_an_older_version_is_refused_and_the_newer_one_stays(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    site.publish()
    assert command.refresh() == 0
    kept = command.kept()
    document = {"timestamp": site.timestamp, "snapshot": site.snapshot, "targets": site.targets["targets"]}[role]
    document.signed.version = 0
    if role == "targets":
        site.sign_targets("targets")
    if role in ("targets", "snapshot"):
        site.sign_snapshot()
    site.sign_timestamp()
    _refused(command, capsys, Reason.METADATA_ROLLBACK)
    assert {name: version for name, version in command.kept().items() if name != "timestamp"} == {
        name: version for name, version in kept.items() if name != "timestamp"
    }


def test_floors_survive_the_loss_of_every_kept_document(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    old = site.files["metadata/timestamp.json"]
    site.publish()
    assert command.refresh() == 0
    for role in ("timestamp", "snapshot", "targets"):
        (command.metadata / f"{role}.json").unlink()
    site.files["metadata/timestamp.json"] = old
    _refused(command, capsys, Reason.METADATA_ROLLBACK)


def test_what_was_kept_is_a_floor_even_when_the_floors_are_lost(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    old = site.files["metadata/timestamp.json"]
    site.publish()
    assert command.refresh() == 0
    for path in (command.metadata / "state").iterdir():
        path.unlink()
    site.files["metadata/timestamp.json"] = old
    _refused(command, capsys, Reason.METADATA_ROLLBACK)


def test_a_kept_document_whose_floor_was_lost_sets_it_again(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    old = site.files["metadata/timestamp.json"]
    site.publish()
    site.next_root()
    assert command.refresh() == 0
    for path in (command.metadata / "state").iterdir():
        path.unlink()
    assert command.refresh() == 0
    for role in ("timestamp", "snapshot", "targets"):
        (command.metadata / f"{role}.json").unlink()
    site.files["metadata/timestamp.json"] = old
    _refused(command, capsys, Reason.METADATA_ROLLBACK)


def test_the_first_timestamp_of_a_version_is_the_one_that_counts(command: Commands, site: Site) -> None:
    assert command.refresh() == 0
    kept = (command.metadata / "timestamp.json").read_bytes()
    site.timestamp.signed.version = 0
    site.timestamp.signed.snapshot_meta.version = 77
    site.sign_timestamp()
    site.metadata_asked()
    assert command.refresh() == 0
    assert site.metadata_asked() == ["2.root.json", "timestamp.json"]
    assert (command.metadata / "timestamp.json").read_bytes() == kept


@pytest.mark.parametrize("roles", [("snapshot",), ("timestamp", "snapshot")])
def test_a_signed_rotation_of_its_keys_frees_a_role_that_was_wound_forward(
    command: Commands, site: Site, roles: tuple[str, ...]
) -> None:
    forward = site.targets["targets"] if roles == ("snapshot",) else site.snapshot
    forward.signed.version = 5000
    site.publish()
    assert command.refresh() == 0
    site.rotate(*roles)
    forward.signed.version = 1
    site.publish()
    assert command.refresh() == 0
    assert command.kept()["targets" if roles == ("snapshot",) else "snapshot"] == 2


def test_a_snapshot_that_drops_a_role_is_refused(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.delegate("targets", "team")
    site.publish()
    assert command.refresh() == 0
    del site.snapshot.signed.meta["team.json"]
    site.publish("targets")
    _refused(command, capsys, Reason.METADATA_MISMATCH)
    assert command.kept()["snapshot"] == 2


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_a_document_of_another_moment_is_refused(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    assert command.refresh() == 0
    site.publish()
    site.files[f"metadata/2.{role}.json"] = site.files[f"metadata/1.{role}.json"]
    _refused(command, capsys, Reason.METADATA_MISMATCH)
    assert command.kept()[role] == 1


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_document_that_is_missing_is_missed_and_what_came_before_is_kept(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    assert command.refresh() == 0
    site.publish()
    del site.files[f"metadata/{role}.json" if role == "timestamp" else f"metadata/2.{role}.json"]
    _refused(command, capsys, Reason.NOT_FOUND)
    assert command.kept()["timestamp"] == (1 if role == "timestamp" else 2)


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_a_frozen_role_is_refused_once_it_expired(command: Commands, site: Site, role: str) -> None:
    long = site.root.signed.expires.replace(year=site.root.signed.expires.year + 1)
    documents = {"root": site.root, "timestamp": site.timestamp, "snapshot": site.snapshot}
    documents["targets"] = site.targets["targets"]
    for name, document in documents.items():
        if name != role:
            document.signed.expires = long
    site.next_root()
    site.publish()
    assert command.refresh() == 0
    with pytest.raises(OtaError) as refused:
        command.later(30).refresh()
    assert refused.value.reason is Reason(f"{role}_expired")


def test_an_expired_root_is_kept_and_followed(command: Commands, site: Site) -> None:
    good = site.root.signed.expires
    site.root.signed.expires = good.replace(year=good.year - 2)
    site.next_root()
    assert command.refresh() == 1
    assert command.kept() == {"root": 2}
    site.root.signed.expires = good
    site.next_root()
    assert command.refresh() == 0


def test_a_document_of_another_type_in_its_place_is_refused(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.root.signed.add_key(site.signers["timestamp"][0].public_key, "targets")
    site.signers["targets"].append(site.signers["timestamp"][0])
    site.next_root()
    site.publish()
    site.files["metadata/timestamp.json"] = site.files["metadata/targets.json"]
    _refused(command, capsys, Reason.METADATA_MISMATCH)


def test_members_that_nobody_defined_are_signed_and_kept(command: Commands, site: Site) -> None:
    site.root.signed.unrecognized_fields["note"] = {"deep": [1, "two", None]}
    site.root.signed.roles["root"].unrecognized_fields["note"] = "x"
    site.next_root()
    assert command.refresh() == 0
    assert (command.metadata / "root.json").read_bytes() == site.files["metadata/2.root.json"]


def test_a_server_that_is_away_is_told_from_a_document_that_is_missing(
    command: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    command.url = "http://127.0.0.1:9"
    _refused(command, capsys, Reason.SOURCE_UNREACHABLE)
