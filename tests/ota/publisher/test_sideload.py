"""A sideload directory: complete for its device, and without a key or anything of the vault."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from ota.errors import OtaError
from ota.publisher.director import grant
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.publisher.sideload import write_sideload
from ota.release import parse
from tests.ota.publisher.conftest import Build, FakeDevice, ManualClock, StockClient, model_bytes


@pytest.fixture
def granted(repository: Repository, build: Build, device: FakeDevice) -> FakeDevice:
    """A device with two lines; two more releases and a second device exist beside it."""
    data = model_bytes(1)
    build("1.0.0", data)
    build("1.1.0", bytes([data[0] ^ 1]) + data[1:])
    build("0.1.0", model_bytes(3), line="meter")
    build("0.1.0", model_bytes(4), line="other")
    publish(repository)
    FakeDevice("cam-2").enroll(repository)
    grant(repository, "cam-2", "other", "0.1.0")
    grant(repository, device.name, "person", "1.1.0")
    grant(repository, device.name, "meter", "0.1.0")
    return device


def names(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_everything_for_the_device_is_in_it_and_verifies(
    repository: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    out = tmp_path / "stick"
    written = write_sideload(repository, granted.name, out)
    client = StockClient(out, tmp_path / "state")
    for line, version in (("person", "1.1.0"), ("meter", "0.1.0")):
        data = client.fetch(f"{line}/{version}/release.json")
        assert data is not None
        release = parse(data)
        for component in (*release.components, release.golden):
            for payload in (component.full, *(delta.payload for delta in component.deltas)):
                assert (out / "payloads" / payload.sha256).stat().st_size == payload.length
    assert (out / "devices/cam-1/desired.json").read_bytes() == repository.read_desired("cam-1")
    assert len(parse(client.fetch("person/1.1.0/release.json") or b"").components[0].deltas) == 1
    assert (written.files, written.bytes) == (
        len(names(out)), sum((out / name).stat().st_size for name in names(out)),
    )  # fmt: skip


def test_a_stick_reads_like_a_repository(repository: Repository, granted: FakeDevice, tmp_path: Path) -> None:
    """Every file lies where the repository has it, byte for byte."""
    write_sideload(repository, granted.name, tmp_path / "stick")
    for name in names(tmp_path / "stick"):
        assert (tmp_path / "stick" / name).read_bytes() == (repository.path / name).read_bytes()


def test_nothing_of_keys_vault_other_devices_or_other_lines_is_in_it(
    repository: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    out = tmp_path / "stick"
    write_sideload(repository, granted.name, out)
    found = names(out)
    assert {name.split("/")[0] for name in found} == {"metadata", "targets", "payloads", "devices"}
    assert not [name for name in found if "cam-2" in name or "device.json" in name or "release-other" in name]
    everything = b"".join((out / name).read_bytes() for name in found)
    assert b"PRIVATE KEY" not in everything
    for secret in (repository.path / "vault").rglob("*"):
        if secret.is_file():
            assert secret.read_bytes() not in everything


def test_it_starts_with_a_whole_life(
    repository: Repository, granted: FakeDevice, tmp_path: Path, clock: ManualClock
) -> None:
    clock.advance(days=20)
    written = write_sideload(repository, granted.name, tmp_path / "stick")
    left = written.expires - clock()
    assert timedelta(days=6, hours=23) < left <= timedelta(days=7)
    assert StockClient(tmp_path / "stick", tmp_path / "state").fetch("meter/0.1.0/release.json") is not None


def test_a_directory_in_use_an_unknown_and_an_ungranted_device_are_refused(
    repository: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    FakeDevice("cam-3").enroll(repository)
    for device, out, reason in [
        ("cam-1", tmp_path, "repository_exists"),
        ("cam-9", tmp_path / "a", "unknown_device"),
        ("cam-3", tmp_path / "b", "unknown_release"),
    ]:
        with pytest.raises(OtaError) as refused:
            write_sideload(repository, device, out)
        assert refused.value.reason.value == reason
        assert not (tmp_path / "a").exists()


def test_a_damaged_payload_does_not_reach_the_stick(
    repository: Repository, granted: FakeDevice, tmp_path: Path
) -> None:
    release = repository.release(repository.find("meter", "0.1.0"))
    place = repository.payload_path(release.golden.full.sha256)
    place.write_bytes(bytes(len(place.read_bytes())))
    with pytest.raises(OtaError, match="gone or damaged") as refused:
        write_sideload(repository, granted.name, tmp_path / "stick")
    assert refused.value.reason.value == "state_corrupt"
    # without its timestamp the directory is no repository to any client
    assert not (tmp_path / "stick/metadata/timestamp.json").exists()
