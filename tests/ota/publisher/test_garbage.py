"""Cleaning a repository: what goes is what nobody needs, and everything that worked before works afterwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ota.errors import OtaError, PublishError, Reason
from ota.publisher import cli, files, sticks
from ota.publisher.director import grant
from ota.publisher.garbage import collect
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.publisher.rollback import allow_rollback
from ota.publisher.sideload import write_sideload
from ota.publisher.stickkeys import rotate as rotate_stick_key
from ota.release import Release
from tests.ota.publisher.conftest import Build, FakeDevice, model_bytes

KINDS = ("payloads", "vault/keys", "vault/plain")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda _: None)


@pytest.fixture
def releases(repository: Repository, build: Build) -> list[Release]:
    """Seven published releases of one line that resemble each other, deltas reaching three back."""
    data = model_bytes(1)
    built = [build(f"1.{number}.0", bytes([number]) + data[1:]) for number in range(7)]
    publish(repository)
    return built


def held(repository: Repository, *kinds: str) -> set[str]:
    return {f"{kind}/{path.name}" for kind in kinds or KINDS for path in (repository.path / kind).iterdir()}


def plaintexts(release: Release) -> set[str]:
    return {f"vault/plain/{part.plain_sha256}" for part in (*release.components, release.golden)}


def state(repository: Repository) -> dict[str, bytes]:
    return {
        str(path.relative_to(repository.path)): path.read_bytes()
        for path in repository.path.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_only_plaintexts_that_no_coming_delta_starts_from_go(
    repository: Repository, releases: list[Release], device: FakeDevice
) -> None:
    grant(repository, device.name, "person", "1.1.0")  # it may be away since then
    before = held(repository)
    collect(repository, delete=True)
    stay = set().union(*(plaintexts(release) for release in (releases[1], *releases[4:])))
    gone = set().union(*(plaintexts(release) for release in releases)) - stay
    assert gone
    assert before - held(repository) == gone


def test_an_order_to_go_back_keeps_what_devices_may_go_back_to(repository: Repository, releases: list[Release]) -> None:
    allow_rollback(repository, "person", "1.2.0")
    collect(repository, delete=True)
    kept = held(repository, "vault/plain")
    assert kept == set().union(*(plaintexts(release) for release in releases[2:]))


def test_every_published_release_is_granted_and_written_to_sticks_as_before(
    repository: Repository, releases: list[Release], device: FakeDevice, tmp_path: Path
) -> None:
    collect(repository, delete=True)
    for release in releases:
        grant(repository, device.name, "person", release.version)
        write_sideload(repository, device.name, tmp_path / release.version)


def test_the_next_releases_get_the_deltas_that_they_would_have_got(
    repository: Repository, releases: list[Release], build: Build
) -> None:
    """Also one that waits to be signed and is built again."""
    data = model_bytes(1)
    waiting = build("1.7.0", b"7" + data[1:])
    collect(repository, delete=True)
    again = build("1.7.0", b"7" + data[1:])
    collect(repository, delete=True)
    following = build("1.8.0", b"8" + data[1:])
    for release, bases in ((again, releases[4:]), (following, [*releases[5:], waiting])):
        found = {delta.base_sha256 for delta in release.components[0].deltas}
        assert found == {base.components[0].plain_sha256 for base in bases}


def test_what_an_interrupted_or_replaced_build_left_goes(
    repository: Repository, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("1.0.0", model_bytes(1))
    publish(repository)
    before = held(repository)
    genuine = files.write_atomic
    for cut in range(6):
        left = iter(range(cut))

        def write_atomic(path: Path, data: bytes, mode: int = files.PUBLIC_MODE) -> None:
            if next(left, None) is None:  # noqa: B023 - used before it changes
                (path.parent / ".tmp-0a_bcdef").write_bytes(data)  # as a killed process leaves it
                raise PublishError(Reason.IO_ERROR, "cut")
            genuine(path, data, mode)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_atomic", write_atomic)
            with pytest.raises(PublishError):
                build("1.1.0", model_bytes(2 + cut))
        assert held(repository) > before
        collect(repository, delete=True)
        assert held(repository) == before
    build("1.1.0", model_bytes(20))
    waiting = build("1.1.0", model_bytes(21))  # takes its place
    collect(repository, delete=True)
    assert held(repository, "vault/plain") - before == plaintexts(waiting) - before
    publish(repository)
    assert [found.paths for found in collect(repository, delete=False)] == [()] * len(KINDS)


def test_a_cut_at_any_removal_leaves_a_smaller_rest_for_the_next_time(
    repository: Repository, releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = repository.path / "payloads" / ("0" * 64)
    there.write_bytes(b"left over")
    genuine, removed = files.remove, 0

    def remove(path: Path) -> None:
        nonlocal removed
        if removed % 2:
            removed += 1
            raise PublishError(Reason.IO_ERROR, "cut")
        removed += 1
        genuine(path)

    monkeypatch.setattr(files, "remove", remove)
    counts = []
    for _ in range(20):
        try:
            collect(repository, delete=True)
        except PublishError:
            counts.append(len(held(repository)))
    assert counts == sorted(counts, reverse=True)
    assert not any(found.paths for found in collect(repository, delete=False))
    for release in releases:
        assert repository.release(repository.find("person", release.version)).raw == release.raw


def _release(repository: Repository, device: FakeDevice) -> Path:
    return next((repository.path / "targets").rglob("*.release.json"))


def _desired(repository: Repository, device: FakeDevice) -> Path:
    return repository.desired_path(device.name)


def _timestamp(repository: Repository, device: FakeDevice) -> Path:
    return repository.metadata_path("timestamp", None)


@pytest.mark.parametrize("what", [_release, _desired, _timestamp])
def test_while_a_document_cannot_be_read_nothing_is_removed(
    repository: Repository,
    releases: list[Release],
    device: FakeDevice,
    what: Callable[[Repository, FakeDevice], Path],
) -> None:
    grant(repository, device.name, "person", "1.0.0")
    place = what(repository, device)
    place.write_bytes(place.read_bytes()[:-20])
    before = state(repository)
    with pytest.raises(OtaError) as refused:
        collect(repository, delete=True)
    assert refused.value.reason is Reason.STATE_CORRUPT
    assert state(repository) == before


def test_releases_that_an_older_backup_of_the_metadata_does_not_list_keep_their_payloads_and_keys(
    repository: Repository, build: Build, tmp_path: Path
) -> None:
    build("1.0.0", model_bytes(1))
    publish(repository)
    shutil.copytree(repository.path / "metadata", tmp_path / "backup")
    build("1.1.0", model_bytes(2))
    publish(repository)
    before = held(repository)
    shutil.rmtree(repository.path / "metadata")
    (tmp_path / "backup").rename(repository.path / "metadata")
    collect(repository, delete=True)
    assert held(repository) == before


def test_other_peoples_files_stay(repository: Repository, releases: list[Release], tmp_path: Path) -> None:
    for kind in KINDS:
        (repository.path / kind / "README").write_bytes(b"mine")
        (repository.path / kind / ("f" * 64)).symlink_to(tmp_path)
        (repository.path / kind / ("e" * 64)).mkdir()
    collect(repository, delete=True)
    for kind in KINDS:
        assert {"README", "f" * 64, "e" * 64} <= set(os.listdir(repository.path / kind))


def test_of_the_metadata_of_sticks_the_roots_and_the_newest_stay(
    repository: Repository, releases: list[Release], tmp_path: Path
) -> None:
    own = sticks.create(repository)
    device = FakeDevice("cam-1")
    device.enroll(repository)
    grant(repository, device.name, "person", "1.0.0")
    for number in range(4):
        write_sideload(repository, device.name, tmp_path / f"stick{number}")
    rotate_stick_key(repository, "snapshot")
    metadata = own.path / "metadata"
    assert len(list(metadata.iterdir())) > 6
    collect(repository, delete=True)
    snapshot = own.timestamp().signed.snapshot_meta.version
    targets = own.targets().signed.version
    assert sorted(os.listdir(metadata)) == sorted(
        ["1.root.json", "2.root.json", "timestamp.json", f"{snapshot}.snapshot.json", f"{targets}.targets.json"]
    )
    written = write_sideload(repository, device.name, tmp_path / "after")
    assert written.own_root


def test_without_delete_it_only_tells_and_a_running_build_keeps_it_away(
    repository: Repository, releases: list[Release], capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(repository)
    capsys.readouterr()
    assert cli.main(["gc", str(repository.path)]) == 0
    assert "nothing was removed; with --delete" in capsys.readouterr().out
    assert state(repository) == before
    with repository.locked():
        assert cli.main(["gc", str(repository.path), "--delete"]) != 0
    assert "[busy]" in capsys.readouterr().err
    assert state(repository) == before
    assert cli.main(["gc", str(repository.path), "--delete", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    gone = {name for kind in told["garbage"] for name in kind["files"]}
    assert gone == before.keys() - state(repository).keys()
    assert sum(kind["bytes"] for kind in told["garbage"]) == sum(len(before[name]) for name in gone) > 0
