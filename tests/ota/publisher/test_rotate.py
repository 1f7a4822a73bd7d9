"""Keys are replaced without losing a client that knows the old ones, and the old ones are worth nothing afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Targets

from ota.errors import OtaError
from ota.publisher import files
from ota.publisher.director import grant
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.publisher.rotate import rotate
from tests.ota.publisher.conftest import Build, FakeDevice, StockClient, model_bytes

TARGET = "person/1.0.0/release.json"
EVERY = ("root-1", "root-2", "root-3", "targets", "snapshot", "timestamp", "director", "release-person")


@pytest.fixture
def published(repository: Repository, build: Build, device: FakeDevice, client: StockClient) -> Repository:
    """A release, granted, and a client that has seen it."""
    build()
    publish(repository)
    grant(repository, device.name, "person", "1.0.0")
    assert client.fetch(TARGET) is not None
    return repository


def desired_verifies(repository: Repository, client: StockClient) -> bool:
    targets = Metadata[Targets].from_file(str(client.state / "metadata/targets.json")).signed
    desired = Metadata[Targets].from_bytes(repository.read_desired("cam-1") or b"")
    return targets.get_verification_result("director", desired.signed_bytes, desired.signatures).verified


def keyid(repository: Repository, name: str) -> str:
    return repository.keys.signer(name).public_key.keyid


@pytest.mark.parametrize("name", EVERY)
def test_an_old_and_a_new_client_follow_a_replaced_key(
    published: Repository, client: StockClient, build: Build, tmp_path: Path, name: str
) -> None:
    before = keyid(published, name)
    rotated = rotate(published, name)
    assert rotated.keyid == keyid(published, name) != before
    assert rotated.retired is not None
    assert rotated.retired.stat().st_mode & 0o777 == 0o600
    build("1.1.0", model_bytes(2))
    publish(published)
    newcomer = StockClient(published.path, tmp_path / "newcomer")
    for follower in (client, newcomer):
        assert follower.fetch("person/1.1.0/release.json") is not None
        assert desired_verifies(published, follower)
    delegations = published.targets().signed.delegations
    assert delegations is not None
    assert before not in {*published.root().signed.keys, *delegations.keys}


def test_every_key_in_turn_and_all_roots_are_kept(published: Repository, client: StockClient) -> None:
    for name in EVERY:
        rotate(published, name)
    assert published.root_version() == 7
    assert client.fetch(TARGET) is not None
    assert desired_verifies(published, client)
    assert all(published.read_metadata("root", version) for version in range(1, 8))


@pytest.mark.parametrize("name", ["timestamp", "snapshot", "targets", "release-person"])
def test_a_stolen_key_signs_nothing_that_clients_take_after_its_replacement(
    published: Repository, client: StockClient, tmp_path: Path, name: str
) -> None:
    stolen = published.keys.signer(name)
    rotate(published, name)
    assert client.fetch(TARGET) is not None
    version = {"timestamp": None, "snapshot": published.snapshot().signed.version}.get(
        name, published.snapshot().signed.meta.get(f"{name}.json", MetaFile()).version
    )
    path = published.metadata_path(name, version)
    forged = Metadata.from_bytes(path.read_bytes())
    forged.sign(stolen)
    path.write_bytes(forged.to_bytes())
    with pytest.raises(RepositoryError):
        StockClient(published.path, tmp_path / "newcomer").fetch(TARGET)


@pytest.mark.parametrize(("name", "cuts"), [("root-2", 5), ("snapshot", 6), ("director", 8), ("release-person", 7)])
def test_an_interrupted_replacement_is_finished_by_the_same_command(
    published: Repository, client: StockClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cuts: int
) -> None:
    """`cuts` is the number of writes and renames of one replacement; the cut comes before each of them."""

    class PowerCut(BaseException):
        pass

    def counted(act: Callable[..., None], acts: Iterator[int], cut: int) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            if next(acts) == cut:
                raise PowerCut
            act(*arguments)

        return run

    for cut in range(cuts):
        repository = Repository.open(shutil.copytree(published.path, tmp_path / f"{cut}"))
        acts = count()
        with monkeypatch.context() as patch:
            for act in ("write_atomic", "rename"):
                patch.setattr(files, act, counted(getattr(files, act), acts, cut))
            with pytest.raises(PowerCut):
                rotate(repository, name)
        rotate(repository, name)
        follower = StockClient(repository.path, shutil.copytree(client.state, tmp_path / f"client-{cut}"))
        assert follower.fetch(TARGET) is not None
        assert desired_verifies(repository, follower)
        assert not list((repository.path / "keys").glob("*.next.pem"))
    monkeypatch.setattr(files, "write_atomic", counted(files.write_atomic, acts := count(), -1))
    monkeypatch.setattr(files, "rename", counted(files.rename, acts, -1))
    rotate(published, name)
    assert next(acts) == cuts


def test_a_root_needs_two_of_the_old_keys(published: Repository) -> None:
    keys = published.path / "keys"
    for name in ("root-1", "root-2"):
        (keys / f"{name}.pem").rename(keys / f"{name}.away")
    for name in ("root-1", "root-3", "timestamp"):
        with pytest.raises(OtaError) as refused:
            rotate(published, name)
        assert refused.value.reason.value == "key_missing"
    assert published.root_version() == 1
    publish(published)


def test_a_lost_root_key_is_replaced_by_the_other_two(published: Repository, client: StockClient) -> None:
    lost = keyid(published, "root-2")
    (published.path / "keys/root-2.pem").unlink()
    assert rotate(published, "root-2").retired is None
    assert lost not in published.root().signed.roles["root"].keyids
    assert len(published.root().signed.roles["root"].keyids) == 3
    assert client.fetch(TARGET) is not None


def test_an_unknown_key_is_refused_with_those_there_are(published: Repository) -> None:
    for name in ("release-meter", "../ca", "ca", "director-hpke"):
        with pytest.raises(OtaError, match="there is no signing key") as refused:
            rotate(published, name)
        assert "release-person" in refused.value.hint


@pytest.mark.parametrize("name", ["timestamp", "director", "release-person"])
def test_nothing_is_signed_with_a_key_that_clients_do_not_know(
    published: Repository, client: StockClient, build: Build, name: str
) -> None:
    """A key restored from the wrong backup."""
    (published.path / "keys" / f"{name}.pem").unlink()
    published.keys.create_signer(name)
    build("1.1.0", model_bytes(2))
    sign = partial(grant, published, "cam-1", "person", "1.0.0") if name == "director" else partial(publish, published)
    with pytest.raises(OtaError, match=f"key {name}.pem is not the one") as refused:
        sign()
    assert refused.value.reason.value == "bad_signature"
    assert client.fetch(TARGET) is not None
    assert desired_verifies(published, client)
