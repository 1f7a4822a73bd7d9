"""What only the publisher may read: the plaintext of every component, for later deltas, and the content keys.

Plaintexts lie as `vault/plain/<sha256>`, keys as `vault/keys/<cek_id>` wrapped to the director's HPKE key, so that
taking the directory without `director-hpke.pem` yields no key to a published payload.
"""

from __future__ import annotations

import hashlib

from ota import payload
from ota.errors import PayloadError, PublishError, Reason
from ota.publisher import files
from ota.publisher.repository import Repository
from ota.release import MAX_PAYLOAD_BYTES

FOLDER = "vault"
PLAIN = "plain"
KEYS = "keys"
_MAX_WRAPPED_BYTES = 1024


class Vault:
    """The vault of one repository."""

    def __init__(self, repository: Repository) -> None:
        self._directory = repository.path / FOLDER
        self._keys = repository.keys

    def keep_plain(self, data: bytes) -> str:
        """Store a plaintext and return its SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._directory / PLAIN / sha256
        if not path.is_file():
            files.write_atomic(path, data, files.SECRET_MODE)
        return sha256

    def plain(self, sha256: str) -> bytes | None:
        """A plaintext, or None when it was cleared away or its file is damaged: then there is just no delta."""
        data = files.read_secret(self._directory / PLAIN / sha256, MAX_PAYLOAD_BYTES)
        return data if data is not None and hashlib.sha256(data).hexdigest() == sha256 else None

    def keep_key(self, cek: bytes, line: str, version: str, cek_id: str) -> None:
        """Store a content key, wrapped."""
        public = self._keys.director_hpke().public_key().public_bytes_raw()
        wrapped = payload.wrap_key(cek, public, _vault_info(line, version, cek_id))
        files.write_atomic(self._directory / KEYS / cek_id, wrapped, files.SECRET_MODE)

    def key(self, line: str, version: str, cek_id: str) -> bytes:
        """The content key `cek_id` of that release.

        Raises:
            PublishError: `key_missing`.
        """
        path = self._directory / KEYS / cek_id
        wrapped = files.read_secret(path, _MAX_WRAPPED_BYTES)
        if wrapped is None:
            raise PublishError(
                Reason.KEY_MISSING, f"content key {path} of {line} {version} is missing", hint="restore the vault"
            )
        try:
            return payload.unwrap_key(wrapped, self._keys.director_hpke(), _vault_info(line, version, cek_id))
        except PayloadError as e:
            raise PublishError(
                Reason.KEY_MISSING,
                f"content key {path} of {line} {version} does not open with director-hpke.pem",
                hint="the vault and the key are from different repositories, or one is damaged: restore both",
            ) from e


def _vault_info(line: str, version: str, cek_id: str) -> bytes:
    """HPKE `info` of the vault; differs from every grant's in its first part."""
    return "\0".join(("edge-ota vault v1", payload.WRAP_SUITE, line, version, cek_id)).encode()
