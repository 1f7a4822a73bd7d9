"""Sticks: signed by a repository of their own, long-lived, complete, readable as a directory or as a stored zip."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import tracemalloc
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root, Targets

from ota.errors import OtaError
from ota.publisher import cli, files, sticks
from ota.publisher.director import grant
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.publisher.rotate import rotate
from ota.publisher.sideload import write_sideload
from ota.publisher.stickkeys import rotate as rotate_stick_key
from tests.ota.publisher.conftest import Build, FakeDevice, ManualClock, StockClient, model_bytes

FAT_FILE_BYTES = (4 << 30) - 1


@pytest.fixture
def own(repository: Repository) -> Repository:
    """The repository of sticks."""
    return sticks.create(repository)


@pytest.fixture
def granted(repository: Repository, own: Repository, build: Build) -> FakeDevice:
    """A device that pins the root of sticks, with two lines; another line and device exist beside it."""
    data = model_bytes(1)
    build("1.0.0", data)
    build("1.1.0", bytes([data[0] ^ 1]) + data[1:])
    build("0.1.0", model_bytes(3), line="meter")
    build("0.1.0", model_bytes(4), line="other")
    publish(repository)
    device = FakeDevice("cam-1")
    bundle = json.loads(device.enroll(repository).bundle)
    assert Metadata[Root].from_bytes(bundle["sideload_root"].encode()).signed.version == 1
    grant(repository, device.name, "person", "1.1.0")
    grant(repository, device.name, "meter", "0.1.0")
    return device


def content(place: Path) -> dict[str, bytes]:
    """Every file of a stick by name."""
    if place.is_dir():
        return {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*") if p.is_file()}
    with zipfile.ZipFile(place) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def unpacked(place: Path, to: Path) -> Path:
    """As a directory, for a client that knows nothing of zips."""
    if place.is_dir():
        return place
    with zipfile.ZipFile(place) as archive:
        archive.extractall(to)
    return to


@pytest.mark.parametrize("name", ["stick", "stick.zip"])
def test_any_client_that_starts_from_the_root_of_sticks_verifies_all_of_it(
    repository: Repository, granted: FakeDevice, tmp_path: Path, name: str
) -> None:
    written = write_sideload(repository, granted.name, tmp_path / name)
    client = StockClient(unpacked(tmp_path / name, tmp_path / "unpacked"), tmp_path / "state")
    for line, version in (("person", "1.1.0"), ("meter", "0.1.0")):
        assert client.fetch(f"{line}/{version}/release.json") is not None
    found = content(tmp_path / name)
    assert (written.files, written.bytes, written.own_root) == (len(found), sum(map(len, found.values())), True)


def test_release_roles_releases_and_payloads_are_those_of_the_fleet_byte_for_byte(
    repository: Repository, own: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    write_sideload(repository, granted.name, tmp_path / "stick")
    same, signed_for_sticks = set(), set()
    for name, data in content(tmp_path / "stick").items():
        place = repository.path / name
        (same if place.is_file() and place.read_bytes() == data else signed_for_sticks).add(name)
    roles = {re.sub(r"^metadata/\d+\.", "", name) for name in same if name.startswith("metadata/")}
    assert roles == {"release-person.json", "release-meter.json"}
    assert {re.sub(r"\d+\.", "", name) for name in signed_for_sticks} == {
        "metadata/root.json", "metadata/targets.json", "metadata/snapshot.json", "metadata/timestamp.json",
        "devices/cam-1/desired.json",
    }  # fmt: skip


def test_a_directory_and_a_zip_hold_the_same_files(repository: Repository, granted: FakeDevice, tmp_path: Path) -> None:
    for name in ("stick", "stick.zip"):
        write_sideload(repository, granted.name, tmp_path / name)
    directory, zipped = content(tmp_path / "stick"), content(tmp_path / "stick.zip")
    versions = re.compile(r"\d+\.(snapshot|targets)")
    assert {versions.sub(r"\1", name) for name in directory} == {versions.sub(r"\1", name) for name in zipped}
    fixed = [name for name in directory if name.startswith(("payloads/", "targets/"))]
    assert fixed
    assert all(directory[name] == zipped[name] for name in fixed)
    with zipfile.ZipFile(tmp_path / "stick.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist()[-1] == "metadata/timestamp.json"


@pytest.mark.fault("F61")
def test_names_and_sizes_fit_on_fat(repository: Repository, granted: FakeDevice, tmp_path: Path) -> None:
    """Lower case, no two alike in any case, no dot or blank at an end, short, below 4 GiB, no links."""
    write_sideload(repository, granted.name, tmp_path / "stick")
    paths = list((tmp_path / "stick").rglob("*"))
    assert not any(path.is_symlink() for path in paths)
    names = [path.relative_to(tmp_path / "stick").as_posix() for path in paths]
    assert len({name.casefold() for name in names}) == len(names)
    for path, name in zip(paths, names, strict=True):
        assert re.fullmatch(r"[a-z0-9._/-]+", name)
        assert not path.name.endswith((".", " "))
        assert len(path.name) <= 80
        assert path.stat().st_size <= FAT_FILE_BYTES


def test_nothing_of_keys_vault_or_other_devices_is_in_it(
    repository: Repository, own: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    FakeDevice("cam-2").enroll(repository)
    grant(repository, "cam-2", "other", "0.1.0")
    write_sideload(repository, granted.name, tmp_path / "stick.zip")
    found = content(tmp_path / "stick.zip")
    assert not [name for name in found if "cam-2" in name or "stick.json" in name or "release-other" in name]
    everything = b"".join(found.values())
    assert b"PRIVATE KEY" not in everything
    for secret in [*(repository.path / "vault").rglob("*"), *own.keys.directory.rglob("*")]:
        if secret.is_file():
            assert secret.read_bytes() not in everything


def test_no_key_of_sticks_signs_anything_online_nor_the_other_way_round(
    repository: Repository, own: Repository, granted: FakeDevice
) -> None:
    online = set(repository.root().signed.keys) | set(repository.targets().signed.delegations.keys)  # type: ignore[union-attr]
    lines = {key for role in ("person", "meter") for key in _keyids(repository, role)}
    alone = set(own.root().signed.keys) | {own.keys.signer("director").public_key.keyid}
    assert not alone & online
    assert lines <= online


def _keyids(repository: Repository, line: str) -> list[str]:
    delegations = repository.targets().signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    return delegations.roles[f"release-{line}"].keyids


@pytest.mark.parametrize("days", [0, 100, 170, 350, 1000])
def test_it_has_a_whole_life_whenever_it_is_made(
    repository: Repository, granted: FakeDevice, tmp_path: Path, clock: ManualClock, days: int
) -> None:
    clock.advance(days=days)
    written = write_sideload(repository, granted.name, tmp_path / "stick")
    assert timedelta(days=179, hours=23) < written.expires - clock() <= timedelta(days=180)
    clock_now = clock()
    documents = content(tmp_path / "stick")
    for name, data in documents.items():
        if name.startswith(("metadata/", "devices/")) and "root" not in name:
            assert Metadata.from_bytes(data).signed.expires >= written.expires > clock_now


def test_a_line_and_a_key_that_are_new_since_the_last_stick_are_on_the_next(
    repository: Repository, granted: FakeDevice, build: Build, tmp_path: Path
) -> None:
    write_sideload(repository, granted.name, tmp_path / "first")
    rotate(repository, "release-person")
    build("2.0.0", model_bytes(9))
    build("0.1.0", model_bytes(8), line="added")
    publish(repository)
    grant(repository, granted.name, "person", "2.0.0")
    grant(repository, granted.name, "added", "0.1.0")
    write_sideload(repository, granted.name, tmp_path / "second")
    client = StockClient(tmp_path / "second", tmp_path / "state")
    assert client.fetch("person/2.0.0/release.json") is not None
    assert client.fetch("added/0.1.0/release.json") is not None


def test_versions_of_the_document_for_a_device_only_grow(
    repository: Repository, own: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    seen = []
    for number in range(3):
        write_sideload(repository, granted.name, tmp_path / f"stick{number}")
        data = (tmp_path / f"stick{number}/devices/cam-1/desired.json").read_bytes()
        seen.append(Metadata[Targets].from_bytes(data).signed.version)
        own.desired_path("cam-1").unlink()  # a lost document does not start again
    assert seen == [1, 2, 3]
    granted.enroll(repository)
    write_sideload(repository, granted.name, tmp_path / "again")
    data = (tmp_path / "again/devices/cam-1/desired.json").read_bytes()
    assert Metadata[Targets].from_bytes(data).signed.version == 4


@pytest.mark.parametrize("key", ["root-1", "root-2", "targets", "snapshot", "timestamp", "director"])
def test_every_key_of_sticks_can_be_replaced(
    repository: Repository, own: Repository, granted: FakeDevice, tmp_path: Path, key: str
) -> None:
    write_sideload(repository, granted.name, tmp_path / "before")
    old = own.keys.signer(key).public_key.keyid
    rotated = rotate_stick_key(repository, key)
    assert own.keys.signer(key).public_key.keyid == rotated.keyid != old
    assert rotated.retired is not None
    write_sideload(repository, granted.name, tmp_path / "after")
    client = StockClient(tmp_path / "after", tmp_path / "state")
    assert client.fetch("meter/0.1.0/release.json") is not None
    assert rotated.root_version == (1 if key == "director" else 2)


def test_sticks_are_written_without_the_keys_of_root_and_targets(
    repository: Repository, own: Repository, granted: FakeDevice, build: Build, tmp_path: Path
) -> None:
    """They can be kept elsewhere until a line or a key is new."""
    write_sideload(repository, granted.name, tmp_path / "first")
    for name in ("root-1", "root-2", "root-3", "targets"):
        (own.keys.directory / f"{name}.pem").rename(tmp_path / f"{name}.pem")
    write_sideload(repository, granted.name, tmp_path / "second.zip")
    build("2.0.0", model_bytes(9), line="added")
    publish(repository)
    with pytest.raises(OtaError) as refused:
        write_sideload(repository, granted.name, tmp_path / "third")
    assert refused.value.reason.value == "key_missing"


def test_without_the_key_of_targets_sticks_are_written_until_targets_end(
    repository: Repository, own: Repository, granted: FakeDevice, clock: ManualClock, tmp_path: Path
) -> None:
    write_sideload(repository, granted.name, tmp_path / "first")
    (own.keys.directory / "targets.pem").rename(tmp_path / "targets.pem")
    clock.advance(200)
    publish(repository)
    stick = write_sideload(repository, granted.name, tmp_path / "second")
    assert stick.expires == own.targets().signed.expires > clock()
    clock.advance(170)
    with pytest.raises(OtaError) as refused:
        write_sideload(repository, granted.name, tmp_path / "third")
    assert refused.value.reason.value == "key_missing"


def test_a_change_of_the_director_of_sticks_needs_the_key_of_targets_before_anything_moves(
    repository: Repository, own: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    write_sideload(repository, granted.name, tmp_path / "first")
    (own.keys.directory / "targets.pem").rename(tmp_path / "targets.pem")
    with pytest.raises(OtaError) as refused:
        rotate_stick_key(repository, "director")
    assert refused.value.reason.value == "key_missing"
    write_sideload(repository, granted.name, tmp_path / "second")


def test_a_key_of_sticks_that_is_not_the_known_one_names_the_command_for_sticks(
    repository: Repository, own: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    (own.keys.directory / "timestamp.pem").unlink()
    own.keys.create_signer("timestamp")
    with pytest.raises(OtaError) as refused:
        write_sideload(repository, granted.name, tmp_path / "first")
    assert refused.value.hint.endswith("edge-ota sticks REPO --rotate timestamp")


def test_an_unknown_key_and_a_fleet_without_sticks_are_refused(repository: Repository) -> None:
    with pytest.raises(OtaError) as refused:
        rotate_stick_key(repository, "timestamp")
    assert refused.value.reason.value == "repository_missing"
    sticks.create(repository)
    with pytest.raises(OtaError) as refused:
        rotate_stick_key(repository, "release-person")
    assert refused.value.reason.value == "key_missing"


def test_making_the_repository_of_sticks_again_changes_nothing(repository: Repository, own: Repository) -> None:
    before = {path: path.read_bytes() for path in own.path.rglob("*") if path.is_file()}
    sticks.create(repository)
    assert {path: path.read_bytes() for path in own.path.rglob("*") if path.is_file()} == before


def test_an_interrupted_making_is_finished_with_the_same_keys(repository: Repository) -> None:
    own = sticks.create(repository)
    keys = {path.name: path.read_bytes() for path in own.keys.directory.iterdir()}
    own.metadata_path("timestamp", None).unlink()  # written last
    own.keys.directory.joinpath("director.pem").unlink()
    assert sticks.opened(repository) is None
    again = sticks.create(repository)
    assert sticks.opened(repository) is not None
    kept = {path.name: path.read_bytes() for path in again.keys.directory.iterdir()}
    assert {name for name in keys if kept[name] == keys[name]} == set(keys) - {"director.pem"}


def test_a_taken_place_and_a_zip_above_two_gigabytes_are_refused(
    repository: Repository, granted: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.zip").write_bytes(b"mine")
    with pytest.raises(OtaError) as refused:
        write_sideload(repository, granted.name, tmp_path / "taken.zip")
    assert refused.value.reason.value == "repository_exists"
    assert (tmp_path / "taken.zip").read_bytes() == b"mine"
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50_000)  # as if its parts were that large
    with pytest.raises(OtaError) as refused:
        write_sideload(repository, granted.name, tmp_path / "large.zip")
    assert refused.value.reason.value == "unsupported"
    assert not (tmp_path / "large.zip").exists()


@pytest.mark.parametrize(
    ("name", "syncs"), [*(("stick", syncs) for syncs in (0, 1, 3, 6, 10, 20)), ("stick.zip", 0), ("stick.zip", 1)]
)
def test_a_stick_that_gets_full_is_no_repository_and_the_same_command_works_when_there_is_space(
    repository: Repository, granted: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, syncs: int
) -> None:
    genuine, left = os.fsync, iter(range(syncs))

    def fsync(fd: int) -> None:
        if "usb" in os.readlink(f"/proc/self/fd/{fd}") and next(left, None) is None:
            raise OSError(28, "No space left on device")
        genuine(fd)

    publish(repository, [])
    monkeypatch.setattr(files.os, "fsync", fsync)
    place = tmp_path / "usb" / name
    place.parent.mkdir()
    with pytest.raises(OtaError) as refused:
        write_sideload(repository, granted.name, place)
    assert refused.value.reason.value == "no_space"
    assert not [path for path in place.parent.rglob("*") if path != tmp_path / "usb/stick"]
    # there is space again, and the same command is given
    monkeypatch.undo()
    assert write_sideload(repository, granted.name, place).files == len(content(place))


def test_every_directory_on_a_stick_is_durable_when_it_is_written(
    repository: Repository, granted: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT does not write the entry of a new directory because a file in it was synced, and people pull sticks."""
    genuine, durable = os.fsync, set[Path]()
    out = tmp_path / "usb" / "stick"

    def fsync(fd: int) -> None:
        genuine(fd)
        place = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if place.is_dir():
            durable.update(place.iterdir())

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_sideload(repository, granted.name, out)
    assert {out.parent, out, *out.rglob("*")} <= durable


@pytest.mark.parametrize("name", ["stick", "stick.zip"])
def test_a_stick_is_written_to_a_share_that_cannot_sync_directories(
    repository: Repository, granted: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """CIFS and the shared folders of virtual machines; the repository itself is not to lie there."""
    genuine, out = os.fsync, tmp_path / "share" / name
    out.parent.mkdir()

    def fsync(fd: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if place.is_dir() and out.parent in (place, *place.parents):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        genuine(fd)

    monkeypatch.setattr(files.os, "fsync", fsync)
    assert write_sideload(repository, granted.name, out).files == len(content(out))


def test_a_folder_that_holds_other_things_is_refused_with_a_place_inside_it(
    repository: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    """A stick from the shop has a folder of its own already."""
    (tmp_path / "usb" / "System Volume Information").mkdir(parents=True)
    with pytest.raises(OtaError) as refused:
        write_sideload(repository, granted.name, tmp_path / "usb")
    assert refused.value.reason.value == "repository_exists"
    assert refused.value.hint.endswith(f"{tmp_path}/usb/{granted.name}")
    write_sideload(repository, granted.name, tmp_path / "usb" / granted.name)


def test_nobody_replaces_the_metadata_of_a_stick_while_it_is_read(
    repository: Repository, granted: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another stick's timestamp on this one would lead to a snapshot that is not there."""
    genuine, held = files.read_regular, []

    def read_regular(path: Path, max_bytes: int) -> bytes | None:
        if path.parent == repository.path / "sticks" / "metadata" and path.name != "timestamp.json":
            with (repository.path / ".lock").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(True)
                else:
                    held.append(False)
        return genuine(path, max_bytes)

    monkeypatch.setattr(files, "read_regular", read_regular)
    write_sideload(repository, granted.name, tmp_path / "stick")
    assert set(held) == {True}


def test_writing_a_stick_needs_memory_for_what_is_on_it_and_not_for_what_could_be(
    repository: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    tracemalloc.start()
    written = write_sideload(repository, granted.name, tmp_path / "stick")
    assert tracemalloc.get_traced_memory()[1] < written.bytes + (16 << 20)
    tracemalloc.stop()


def test_init_makes_it_and_bundle_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = tmp_path / "repo"
    assert cli.main(["init", str(repo)]) == 0
    assert (repo / "sticks/metadata/timestamp.json").is_file()
    capsys.readouterr()
    assert cli.main(["sticks", str(repo), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["days"] == 180
    assert cli.main(["sticks", str(repo), "--rotate", "timestamp"]) == 0
    assert "root 2" in capsys.readouterr().out
