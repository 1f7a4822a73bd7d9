"""Whatever a technician brings is read by one contract: a directory and a stored zip answer alike, good or bad."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ota.client.ports import Transport
from ota.client.transports import directory
from ota.client.transports.stick import check_names, open_stick
from ota.errors import OtaError, Reason
from tests.ota.client.simulator import Built, Simulator, sha256

DEVICE = "cam-1"
MODEL = bytes(range(256)) * 1000


def pack(folder: Path, to: Path) -> Path:
    """A stored zip of everything below `folder`."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return to


@pytest.fixture(params=["directory", "zip"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def repository() -> Simulator:
    made = Simulator()
    built = made.build("person", "1.0.0", {"int8": MODEL}, b"golden", codec="raw")
    made.grant(DEVICE, X25519PrivateKey.generate(), built)
    return made


@pytest.fixture
def built(repository: Simulator) -> Built:
    return repository.built["person", "1.0.0"]


@pytest.fixture
def place(repository: Simulator, kind: str, tmp_path: Path) -> Path:
    folder = tmp_path / "stick"
    repository.write(folder, DEVICE)
    return folder if kind == "directory" else pack(folder, tmp_path / "stick.zip")


@pytest.fixture
def transport(place: Path) -> Transport:
    return open_stick(place, DEVICE)


def refusal(call: Callable[[], object]) -> OtaError:
    with pytest.raises(OtaError) as caught:
        asyncio.run(call())  # type: ignore[arg-type]
    return caught.value


def test_its_name_tells_what_it_reads(transport: Transport, kind: str) -> None:
    assert transport.name == kind


def test_every_document_is_the_one_of_the_repository(transport: Transport, repository: Simulator, built: Built) -> None:
    async def read() -> None:
        for (role, version), data in repository.documents.items():
            assert await transport.metadata(role, version, len(data)) == data
        assert await transport.desired(1 << 20) == repository.desired[DEVICE]
        assert await transport.target(built.path, sha256(built.data), 1 << 20) == built.data

    asyncio.run(read())


def test_a_payload_comes_in_any_pieces_and_ends_where_it_ends(transport: Transport, repository: Simulator) -> None:
    digest, data = max(repository.payloads.items(), key=lambda item: len(item[1]))

    async def read() -> None:
        for size in (1000, 65536, 98304):
            pieces = [await transport.block(digest, offset, size) for offset in range(0, len(data), size)]
            assert b"".join(pieces) == data
        assert await transport.block(digest, len(data) - 5, 100) == data[-5:]
        assert await transport.block(digest, len(data), 100) == b""
        assert await transport.block(digest, len(data) + 1000, 100) == b""

    asyncio.run(read())


def test_calls_may_run_at_the_same_time(transport: Transport, repository: Simulator) -> None:
    digest, data = max(repository.payloads.items(), key=lambda item: len(item[1]))

    async def read() -> None:
        pieces = await asyncio.gather(*(transport.block(digest, offset, 4096) for offset in range(0, len(data), 4096)))
        assert b"".join(pieces) == data

    asyncio.run(read())


def test_what_is_not_there_is_not_found(transport: Transport) -> None:
    nowhere = "0" * 64
    for call in (
        lambda: transport.metadata("root", 2, 1000),
        lambda: transport.metadata("release-other", 1, 1000),
        lambda: transport.target("person/9.9.9/release.json", nowhere, 1000),
        lambda: transport.block(nowhere, 0, 1000),
    ):
        assert refusal(call).reason is Reason.NOT_FOUND


def test_nothing_longer_than_asked_for_is_read(transport: Transport, built: Built) -> None:
    for call in (
        lambda: transport.metadata("root", 1, 100),
        lambda: transport.desired(100),
        lambda: transport.target(built.path, sha256(built.data), 100),
    ):
        assert refusal(call).reason is Reason.METADATA_TOO_LARGE


@pytest.mark.fault("F44")
@pytest.mark.parametrize("role", ["../root", "release-../x", "mirror", "release-", "timestamp\0", "Root", ""])
def test_names_out_of_the_grammar_are_refused_before_anything_is_opened(transport: Transport, role: str) -> None:
    assert refusal(lambda: transport.metadata(role, 1, 10)).reason is Reason.BAD_TARGET_NAME
    path = f"{role}/1.0.0/release.json\\"
    assert refusal(lambda: transport.target(path, "0" * 64, 10)).reason is Reason.BAD_TARGET_NAME
    assert refusal(lambda: transport.block(f"{role}/{'0' * 60}", 0, 10)).reason is Reason.BAD_TARGET_NAME


def test_a_stick_for_somebody_else_is_told_apart(place: Path) -> None:
    asyncio.run(check_names(open_stick(place, DEVICE), DEVICE))
    told = refusal(lambda: check_names(open_stick(place, "cam-2"), "cam-2"))
    assert (told.reason, "cam-2" in told.hint) == (Reason.NOT_FOR_THIS_DEVICE, True)


def test_a_stick_that_was_pulled_is_unreachable_and_back_again(transport: Transport, place: Path) -> None:
    digest = asyncio.run(transport.metadata("timestamp", None, 10000))
    away = place.with_name("away")
    place.rename(away)
    told = refusal(lambda: transport.metadata("timestamp", None, 10000))
    assert (told.reason, told.retry) == (Reason.SOURCE_UNREACHABLE, True)
    assert refusal(lambda: transport.block("0" * 64, 0, 10)).reason is Reason.SOURCE_UNREACHABLE
    away.rename(place)
    assert asyncio.run(transport.metadata("timestamp", None, 10000)) == digest


class _PulledOnClose:
    """The module `os`, but closing a descriptor fails, as it does where a file system went away."""

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def close(self, fd: int) -> None:
        os.close(fd)
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))


@pytest.mark.fault("F60")
def test_a_file_system_that_goes_away_with_the_last_byte_takes_nothing_back(
    transport: Transport, repository: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "os", _PulledOnClose())
    assert asyncio.run(transport.desired(1 << 20)) == repository.desired[DEVICE]
    digest, data = max(repository.payloads.items(), key=lambda item: len(item[1]))
    assert asyncio.run(transport.block(digest, 0, 65536)) == data[:65536]


def test_nothing_there_and_nothing_readable_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OtaError) as caught:
        open_stick(tmp_path / "absent", DEVICE)
    assert caught.value.reason is Reason.SOURCE_UNREACHABLE
    with pytest.raises(OtaError) as caught:
        open_stick(Path("/dev/null"), DEVICE)
    assert caught.value.reason is Reason.UNSAFE_FILE


def test_reading_writes_nothing(transport: Transport, place: Path, kind: str) -> None:
    def tree() -> dict[str, tuple[int, int]]:
        paths = [place, *place.rglob("*")] if kind == "directory" else [place]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}

    before = tree()
    asyncio.run(transport.desired(1 << 20))
    assert tree() == before
    shutil.rmtree(place) if kind == "directory" else place.unlink()
