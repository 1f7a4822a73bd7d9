"""Custody of the device's secrets: the TLS key, the HPKE key and the storage key.

A provider says which custody is in force and what it is worth; `status` shows both. No provider ever hands out a key
that others could have read: a file with group or world bits, of another owner, a symlink or a short one is refused.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.errors import CustodyError, Reason

STORAGE_KEY_BYTES = 32
TLS_KEY = "device.key"
HPKE_KEY = "hpke.key"
STORAGE_KEY = "storage.key"
_SIZES = {TLS_KEY: (100, 8192), HPKE_KEY: (32, 32), STORAGE_KEY: (STORAGE_KEY_BYTES, STORAGE_KEY_BYTES)}


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """The opened secrets. `tls_key` is a path because the TLS library reads the file itself."""

    tls_key: Path
    hpke: X25519PrivateKey
    storage: bytes


class KeyProvider(Protocol):
    """Where the keys are kept.

    `custody` names it for `status`; `worth` says in one line what a copied SD card gives away under it.
    """

    custody: str
    worth: str

    def load(self) -> DeviceKeys:
        """Open all keys. Raises CustodyError: `key_missing`, `key_unsafe`."""
        ...


class FileKeys:
    """Keys in 0600 files under the state directory. What a board without TPM or sealed credentials can do."""

    custody = "file"
    worth = "a copied SD card carries its keys with it: models on it can be opened"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self) -> DeviceKeys:
        """Make the keys that are absent and load all."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _SIZES:
            if not os.path.lexists(self._folder / name):
                _write_new(self._folder / name, _new_secret(name))
        return self.load()

    def load(self) -> DeviceKeys:
        """Open all keys.

        Raises:
            CustodyError: `key_missing`, `key_unsafe`.
        """
        return _load(self._folder)


class CredentialKeys:
    """Keys that systemd unsealed for this unit into `$CREDENTIALS_DIRECTORY` (LoadCredentialEncrypted=)."""

    custody = "systemd-credential"
    worth = "a copied SD card opens nothing where the credentials are sealed to a TPM; see systemd-creds(1)"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> DeviceKeys:
        """Open all keys.

        Raises:
            CustodyError: `key_missing`, `key_unsafe`.
        """
        return _load(self._folder)


def provider(state_dir: Path, environment: dict[str, str]) -> KeyProvider:
    """Credentials where systemd hands them over, files otherwise."""
    folder = environment.get("CREDENTIALS_DIRECTORY", "")
    if folder and (Path(folder) / STORAGE_KEY).exists():
        return CredentialKeys(Path(folder))
    return FileKeys(state_dir / "keys")


def _new_secret(name: str) -> bytes:
    if name == TLS_KEY:
        return ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    return (
        X25519PrivateKey.generate().private_bytes_raw() if name == HPKE_KEY else secrets.token_bytes(STORAGE_KEY_BYTES)
    )


def _load(folder: Path) -> DeviceKeys:
    _read(folder / TLS_KEY)
    return DeviceKeys(
        tls_key=folder / TLS_KEY,
        hpke=X25519PrivateKey.from_private_bytes(_read(folder / HPKE_KEY)),
        storage=_read(folder / STORAGE_KEY),
    )


def _read(path: Path) -> bytes:
    low, high = _SIZES[path.name]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise CustodyError(
            Reason.KEY_MISSING, f"{path} does not exist", hint="enrol the device: edge-agent enroll --help"
        ) from e
    except OSError as e:
        raise CustodyError(
            Reason.KEY_UNSAFE, f"{path}: {e.strerror}", hint="a key is a plain file of mode 0600, not a link"
        ) from e
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        os.close(fd)
        raise CustodyError(Reason.KEY_UNSAFE, f"{path} is not a plain file", hint="remove it and enrol again")
    with os.fdopen(fd, "rb") as file:
        # systemd hands credentials over as root-owned files that only this unit can reach
        if facts.st_uid not in (os.geteuid(), 0):
            raise CustodyError(
                Reason.KEY_UNSAFE, f"{path} belongs to user {facts.st_uid}", hint="run as that user, or enrol again"
            )
        if facts.st_mode & 0o077 and facts.st_uid == os.geteuid():
            raise CustodyError(
                Reason.KEY_UNSAFE, f"{path} has mode {stat.S_IMODE(facts.st_mode):04o}", hint=f"chmod 0600 {path}"
            )
        data = file.read(high + 1)
    if not low <= len(data) <= high:
        raise CustodyError(Reason.KEY_UNSAFE, f"{path} holds {len(data)} bytes", hint="restore it, or enrol again")
    return data


def _write_new(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
