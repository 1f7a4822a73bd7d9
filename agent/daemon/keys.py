"""Custody of the device's secrets: the TLS key, the HPKE key and the storage key, and the ring that they open.

A provider says which custody is in force and what it is worth; `status` shows both. No provider ever hands out a key
that others could have read: a file with group or world bits, of another owner, in a folder open to others, a symlink, a
FIFO, an empty or a short one is refused. A sealed key that is not handed over is no reason to stay silent: the daemon
runs, reports `sealed_key_unavailable`, and serves no model that needs it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent import memfd
from agent.daemon.custody import FILE, of_credential
from agent.daemon.secretfile import check_folder, read
from agent.errors import CustodyError, Reason
from ota.client import keyring, ports
from ota.client.fsops import Fs
from ota.client.keyring import Keyring, TlsIdentity
from ota.errors import Reason as OtaReason
from ota.errors import StoreError
from ota.payload import key_id

STORAGE_KEY_BYTES = 32
TLS_KEY = "device.key"
HPKE_KEY = "hpke.key"
STORAGE_KEY = "storage.key"
SECRETS = (TLS_KEY, HPKE_KEY, STORAGE_KEY)
SEALED_MARK = f"{keyring.DIRECTORY}/sealed"
_SIZES = {TLS_KEY: (100, 8192), HPKE_KEY: (32, 32), STORAGE_KEY: (STORAGE_KEY_BYTES, STORAGE_KEY_BYTES)}


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """The secrets that enrolment made. `tls_key` is a path because the TLS library reads the file itself."""

    tls_key: Path
    hpke: X25519PrivateKey = field(repr=False)
    storage: bytes = field(repr=False)


class KeyProvider(Protocol):
    """Where the keys are kept."""

    @property
    def custody(self) -> str:
        """Its name for `status`."""
        ...

    @property
    def sealed_to(self) -> str:
        """What protects the keys, one of the kinds in `custody`; empty for files."""
        ...

    @property
    def worth(self) -> str:
        """What a copied SD card gives away under it, in one line."""
        ...

    def path(self, name: str) -> Path:
        """Where the secret `name` lies, whether or not it does."""
        ...

    def secret(self, name: str) -> bytes:
        """One of `SECRETS`. Raises CustodyError: `key_missing`, `key_unsafe`, `sealed_key_unavailable`."""
        ...

    def load(self) -> DeviceKeys:
        """All of them. Raises CustodyError as `secret`."""
        ...


class FileKeys:
    """Keys in 0600 files under the state directory. What a board without TPM or sealed credentials can do."""

    custody = "file"
    sealed_to = FILE.sealed_to
    worth = FILE.text

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Where the secret `name` lies, whether or not it does."""
        return self._folder / name

    def create(self) -> DeviceKeys:
        """Make the keys that are absent and load all; on a device that was wiped this begins a new life.

        Raises:
            CustodyError: `key_unsafe`, also for a device whose keys are sealed.
            OSError: the state directory cannot be made.
            StoreError: the disk cannot be written.
        """
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fs = Fs(self._folder.parent)
        # durable before a request with these keys leaves: a token is spent on them
        fs.make_dirs(self._folder.name)
        self._refuse_sealed(fs)
        keyring.forget_wipe(fs)
        ring = any(fs.size(path) is not None for path in (keyring.RING, keyring.COPY))
        if ring and not os.path.lexists(self._folder / STORAGE_KEY):
            # another one opens no ring, and its device would enrol and never start
            raise CustodyError(
                Reason.KEY_MISSING,
                f"{self._folder / STORAGE_KEY} does not exist, and what it seals does",
                hint="restore it; or edge-agent reset --yes, then enrol the device anew",
            )
        for name in SECRETS:
            if not os.path.lexists(self._folder / name):
                fs.write_atomic(f"{self._folder.name}/{name}", _new_secret(name))
        return self.load()

    def secret(self, name: str) -> bytes:
        """One secret.

        Raises:
            CustodyError: `key_missing`, `key_unsafe`.
        """
        check_folder(self._folder)
        return _secret(self._folder / name)

    def load(self) -> DeviceKeys:
        """Open all keys.

        Raises:
            CustodyError: `key_missing`, `key_unsafe`, also for a device whose keys are sealed.
            StoreError: `io_error`.
        """
        self._refuse_sealed(Fs(self._folder.parent))
        return _load(self)

    def _refuse_sealed(self, fs: Fs) -> None:
        if sealed_names(fs):
            raise CustodyError(
                Reason.KEY_UNSAFE,
                "the keys of this device are sealed: files would take their place in clear",
                hint="edge-agent reset --yes ends this device's life; then enrol it anew",
            )


class CredentialKeys:
    """Keys that systemd unsealed for this unit into `$CREDENTIALS_DIRECTORY` (LoadCredentialEncrypted=).

    Only the storage key must be among them: the ring that it opens holds the others once `edge-agent keys seal` moved
    them there. Until then these may lie in files.

    Args:
        folder: the credentials; None for a unit that got none: TPM gone, PCRs changed, drop-in lost.
        files: where enrolment left its keys.
        sealed: secrets that `edge-agent keys seal` moved: a file of that name is a leftover of it.
    """

    custody = "systemd-credential"

    def __init__(self, folder: Path | None, files: Path, sealed: Collection[str] = ()) -> None:
        self._folder = folder
        self._files = FileKeys(files)
        self._sealed = sealed
        self._known = of_credential()

    @property
    def sealed_to(self) -> str:
        """What protects the keys, as far as it can be seen from here."""
        return self._known.sealed_to

    @property
    def worth(self) -> str:
        """What a copied SD card gives away under it."""
        exposed = self._files.path(STORAGE_KEY)
        if STORAGE_KEY not in self._sealed and os.path.lexists(exposed):
            return f"nothing yet: {exposed} lies beside the credential in clear; edge-agent keys seal destroys it"
        return self._known.text

    def path(self, name: str) -> Path:
        """Where the secret `name` lies, whether or not it does."""
        if self._folder is not None and (name == STORAGE_KEY or os.path.lexists(self._folder / name)):
            return self._folder / name
        return self._files.path(name)

    def secret(self, name: str) -> bytes:
        """One secret.

        Raises:
            CustodyError: `sealed_key_unavailable`, `key_unsafe`.
        """
        path = self.path(name)
        if path.parent == self._folder and os.path.lexists(path):
            return _secret(path)
        if name not in (*self._sealed, STORAGE_KEY) and os.path.lexists(path):
            return self._files.secret(name)
        raise CustodyError(
            Reason.SEALED_KEY_UNAVAILABLE,
            f"{name} was sealed, and is not among the credentials of this unit",
            hint="journalctl -u edge-agent names the cause; when it is mended: systemctl restart edge-agent",
        )

    def load(self) -> DeviceKeys:
        """Open all keys.

        Raises:
            CustodyError: `sealed_key_unavailable`, `key_unsafe`.
        """
        return _load(self)


def provider(state_dir: Path, environment: Mapping[str, str]) -> KeyProvider:
    """Credentials where systemd hands them over or where the keys were sealed, files otherwise."""
    name = environment.get("CREDENTIALS_DIRECTORY", "")
    folder = Path(name) if name else None
    files = state_dir / keyring.DIRECTORY
    handed = folder is not None and os.path.lexists(folder / STORAGE_KEY)
    sealed = sealed_names(Fs(state_dir))
    return CredentialKeys(folder, files, sealed) if handed or sealed else FileKeys(files)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the TLS library finds key and certificate. `certificate` is None for the one that enrolment wrote."""

    key: str
    certificate: str | None

    @staticmethod
    def of(identity: TlsIdentity) -> TlsFiles:
        """An identity of the ring, in sealed memfds that live as long as the process: it never touches the disk."""
        key = memfd.of_bytes("tls-key", identity.key_pem)
        certificate = memfd.of_bytes("tls-certificate", identity.certificate_pem)
        return TlsFiles(f"/proc/self/fd/{key}", f"/proc/self/fd/{certificate}")


@dataclass(frozen=True, slots=True)
class Trouble:
    """A key that is missing or damaged: a condition in `status` and an alarm in telemetry. Shows no secret."""

    reason: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class OpenKeys:
    """Custody and ring, merged.

    Attributes:
        device: what the updater gets; `storage` is empty when the sealed key is not available.
        tls: None without any TLS key: no connection to the broker is possible.
        keyring: None when its root secret is not available.
        troubles: what a person must know.
    """

    device: ports.DeviceKeys
    tls: TlsFiles | None
    keyring: Keyring | None
    troubles: tuple[Trouble, ...] = ()


def open_keys(source: KeyProvider, fs: Fs) -> OpenKeys:
    """Everything this device can open: the secrets of `source`, then the ring that its storage key opens.

    Files are sealed under the custody key only until the ring has a key of its own, which is made here the first time:
    from then on wiping the ring closes the store under every custody.

    Raises:
        CustodyError: `key_unsafe`; `key_missing` for a device whose keys lie in files.
        StoreError: `keys_wiped`, `io_error`, `no_space`.
    """
    troubles: list[Trouble] = []
    keyring.refuse_wiped(fs)
    root = _optional(source, STORAGE_KEY, troubles)
    enrolled = _optional(source, HPKE_KEY, [])
    ring = None if root is None else _ring(fs, root, () if enrolled is None else (enrolled,), troubles)
    if ring is None:
        # HPKE without the store would fetch what cannot be kept; TLS still carries the bad news
        return OpenKeys(ports.DeviceKeys({}, b""), _enrolled_tls(source, troubles), None, tuple(troubles))
    if not ring.exists:
        ring.save(ring.ring.with_storage_key(secrets.token_bytes(STORAGE_KEY_BYTES)))
    if not ring.ring.hpke:
        _optional(source, HPKE_KEY, troubles)
    own = ring.ring.tls
    tls = _enrolled_tls(source, troubles) if own is None else TlsFiles.of(own)
    return OpenKeys(device_keys(ring.ring), tls, ring, tuple(troubles))


def sealed_names(fs: Fs) -> tuple[str, ...]:
    """Which of `SECRETS` were moved under a credential; none on a device that was never sealed.

    Raises:
        StoreError: `io_error`.
    """
    mark = fs.read(SEALED_MARK, 256)
    return () if mark is None else tuple(name for name in SECRETS if name in mark.decode("ascii", "replace").split())


def seal_mark(fs: Fs, names: Collection[str]) -> None:
    """From now on no file takes the place of these secrets: a unit without its credential says so.

    Raises:
        StoreError: the disk.
    """
    fs.write_atomic(SEALED_MARK, "".join(f"{name}\n" for name in names).encode())


def device_keys(ring: keyring.Ring) -> ports.DeviceKeys:
    """The ring as the updater wants it."""
    opened = [X25519PrivateKey.from_private_bytes(raw) for raw in ring.hpke]
    current, *retired = ring.storage
    return ports.DeviceKeys(
        {key_id(key.public_key().public_bytes_raw()): key for key in opened}, current, tuple(retired)
    )


def _ring(fs: Fs, root: bytes, hpke: tuple[bytes, ...], troubles: list[Trouble]) -> Keyring | None:
    try:
        ring = Keyring(fs, root, hpke)
    except StoreError as e:
        if e.reason is not OtaReason.SEALED_KEY_UNAVAILABLE:
            raise
        troubles.append(Trouble(e.reason.value, e.message, e.hint))
        return None
    if ring.damage is not None:
        troubles.append(Trouble(ring.damage.reason.value, ring.damage.message, ring.damage.hint))
    return ring


def _enrolled_tls(source: KeyProvider, troubles: list[Trouble]) -> TlsFiles | None:
    found = _optional(source, TLS_KEY, troubles)
    if found is None:
        return None
    if isinstance(source, FileKeys):
        return TlsFiles(str(source.path(TLS_KEY)), None)
    # `keys seal` destroys the file, and the library reads it again for every connection
    return TlsFiles(f"/proc/self/fd/{memfd.of_bytes('tls-key', found)}", None)


def _optional(source: KeyProvider, name: str, troubles: list[Trouble]) -> bytes | None:
    """A secret, or None and a trouble when it was sealed and did not come."""
    try:
        return source.secret(name)
    except CustodyError as e:
        if e.reason is not Reason.SEALED_KEY_UNAVAILABLE:
            raise
        troubles.append(Trouble(e.reason.value, e.message, e.hint))
        return None


def _secret(path: Path) -> bytes:
    return read(path, *_SIZES[path.name])


def _new_secret(name: str) -> bytes:
    if name == TLS_KEY:
        return ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    return (
        X25519PrivateKey.generate().private_bytes_raw() if name == HPKE_KEY else secrets.token_bytes(STORAGE_KEY_BYTES)
    )


def _load(source: KeyProvider) -> DeviceKeys:
    source.secret(TLS_KEY)
    return DeviceKeys(
        tls_key=source.path(TLS_KEY),
        hpke=X25519PrivateKey.from_private_bytes(source.secret(HPKE_KEY)),
        storage=source.secret(STORAGE_KEY),
    )
