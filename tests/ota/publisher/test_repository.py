"""The directory: created once, keys for the owner alone, and a read API that only knows exact names."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tuf.api.metadata import Metadata, Root

from ota.errors import OtaError
from ota.publisher import files
from ota.publisher.create import create
from ota.publisher.director import grant
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.publisher.settings import Settings
from tests.ota.publisher.conftest import Build, FakeDevice


def test_every_private_key_is_its_owners_alone(repository: Repository, build: Build) -> None:
    os.umask(0)
    build()
    publish(repository)
    assert stat.S_IMODE((repository.path / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE((repository.path / "vault").stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (repository.path / "keys").iterdir()}
    public = {"ca.pem", "broker.pem", "ota_service.pem", "ota_operator.pem"}
    assert {name for name, mode in modes.items() if mode != 0o600} == public
    roles = {"root-1", "root-2", "root-3", "targets", "snapshot", "timestamp", "director", "director-hpke"}
    assert {f"{role}.pem" for role in roles} | {"release-person.pem", "ca.key", "broker.key"} <= modes.keys()
    vault = [path for path in (repository.path / "vault").rglob("*") if path.is_file()]
    assert vault
    assert {stat.S_IMODE(path.stat().st_mode) for path in vault} == {0o600}


@pytest.fixture(autouse=True)
def _umask():
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_a_key_open_to_others_is_not_used(repository: Repository, mode: int) -> None:
    (repository.path / "keys/timestamp.pem").chmod(mode)
    with pytest.raises(OtaError, match="open to others") as refused:
        publish(repository)
    assert refused.value.reason.value == "unsafe_file"
    assert "chmod 600" in refused.value.hint


def test_a_key_behind_a_link_an_absent_and_a_foreign_key_are_refused(repository: Repository) -> None:
    keys = repository.path / "keys"
    (keys / "timestamp.pem").rename(keys / "elsewhere.pem")
    with pytest.raises(OtaError) as absent:
        publish(repository)
    assert absent.value.reason.value == "key_missing"
    (keys / "timestamp.pem").symlink_to("elsewhere.pem")
    with pytest.raises(OtaError, match="symbolic link") as linked:
        publish(repository)
    assert linked.value.reason.value == "unsafe_file"
    (keys / "timestamp.pem").unlink()
    files.write_atomic(keys / "timestamp.pem", (keys / "director-hpke.pem").read_bytes(), 0o600)
    with pytest.raises(OtaError, match="not a key of the kind Ed25519PrivateKey"):
        publish(repository)
    files.write_atomic(keys / "timestamp.pem", b"", 0o600)
    with pytest.raises(OtaError, match="not a private key in PEM form"):
        publish(repository)


def test_a_second_creation_is_refused_and_changes_nothing(repository: Repository) -> None:
    before = {path: path.read_bytes() for path in repository.path.rglob("*") if path.is_file()}
    with pytest.raises(OtaError) as refused:
        create(repository.path)
    assert refused.value.reason.value == "repository_exists"
    assert {path: path.read_bytes() for path in repository.path.rglob("*") if path.is_file()} == before


def test_a_directory_with_anything_in_it_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for taken in (tmp_path, tmp_path / "a"):
        with pytest.raises(OtaError) as refused:
            create(taken)
        assert refused.value.reason.value == "repository_exists"


def test_an_empty_directory_is_taken_and_settings_are_kept(tmp_path: Path) -> None:
    created = create(tmp_path, configured=Settings(tenant="factory-7", timestamp_days=2))
    assert Repository.open(tmp_path).settings == created.settings
    assert Repository.open(tmp_path).tenant == "factory-7"


def test_an_interrupted_creation_is_no_repository(tmp_path: Path) -> None:
    create(tmp_path / "r")
    (tmp_path / "r/repo.toml").unlink()
    with pytest.raises(OtaError) as refused:
        Repository.open(tmp_path / "r")
    assert refused.value.reason.value == "repository_missing"


def test_the_root_needs_two_of_three_keys(repository: Repository) -> None:
    root = Metadata[Root].from_bytes(repository.read_metadata("root", 1) or b"")
    assert (root.signed.roles["root"].threshold, len(set(root.signed.roles["root"].keyids))) == (2, 3)
    online = {keyid for role in ("targets", "snapshot", "timestamp") for keyid in root.signed.roles[role].keyids}
    assert len(online) == 3
    assert not online & set(root.signed.roles["root"].keyids)
    assert root.signed.consistent_snapshot


def test_the_read_api_gives_what_is_published(repository: Repository, build: Build, device: FakeDevice) -> None:
    release = build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    assert (repository.read_metadata("timestamp", None) or b"").startswith(b'{"sign')
    for role, version in (("root", 1), ("snapshot", 2), ("targets", 2), ("release-person", 1)):
        assert repository.read_metadata(role, version)
    assert repository.read_target("person/1.0.0/release.json", release.sha256) == release.raw
    assert repository.read_desired(device.name)
    fd, length = repository.open_payload(release.components[0].full.sha256) or (-1, 0)
    os.close(fd)
    assert length == release.components[0].full.length


@pytest.mark.parametrize(
    ("role", "version"),
    [
        ("timestamp", 1), ("root", None), ("root", 0), ("root", -1), ("root", 99), ("root", 1 << 70),
        ("snapshot", None), ("director", 1), ("release-", 1), ("release-../../keys/ca", 1), ("../keys/ca", None),
        ("release-person/../../x", 1), ("", 1), ("1.root", 1), ("release-meter", 1), ("ROOT", 1),
    ],
)  # fmt: skip
def test_metadata_of_no_exact_name_is_not_there(
    repository: Repository, build: Build, role: str, version: int | None
) -> None:
    build()
    publish(repository)
    assert repository.read_metadata(role, version) is None


def test_what_happens_to_lie_where_a_hostile_role_points_is_not_given_out(repository: Repository) -> None:
    (repository.path / "metadata/1.director.json").write_bytes(b"{}")
    (repository.path / "metadata/1.x").mkdir()
    (repository.path / "keys/secret.json").write_bytes(b"{}")
    for role in ("director", "x/../../keys/secret", "release-x/../../keys/secret"):
        assert repository.read_metadata(role, 1) is None


def test_hostile_names_of_targets_devices_and_payloads_are_not_there(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    release = build()
    publish(repository)
    for path in (
        "../keys/ca.key",
        "/etc/passwd",
        "person/../person/1.0.0/release.json",
        "",
        "person//1.0.0",
        "a" * 300,
    ):
        assert repository.read_target(path, release.sha256) is None
    for sha256 in ("", "0" * 64, release.sha256.upper(), "../" + "0" * 61, release.sha256 + "\n"):
        assert repository.read_target("person/1.0.0/release.json", sha256) is None
        assert repository.open_payload(sha256) is None
    for name in ("", "..", "cam-1/../cam-1", "CAM-1", "cam-1\n", "fleet", "x" * 49):
        assert repository.read_desired(name) is None


def test_a_link_in_the_place_of_a_payload_is_refused(repository: Repository) -> None:
    sha256 = "a" * 64
    repository.payload_path(sha256).symlink_to(repository.path / "keys/ca.key")
    with pytest.raises(OtaError) as refused:
        repository.open_payload(sha256)
    assert refused.value.reason.value == "unsafe_file"
    repository.payload_path(sha256).unlink()
    os.mkfifo(repository.payload_path(sha256))
    with pytest.raises(OtaError, match="not a regular file"):
        repository.open_payload(sha256)


def test_a_second_writer_waits_for_moments_and_is_told_to_try_again_after_that(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with repository.locked():
            taken.set()
            release.wait(60)

    first = threading.Thread(target=hold)
    first.start()
    taken.wait(60)
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.1)
    with pytest.raises(OtaError) as refused:
        publish(repository)
    assert (refused.value.reason.value, refused.value.retry) == ("busy", True)
    monkeypatch.setattr(files, "LOCK_WAIT_S", 60.0)
    threading.Timer(0.3, release.set).start()
    publish(repository)
    first.join()


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_atomic(tmp_path / "a", b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OtaError) as refused:
        files.write_atomic(tmp_path / "a", b"new")
    assert refused.value.reason.value == "no_space"
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_the_brokers_certificate_is_for_its_names_and_signed_by_the_authority(tmp_path: Path) -> None:
    repository = create(tmp_path / "r", broker_names=("broker.example", "10.0.0.7"))
    authority = repository.authority.certificate()
    for paths, purpose in (
        (repository.authority.broker_tls, ExtendedKeyUsageOID.SERVER_AUTH),
        (repository.authority.service_tls, ExtendedKeyUsageOID.CLIENT_AUTH),
        (repository.authority.operator_tls, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        certificate = x509.load_pem_x509_certificate(paths.certificate.read_bytes())
        certificate.verify_directly_issued_by(authority)
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
    assert repository.authority.broker_names() == ("broker.example", "10.0.0.7")
    key = repository.keys.load("broker.key", ec.EllipticCurvePrivateKey)
    server = x509.load_pem_x509_certificate(repository.authority.broker_tls.certificate.read_bytes())
    assert server.public_key() == key.public_key()
    names = {
        x509.load_pem_x509_certificate(p.certificate.read_bytes())
        .subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0]
        .value
        for p in (repository.authority.service_tls, repository.authority.operator_tls)
    }
    assert names == {"ota_service", "ota_operator"}


@pytest.mark.parametrize("name", ["", "a b", "-", "a..b", "x" * 64, "*.example"])
def test_a_broker_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OtaError, match="neither a host name nor an address"):
        create(tmp_path / "r", broker_names=(name,))


def test_a_tampered_release_file_is_noticed_before_it_is_granted(
    repository: Repository, build: Build, device: FakeDevice
) -> None:
    release = build()
    publish(repository)
    place = repository.target_path("person/1.0.0/release.json", release.sha256)
    place.write_bytes(release.raw.replace(b"Apache", b"apache"))
    with pytest.raises(OtaError, match="gone or damaged") as refused:
        grant(repository, device.name, "person", "1.0.0")
    assert refused.value.reason.value == "state_corrupt"
    assert repository.read_desired(device.name) is None
