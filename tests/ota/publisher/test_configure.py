"""Settings for a device: signed into every desired.json until others are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Targets

from ota.client.desired import MAX_SETTINGS_BYTES
from ota.errors import PublishError, Reason
from ota.publisher import cli
from ota.publisher.configure import configure
from ota.publisher.director import grant, resign
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.publisher.revocation import revoke
from tests.ota.publisher.conftest import Build, FakeDevice

TEXT = b'# the belt\n[[source]]\nname = "belt"\n'


def signed(repository: Repository, device: FakeDevice) -> Targets:
    return Metadata[Targets].from_bytes(repository.read_desired(device.name) or b"").signed


def test_settings_reach_a_device_that_was_granted_nothing_and_stay_over_grants(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    assert configure(repository, device.name, TEXT).version == signed(repository, device).version
    assert signed(repository, device).unrecognized_fields["settings"] == TEXT.decode()
    build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    document = signed(repository, device)
    assert document.unrecognized_fields["settings"] == TEXT.decode()
    assert list(document.targets) == ["person/1.0.0/release.json"]


def test_a_device_without_settings_has_none_in_its_document(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    assert "settings" not in signed(repository, device).unrecognized_fields


@pytest.mark.parametrize("data", [b"[[source]\n", b"\xff\xfe", b"#" * (MAX_SETTINGS_BYTES + 1), b"x = " + b"[" * 5000])
def test_what_is_no_toml_or_too_long_is_refused_and_nothing_is_signed(
    repository: Repository, device: FakeDevice, data: bytes
) -> None:
    configure(repository, device.name, TEXT)
    before = repository.read_desired(device.name)
    with pytest.raises(PublishError) as refused:
        configure(repository, device.name, data)
    assert refused.value.reason is Reason.BAD_REQUEST
    assert repository.read_desired(device.name) == before


def test_what_cannot_be_signed_is_not_kept_for_the_next_signature(repository: Repository, device: FakeDevice) -> None:
    configure(repository, device.name, TEXT)
    key = repository.path / "keys/director.pem"
    away = key.rename(key.with_name("elsewhere"))
    with pytest.raises(PublishError) as refused:
        configure(repository, device.name, b"poll_s = 1\n")
    assert refused.value.reason is Reason.KEY_MISSING
    away.rename(key)
    resign(repository, device.name)
    assert signed(repository, device).unrecognized_fields["settings"] == TEXT.decode()


def test_a_revoked_device_is_not_configured(repository: Repository, device: FakeDevice) -> None:
    configure(repository, device.name, TEXT)
    revoke(repository, device.name)
    with pytest.raises(PublishError) as refused:
        configure(repository, device.name, TEXT)
    assert refused.value.reason is Reason.DEVICE_REVOKED
    assert "settings" not in signed(repository, device).unrecognized_fields


def test_the_verb_names_what_it_signed(
    repository: Repository, device: FakeDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.toml").write_bytes(TEXT)
    assert cli.main(["configure", str(repository.path), device.name, str(tmp_path / "new.toml")]) == 0
    assert "is to run with settings" in capsys.readouterr().out
    assert cli.main(["configure", str(repository.path), device.name, str(tmp_path / "absent.toml")]) == 66
