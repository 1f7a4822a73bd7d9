"""Custody: which key files are refused, and that no message shows a secret."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.daemon.keys import HPKE_KEY, STORAGE_KEY, TLS_KEY, CredentialKeys, FileKeys, open_keys, provider
from agent.daemon.secretfile import read
from agent.errors import CustodyError, Reason
from ota.client.fsops import Disk, Fs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FileKeys(tmp_path / "keys").create()
    return tmp_path / "keys"


def test_keys_are_made_once_and_stay_the_same(folder: Path) -> None:
    first, second = FileKeys(folder).create(), FileKeys(folder).load()
    assert first.storage == second.storage
    assert first.hpke.private_bytes_raw() == second.hpke.private_bytes_raw()


def test_key_files_and_their_folder_are_for_the_owner_alone(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()} == dict.fromkeys(
        (TLS_KEY, HPKE_KEY, STORAGE_KEY), 0o600
    )


@pytest.mark.fault("F53")
@pytest.mark.parametrize(
    "spoil", ["mode", "symlink", "fifo", "empty", "short", "zeros", "folder", "open folder", "owner"]
)
def test_an_unsafe_key_file_is_refused_without_showing_it(folder: Path, spoil: str) -> None:
    path = folder / STORAGE_KEY
    secret = path.read_bytes()
    if spoil == "mode":
        path.chmod(0o644)
    elif spoil == "symlink":
        path.rename(folder / "elsewhere")
        path.symlink_to(folder / "elsewhere")
    elif spoil == "empty":
        path.write_bytes(b"")
    elif spoil == "short":
        path.write_bytes(secret[:31])
    elif spoil == "fifo":
        path.unlink()
        os.mkfifo(path, 0o600)
    elif spoil == "zeros":
        path.write_bytes(bytes(32))
    elif spoil == "open folder":
        folder.chmod(0o750)
    elif spoil == "folder":
        path.unlink()
        path.mkdir()
    else:
        if os.geteuid() != 0:
            pytest.skip("needs root to give a file away")
        os.chown(path, 65534, 65534)
    with pytest.raises(CustodyError) as caught:
        FileKeys(folder).load()
    assert caught.value.reason is Reason.KEY_UNSAFE
    assert caught.value.hint
    assert secret.hex() not in str(caught.value) + caught.value.hint


def test_a_key_that_the_disk_does_not_give_back_is_a_reason_and_no_crash() -> None:
    with pytest.raises(CustodyError) as caught:
        read(Path("/proc/self/mem"), 32, 32)  # a plain file whose first byte is an input/output error
    assert (caught.value.reason, bool(caught.value.hint)) == (Reason.KEY_UNSAFE, True)


def test_the_folder_of_new_keys_is_durable_before_any_of_them_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    for name in ("fsync_dir", "rename"):
        real = getattr(Disk, name)

        def noted(disk: Disk, *paths: str, name: str = name, real: Callable[..., None] = real) -> None:
            done.append((name, paths[-1]))
            real(disk, *paths)

        monkeypatch.setattr(Disk, name, noted)
    FileKeys(tmp_path / "keys").create()
    assert done[:3] == [("fsync_dir", "."), ("rename", f"keys/{TLS_KEY}"), ("fsync_dir", "keys")]


def test_another_root_secret_is_not_made_beside_a_ring_that_it_would_not_open(folder: Path, tmp_path: Path) -> None:
    open_keys(FileKeys(folder), Fs(tmp_path))
    secret = (folder / STORAGE_KEY).read_bytes()
    (folder / STORAGE_KEY).unlink()
    with pytest.raises(CustodyError) as caught:
        FileKeys(folder).create()
    assert (caught.value.reason, "reset" in caught.value.hint) == (Reason.KEY_MISSING, True)
    (folder / STORAGE_KEY).write_bytes(secret)
    (folder / STORAGE_KEY).chmod(0o600)
    assert FileKeys(folder).create().storage == secret


def test_a_missing_key_says_how_to_get_one(folder: Path) -> None:
    (folder / HPKE_KEY).unlink()
    with pytest.raises(CustodyError) as caught:
        FileKeys(folder).load()
    assert caught.value.reason is Reason.KEY_MISSING
    assert "enroll" in caught.value.hint


def test_credentials_of_the_service_manager_win_over_files(folder: Path, tmp_path: Path) -> None:
    chosen = provider(tmp_path, {"CREDENTIALS_DIRECTORY": str(folder)})
    assert isinstance(chosen, CredentialKeys)
    assert chosen.custody == "systemd-credential"
    assert provider(tmp_path, {}).custody == "file"
