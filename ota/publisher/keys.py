"""Private keys of a repository: Ed25519 for TUF roles and X25519 for the director, PKCS#8 PEM files of mode 0600.

The directory may be split: a machine that publishes needs `snapshot`, `timestamp`, `director` and its lines' keys;
`root-*` and `targets` can lie elsewhere until a root or a new line has to be signed.
Invariant: a key readable by anybody but its owner is refused, not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from securesystemslib.signer import CryptoSigner

from ota.errors import PublishError, Reason
from ota.publisher import files

ROOT_KEYS = ("root-1", "root-2", "root-3")
ROOT_THRESHOLD = 2
DIRECTOR_HPKE = "director-hpke"
_MAX_KEY_BYTES = 16384

_Key = TypeVar("_Key", Ed25519PrivateKey, X25519PrivateKey, EllipticCurvePrivateKey)


def release_role(line: str) -> str:
    """Name of the TUF role, and of the key, that signs the releases of `line`."""
    return f"release-{line}"


def private_pem(key: PrivateKeyTypes) -> bytes:
    """`key` as unencrypted PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class KeyStore:
    """The key files under one directory of mode 0700."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create_signer(self, name: str) -> CryptoSigner:
        """Make and store the Ed25519 key `name`.

        Raises:
            PublishError: `unsafe_file` when there is one already: a key is never overwritten.
        """
        signer = CryptoSigner.generate_ed25519()
        self.store(f"{name}.pem", signer.private_bytes)
        return signer

    def signer(self, name: str) -> CryptoSigner:
        """The signer of key `name`.

        Raises:
            PublishError: `key_missing` or `unsafe_file`.
        """
        return CryptoSigner(self.load(f"{name}.pem", Ed25519PrivateKey))

    def next_signer(self, name: str) -> CryptoSigner:
        """The key that is going to replace `name`; made now, or by a change that was interrupted."""
        name = f"{name}.next"
        return self.signer(name) if self.has(name) else self.create_signer(name)

    def replace(self, name: str) -> Path | None:
        """Put the next key in the place of `name` and return where the old one went; None when it was not here.

        Raises:
            PublishError: `io_error`.
        """
        retired = None
        place = self.directory / f"{name}.pem"
        if self.has(name):
            retired = self.directory / "retired" / f"{name}-{self.signer(name).public_key.keyid[:16]}.pem"
            files.make_directory(retired.parent, files.SECRET_DIRECTORY_MODE)
            files.rename(place, retired)
        files.rename(self.directory / f"{name}.next.pem", place)
        return retired

    def has(self, name: str) -> bool:
        """Whether the signing key `name` lies here."""
        return (self.directory / f"{name}.pem").is_file()

    def create_director_hpke(self) -> X25519PrivateKey:
        """Make and store the key that the vault's content keys are wrapped to."""
        key = X25519PrivateKey.generate()
        self.store(f"{DIRECTOR_HPKE}.pem", private_pem(key))
        return key

    def director_hpke(self) -> X25519PrivateKey:
        """The key that opens the vault.

        Raises:
            PublishError: `key_missing` or `unsafe_file`.
        """
        return self.load(f"{DIRECTOR_HPKE}.pem", X25519PrivateKey)

    def store(self, file_name: str, pem: bytes) -> None:
        """Write a private key that is not there yet.

        Raises:
            PublishError: `unsafe_file` when it is.
        """
        path = self.directory / file_name
        if path.exists() or path.is_symlink():
            raise PublishError(
                Reason.UNSAFE_FILE, f"{path} exists; a key is never overwritten", hint="move the old key away first"
            )
        files.write_atomic(path, pem, files.SECRET_MODE)

    def load(self, file_name: str, kind: type[_Key]) -> _Key:
        """The private key in `file_name`.

        Raises:
            PublishError: `key_missing` when it is absent, `unsafe_file` when it is open to others or not a key of
                that kind.
        """
        path = self.directory / file_name
        pem = files.read_secret(path, _MAX_KEY_BYTES)
        if pem is None:
            raise PublishError(
                Reason.KEY_MISSING, f"key {path} is missing", hint="bring the key here, or run this where it is kept"
            )
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as e:
            raise PublishError(Reason.UNSAFE_FILE, f"{path} is not a private key in PEM form") from e
        if not isinstance(key, kind):
            raise PublishError(Reason.UNSAFE_FILE, f"{path} is not a key of the kind {kind.__name__}")
        return key
