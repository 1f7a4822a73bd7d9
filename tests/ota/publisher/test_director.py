"""Grants: only the device they were made for opens them, and a device's document only moves forward."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tuf.api.metadata import Metadata, Targets

from ota import payload
from ota.errors import OtaError, PayloadError
from ota.publisher import director
from ota.publisher.director import desired_releases, grant, renew
from ota.publisher.enroll import enroll, load_device, store_device
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.publisher.revocation import revoke
from ota.publisher.vault import Vault
from tests.ota.publisher.conftest import Build, FakeDevice, ManualClock, model_bytes


def document(repository: Repository, device: FakeDevice) -> Targets:
    return Metadata[Targets].from_bytes(repository.read_desired(device.name) or b"").signed


def grants(repository: Repository, device: FakeDevice) -> dict[str, Any]:
    found: dict[str, Any] = document(repository, device).unrecognized_fields["grants"]
    return found


def wrapped(entry: dict[str, str]) -> bytes:
    return base64.b64decode(entry["wrapped"], validate=True)


def test_the_device_opens_every_key_of_its_release(repository: Repository, build: Build, device: FakeDevice) -> None:
    release = build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    found = grants(repository, device)
    assert found.keys() == {c.full.cek_id for c in (*release.components, release.golden)}
    for cek_id, entry in found.items():
        info = payload.grant_info(device.name, "person", "1.0.0", cek_id)
        opened = payload.unwrap_key(wrapped(entry), device.hpke, info)
        assert opened == Vault(repository).key("person", "1.0.0", cek_id)
        assert entry["kid"] == load_device(repository, device.name).kid


def test_no_other_key_device_release_or_key_id_opens_a_grant(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    (cek_id, entry), (other_id, _) = grants(repository, device).items()
    good = ("cam-1", "person", "1.0.0", cek_id)
    for key, info in [
        (X25519PrivateKey.generate(), good),
        (device.hpke, ("cam-2", *good[1:])),
        (device.hpke, ("cam-1", "meter", "1.0.0", cek_id)),
        (device.hpke, ("cam-1", "person", "1.0.1", cek_id)),
        (device.hpke, (*good[:3], other_id)),
    ]:
        with pytest.raises(PayloadError) as refused:
            payload.unwrap_key(wrapped(entry), key, payload.grant_info(*info))
        assert refused.value.reason.value == "not_for_this_device"
    payload.unwrap_key(wrapped(entry), device.hpke, payload.grant_info(*good))


def test_the_vaults_own_wrapping_is_no_grant_for_a_device_called_like_the_vault(
    repository: Repository, build: Build
) -> None:
    release = build()
    cek_id = release.golden.full.cek_id
    stored = (repository.path / "vault/keys" / cek_id).read_bytes()
    with pytest.raises(PayloadError):
        payload.unwrap_key(
            stored, repository.keys.director_hpke(), payload.grant_info("vault", "person", "1.0.0", cek_id)
        )


def test_a_grant_replaces_its_line_and_keeps_the_others(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    build("1.0.0")
    build("1.1.0", model_bytes(2))
    meter = build("0.1.0", model_bytes(3), line="meter")
    publish(repository)
    versions = []
    for line, version in (("person", "1.0.0"), ("meter", "0.1.0"), ("person", "1.1.0")):
        versions.append(grant(repository, device.name, line, version).version)
    assert versions == [1, 2, 3]
    assert set(document(repository, device).targets) == {"person/1.1.0/release.json", "meter/0.1.0/release.json"}
    assert meter.golden.full.cek_id in grants(repository, device)
    assert len(grants(repository, device)) == 4


def test_the_version_grows_even_when_the_document_was_lost(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    grant(repository, device.name, "person", "1.0.0")
    repository.desired_path(device.name).unlink()
    assert grant(repository, device.name, "person", "1.0.0").version == 3


def test_documents_past_half_of_their_life_are_renewed(
    repository: Repository, build: Build, device: FakeDevice, clock: ManualClock
) -> None:
    build()
    publish(repository)
    first = grant(repository, device.name, "person", "1.0.0")
    assert renew(repository) == []
    clock.advance(days=16)
    (second,) = renew(repository)
    assert (second.version, second.releases) == (2, first.releases)
    assert (second.expires - first.expires).days in (15, 16)


def test_a_document_whose_grants_are_for_a_key_that_the_device_replaced_is_renewed(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    known = load_device(repository, device.name)
    newer = FakeDevice(device.name).hpke.public_key().public_bytes_raw()
    with repository.locked():
        store_device(repository, dataclasses.replace(known, hpke_public=newer, former_hpke=known.hpke_public))
    (signed,) = renew(repository)
    kids = {one["kid"] for one in grants(repository, device).values()}
    assert (signed.version, kids) == (2, {payload.key_id(newer)})
    assert renew(repository) == []
    with repository.locked():
        former = load_device(repository, device.name)
        store_device(repository, dataclasses.replace(former, former_hpke=newer))
    revoke(repository, device.name)
    assert renew(repository) == []


def test_a_damaged_record_of_one_device_costs_no_other_its_renewal(
    repository: Repository, build: Build, device: FakeDevice, clock: ManualClock
) -> None:
    build()
    publish(repository)
    others = [FakeDevice("belt-1"), FakeDevice("cam-2")]
    for other in others:
        other.enroll(repository)
    for one in (device, *others):
        grant(repository, one.name, "person", "1.0.0")
    (repository.path / "devices/cam-1/device.json").write_bytes(b"{")
    clock.advance(days=16)
    publish(repository)
    with pytest.raises(OtaError, match="cam-1"):
        renew(repository)
    assert [document(repository, other).version for other in others] == [2, 2]


def test_a_device_that_comes_back_with_a_new_key_gets_grants_for_it(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    device.hpke = X25519PrivateKey.generate()
    enroll(repository, device.request(), host="h", port=1, replace=True)
    (signed,) = renew(repository, everything=True, only=device.name)
    assert signed.version == 2
    cek_id, entry = next(iter(grants(repository, device).items()))
    payload.unwrap_key(wrapped(entry), device.hpke, payload.grant_info(device.name, "person", "1.0.0", cek_id))


def test_more_lines_than_a_device_takes_are_refused_and_the_document_stays(
    repository: Repository, build: Build, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(director, "MAX_ASSIGNMENTS", 2)
    for line in ("one", "three", "two"):
        build("1.0.0", line=line)
    publish(repository)
    grant(repository, device.name, "one", "1.0.0")
    grant(repository, device.name, "two", "1.0.0")
    with pytest.raises(OtaError, match="a device takes 2") as refused:
        grant(repository, device.name, "three", "1.0.0")
    assert refused.value.reason.value == "metadata_too_large"
    assert [listed.line for listed in desired_releases(repository, device.name)] == ["one", "two"]
    monkeypatch.setattr(director, "MAX_ASSIGNMENTS", 1)
    revoke(repository, device.name)
    assert document(repository, device).unrecognized_fields["revoked"] is True


def test_a_document_that_its_device_would_not_read_is_not_written(
    repository: Repository, build: Build, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    monkeypatch.setattr(director, "_MAX_BYTES", len(repository.read_desired(device.name) or b"") - 1)
    with pytest.raises(OtaError) as refused:
        grant(repository, device.name, "person", "1.0.0")
    assert refused.value.reason.value == "metadata_too_large"
    assert load_device(repository, device.name).desired_version == document(repository, device).version == 1


def test_unknown_devices_and_releases_are_refused_by_name(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    build("1.0.0")
    publish(repository)
    build("1.1.0", model_bytes(2))
    for arguments, reason, text in [
        (("cam-2", "person", "1.0.0"), "unknown_device", "cam-2 is not enrolled"),
        (("../cam-1", "person", "1.0.0"), "unknown_device", "is not allowed"),
        (("cam-1", "person", "9.9.9"), "unknown_release", "person 9.9.9 is not published"),
        (("cam-1", "meter", "1.0.0"), "unknown_release", "meter 1.0.0 is not published"),
        (("cam-1", "..", ".."), "unknown_release", "is not published"),
    ]:
        with pytest.raises(OtaError, match=text) as refused:
            grant(repository, *arguments)
        assert refused.value.reason.value == reason
    with pytest.raises(OtaError) as refused:
        grant(repository, "cam-1", "person", "1.1.0")
    assert refused.value.hint.startswith("it is built but not signed: edge-ota publish")
    assert desired_releases(repository, "cam-1") == []


def test_a_lost_content_key_is_named(repository: Repository, build: Build, device: FakeDevice) -> None:
    release = build()
    publish(repository)
    key = repository.path / "vault/keys" / release.golden.full.cek_id
    key.write_bytes(bytes(80))
    with pytest.raises(OtaError, match="does not open with director-hpke"):
        grant(repository, device.name, "person", "1.0.0")
    key.unlink()
    with pytest.raises(OtaError) as refused:
        grant(repository, device.name, "person", "1.0.0")
    assert refused.value.reason.value == "key_missing"
