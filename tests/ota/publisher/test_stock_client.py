"""What the publisher signs is valid for python-tuf's own client, which shares no code with ours."""

from __future__ import annotations

import pytest
from tuf.api.exceptions import ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata, Targets

from ota.errors import OtaError
from ota.publisher import files
from ota.publisher.create import create
from ota.publisher.director import grant
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.release import parse
from tests.ota.publisher.conftest import Build, FakeDevice, ManualClock, StockClient, model_bytes


def test_an_empty_repository_is_valid(client: StockClient) -> None:
    assert client.fetch("person/1.0.0/release.json") is None


def test_a_release_is_found_through_its_lines_delegated_role(
    repository: Repository, client: StockClient, build: Build
) -> None:
    release = build()
    publish(repository)
    fetched = client.fetch("person/1.0.0/release.json")
    assert fetched is not None
    assert parse(fetched) == release
    assert {"1.targets.json", "2.targets.json"} & set(client.fetcher.fetched) == {"2.targets.json"}
    assert "1.release-person.json" in client.fetcher.fetched


def test_a_client_with_older_state_follows_new_releases_and_new_lines(
    repository: Repository, client: StockClient, build: Build
) -> None:
    build("1.0.0")
    publish(repository)
    assert client.fetch("person/1.0.0/release.json") is not None
    build("1.1.0", model_bytes(2))
    build("0.1.0", model_bytes(3), line="meter")
    publish(repository)
    for target in ("person/1.0.0/release.json", "person/1.1.0/release.json", "meter/0.1.0/release.json"):
        assert client.fetch(target) is not None


def test_a_prepared_release_is_invisible_until_it_is_signed(
    repository: Repository, client: StockClient, build: Build
) -> None:
    build("1.0.0")
    build("1.1.0", model_bytes(2))
    publish(repository, [("person", "1.0.0")])
    assert client.fetch("person/1.0.0/release.json") is not None
    assert client.fetch("person/1.1.0/release.json") is None
    assert [r.version for r in repository.prepared()] == ["1.1.0"]


def test_publishing_nothing_renews_the_timestamp_alone(repository: Repository, client: StockClient) -> None:
    client.fetch("x")
    assert publish(repository).roles == {"timestamp": 2}
    client.fetcher.fetched.clear()
    client.fetch("x")
    assert set(client.fetcher.fetched) == {"2.root.json", "timestamp.json"}


def test_metadata_past_half_of_its_life_is_signed_anew(
    repository: Repository, client: StockClient, build: Build, clock: ManualClock
) -> None:
    build()
    publish(repository)
    clock.advance(days=16)
    assert publish(repository).roles == {"snapshot": 3, "timestamp": 3}
    clock.advance(days=170)
    assert publish(repository).roles == {"targets": 3, "release-person": 2, "snapshot": 4, "timestamp": 4}
    assert client.fetch("person/1.0.0/release.json") is not None


@pytest.mark.parametrize("name", ["targets", "release-person"])
def test_a_key_that_is_kept_elsewhere_holds_up_only_what_it_signs(
    repository: Repository, client: StockClient, build: Build, clock: ManualClock, name: str
) -> None:
    build()
    publish(repository)
    (key := repository.keys.directory / f"{name}.pem").rename(away := key.with_suffix(".away"))
    clock.advance(days=170)
    assert publish(repository).waiting == {}
    clock.advance(days=20)
    signed = publish(repository)
    assert signed.waiting.keys() == {name}
    assert name not in signed.roles
    clock.advance(days=6)
    publish(repository)
    assert client.fetch("person/1.0.0/release.json") is not None
    away.rename(key)
    signed = publish(repository)
    assert name in signed.roles
    assert not signed.waiting


def test_a_release_whose_key_is_elsewhere_waits_and_the_rest_is_published(
    repository: Repository, client: StockClient, build: Build
) -> None:
    build()
    publish(repository)
    (key := repository.keys.directory / "targets.pem").rename(away := key.with_suffix(".away"))
    build("1.1.0", model_bytes(2))
    build("0.1.0", model_bytes(3), line="meter")
    signed = publish(repository)
    assert signed.unsigned == {("meter", "0.1.0"): "targets"}
    assert signed.roles.keys() == {"release-person", "snapshot", "timestamp"}
    assert [release.version for release in signed.releases] == ["1.1.0"]
    assert client.fetch("person/1.1.0/release.json") is not None
    assert [(r.line, r.version) for r in repository.prepared()] == [("meter", "0.1.0")]
    with pytest.raises(OtaError) as refused:
        publish(repository, [("meter", "0.1.0")])
    assert refused.value.reason.value == "key_missing"
    away.rename(key)
    assert not publish(repository).unsigned
    assert client.fetch("meter/0.1.0/release.json") is not None


def test_what_a_device_would_not_read_is_not_published(
    repository: Repository, client: StockClient, build: Build
) -> None:
    build()
    publish(repository)
    role = repository.targets("release-person")
    role.signed.unrecognized_fields["note"] = "n" * (1 << 20)
    role.sign(repository.keys.signer("release-person"))
    version = role.signed.version
    files.write_atomic(repository.metadata_path("release-person", version), role.to_bytes())
    build("1.1.0", model_bytes(2))
    with pytest.raises(OtaError) as refused:
        publish(repository)
    assert refused.value.reason.value == "metadata_too_large"
    assert not repository.metadata_path("release-person", version + 1).exists()


def test_a_repository_nobody_renews_expires(tmp_path, clock: ManualClock) -> None:
    clock.advance(days=-8)
    repository = create(tmp_path / "old", now=clock)
    with pytest.raises(ExpiredMetadataError):
        StockClient(repository.path, tmp_path / "state").fetch("x")


@pytest.mark.parametrize(
    "name", ["timestamp.json", "2.snapshot.json", "2.targets.json", "1.release-person.json", "1.root.json"]
)
def test_a_changed_byte_in_any_document_is_refused(
    repository: Repository, client: StockClient, build: Build, name: str
) -> None:
    build()
    publish(repository)
    path = repository.path / "metadata" / name
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"expires":"20', b'"expires":"21'))
    assert path.read_bytes() != data
    with pytest.raises(RepositoryError):
        client.fetch("person/1.0.0/release.json")


def test_a_changed_release_file_is_refused(repository: Repository, client: StockClient, build: Build) -> None:
    release = build()
    publish(repository)
    place = repository.target_path("person/1.0.0/release.json", release.sha256)
    place.write_bytes(place.read_bytes().replace(b"Apache", b"apache"))
    with pytest.raises(RepositoryError):
        client.fetch("person/1.0.0/release.json")


def test_the_desired_document_verifies_by_delegation_and_stays_out_of_the_snapshot(
    repository: Repository, client: StockClient, build: Build, device: FakeDevice
) -> None:
    release = build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    client.updater().refresh()
    targets = Metadata[Targets].from_file(str(client.state / "metadata" / "targets.json"))
    desired = Metadata[Targets].from_bytes(repository.read_desired(device.name))
    targets.signed.verify_delegate("director", desired.signed_bytes, desired.signatures)
    desired.signed.targets["person/1.0.0/release.json"].verify_length_and_hashes(release.raw)
    assert desired.signed.unrecognized_fields["device"] == device.name
    assert set(repository.snapshot().signed.meta) == {"targets.json", "release-person.json"}


@pytest.mark.parametrize("cut", range(6))
def test_a_cut_between_any_two_writes_leaves_the_old_or_the_new_repository(
    repository: Repository, client: StockClient, build: Build, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Six files are written for a new line: release.json, targets, the line's role, snapshot, timestamp, and the
    prepared release is taken away last."""
    build("1.0.0", line="meter")
    publish(repository)
    build("1.0.0")
    write, remove, count = files.write_atomic, files.remove, iter(range(100))

    class PowerCut(BaseException):
        pass

    def counted(act):
        def run(*arguments):
            if next(count) == cut:
                raise PowerCut
            return act(*arguments)

        return run

    # the key of the new line comes first and is no part of the order
    repository.keys.create_signer("release-person")
    monkeypatch.setattr(files, "write_atomic", counted(write))
    monkeypatch.setattr(files, "remove", counted(remove))
    with pytest.raises(PowerCut):
        publish(repository)
    monkeypatch.undo()
    assert (client.fetch("person/1.0.0/release.json") is not None) == (cut == 5)
    assert client.fetch("meter/1.0.0/release.json") is not None
    publish(repository)
    assert client.fetch("person/1.0.0/release.json") is not None
    assert repository.prepared() == []


def test_signing_a_release_that_is_not_prepared_names_those_that_are(repository: Repository, build: Build) -> None:
    build()
    with pytest.raises(OtaError, match=r"person 1\.0\.1 is not waiting") as refused:
        publish(repository, [("person", "1.0.1")])
    assert (refused.value.reason.value, refused.value.hint) == ("unknown_release", "waiting: person 1.0.0")
