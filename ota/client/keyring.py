"""The key ring: every device key that rotates, in one sealed file `keys/ring.cbs` and its copy `keys/ring.copy.cbs`.

Custody (a 0600 file, or a credential that systemd unsealed) gives one root secret that never changes; it seals the ring
and nothing else once there is one. Both files hold the same ring: each is replaced atomically, the first before the
copy, so a cut leaves the old or the new ring, and a rotten sector under one of them loses nothing. Two alternating
slots would survive a cut as well, but would keep retired keys on the disk until the next rotation.
Damage to both is reported (`Keyring.damage`), never guessed around: lost are the storage keys (models are fetched
again), renewed certificates and renewed HPKE keys; what enrolment made still works.
Not here: where the root secret comes from (`agent.daemon.keys`), re-sealing of the store (`store`).
Invariants: no key is ever in a message or a repr; a ring read back equals the ring saved; wiping is journalled, so a
cut cannot leave it half done.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ota import payload, strictjson
from ota.client import sealed
from ota.client.fsops import Fs
from ota.errors import OtaError, PayloadError, Reason, StoreError

DIRECTORY = "keys"
RING = f"{DIRECTORY}/ring.cbs"
COPY = f"{DIRECTORY}/ring.copy.cbs"
WIPED = f"{DIRECTORY}/wiped"
MAGIC = b"EDGERNG\n"
CONTEXT = b"edge-ota ring v1\0" + payload.SUITE.encode() + b"\0"
KEY_BYTES = 32
MAX_STORAGE_KEYS = 4
MAX_HPKE_KEYS = 3
MAX_PEM_BYTES = 16 * 1024
MAX_RING_BYTES = 128 * 1024
_FORMAT = 1
_NOT_DAMAGE = frozenset({Reason.IO_ERROR, Reason.SEALED_KEY_UNAVAILABLE})
_LOST = "lost: renewed certificates and HPKE keys, and the models, which are fetched again"


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """A private key and the certificate for it (a chain is allowed), both PEM."""

    key_pem: bytes = field(repr=False)
    certificate_pem: bytes

    def __post_init__(self) -> None:
        if not all(0 < len(pem) <= MAX_PEM_BYTES for pem in (self.key_pem, self.certificate_pem)):
            raise ValueError("a PEM of a TLS identity is empty or too long")


@dataclass(frozen=True, slots=True)
class Ring:
    """All rotating keys.

    Attributes:
        storage: 32-byte keys, the current one first; the others still open files until these are re-sealed.
        hpke: raw X25519 private keys, the current one first; the others still open grants made for them.
        tls: the identity in force, None for the one that enrolment made.
        tls_trial: a renewed identity that no connection has proved yet.
    """

    storage: tuple[bytes, ...] = field(repr=False)
    hpke: tuple[bytes, ...] = field(default=(), repr=False)
    tls: TlsIdentity | None = None
    tls_trial: TlsIdentity | None = None

    def __post_init__(self) -> None:
        for kind, keys, low, high in (
            ("storage", self.storage, 1, MAX_STORAGE_KEYS),
            ("hpke", self.hpke, 0, MAX_HPKE_KEYS),
        ):
            if not low <= len(keys) <= high or len(set(keys)) != len(keys):
                raise ValueError(f"{len(keys)} {kind} keys, or one of them twice")
            if any(len(key) != KEY_BYTES for key in keys):
                raise ValueError(f"a {kind} key is not {KEY_BYTES} bytes long")

    def with_storage_key(self, key: bytes) -> Ring:
        """`key` is current from now on, the others are retired."""
        return Ring((key, *self.storage), self.hpke, self.tls, self.tls_trial)

    def with_hpke_key(self, key: bytes) -> Ring:
        """`key` is current from now on; the oldest beyond `MAX_HPKE_KEYS` is forgotten."""
        return Ring(self.storage, (key, *self.hpke)[:MAX_HPKE_KEYS], self.tls, self.tls_trial)


class Keyring:
    """The ring on disk; loads at construction.

    Args:
        fs: the state directory.
        custody_key: 32 bytes, the root secret.
        hpke: raw private keys that enrolment made, in force as long as no ring says otherwise.

    Attributes:
        damage: `keyring_corrupt` when files of a ring are there and none opens; the ring is then enrolment's own.
        exists: whether a ring was saved before, or by this object.

    Raises:
        StoreError: `io_error`: the disk cannot be read; `keys_wiped` when the keys were destroyed on purpose;
            `sealed_key_unavailable` when the ring is another root secret's or of another format: nothing is lost then,
            and nothing touched.
    """

    def __init__(self, fs: Fs, custody_key: bytes, hpke: tuple[bytes, ...] = ()) -> None:
        if len(custody_key) != KEY_BYTES:
            raise ValueError(f"the custody key is not {KEY_BYTES} bytes long")
        self._fs = fs
        self._key = custody_key
        self._lock = threading.RLock()
        self.damage: StoreError | None = None
        refuse_wiped(fs)
        fs.make_dirs(DIRECTORY)
        fs.sweep(DIRECTORY)
        found = self._load()
        self.exists = found is not None
        self._ring = found or Ring((custody_key,), hpke)

    @property
    def ring(self) -> Ring:
        """The ring in force."""
        return self._ring

    def save(self, ring: Ring) -> None:
        """Replace the ring, durably; afterwards retired keys that `ring` lacks are on the disk no longer.

        Raises:
            StoreError: `no_space` or `io_error`; the old ring stays in force.
        """
        plain = encode(ring)
        header = sealed.Header(sealed.key_id(self._key), len(plain)).pack(MAGIC)
        data = header + payload.seal(plain, self._key, CONTEXT + header)
        with self._lock:
            refuse_wiped(self._fs)
            self._fs.write_atomic(RING, data)
            self._ring, self.exists, self.damage = ring, True, None
            self._fs.write_atomic(COPY, data)

    def update(self, change: Callable[[Ring], Ring]) -> Ring:
        """Save what `change` makes of the ring, with nobody else's change in between; may be called in any thread.

        Raises:
            StoreError: as `save`.
        """
        with self._lock:
            ring = change(self._ring)
            if ring != self._ring or not self.exists:
                self.save(ring)
            return ring

    def wipe(self) -> None:
        """Destroy every key in the state directory, as `wipe`.

        Raises:
            StoreError: `io_error`.
        """
        with self._lock:
            wipe(self._fs)

    def _load(self) -> Ring | None:
        """The first of the two files that opens; a missing or rotten one is written again from the other."""
        found: Ring | None = None
        whole = True
        refused: list[OtaError] = []
        for path in (RING, COPY):
            try:
                ring = self._read(path)
            except OtaError as e:
                refused.append(e)
                ring = None
            found = found or ring
            whole = whole and ring is not None and ring == found
        if found is None and refused:
            first = next((e for e in refused if e.reason in _NOT_DAMAGE), None)
            if first is not None:
                raise first
            other = next((e for e in refused if e.reason is Reason.UNSUPPORTED), None)
            if other is not None:
                raise StoreError(
                    Reason.SEALED_KEY_UNAVAILABLE,
                    f"the key ring was written by another agent ({other.message})",
                    hint="install the agent that wrote it: no key is lost",
                ) from other
            self.damage = StoreError(
                Reason.KEYRING_CORRUPT,
                f"the key ring does not open ({refused[0].message}); {_LOST}",
                hint="edge-agent status shows what works; check the device's storage",
            )
        if found is not None and not whole:
            self._ring = found
            # a full disk: the one that opens is enough, and the next start tries again
            with contextlib.suppress(StoreError):
                self.save(found)
        return found

    def _read(self, path: str) -> Ring | None:
        size = self._fs.size(path)
        if size is None:
            return None
        if size > MAX_RING_BYTES:
            raise PayloadError(Reason.PAYLOAD_CORRUPT, f"{path}: {size} bytes, a ring has at most {MAX_RING_BYTES}")
        return self._open(b"".join(self._fs.chunks(path)))

    def _open(self, data: bytes) -> Ring:
        head = data[: sealed.HEADER_BYTES]
        header = sealed.parse(head, MAGIC, len(data))
        if header.key_id != sealed.key_id(self._key):
            raise StoreError(
                Reason.SEALED_KEY_UNAVAILABLE,
                f"the key ring is sealed under custody key {header.key_id}, not under this one",
                hint="hand over the storage key that belongs to this disk; or edge-agent reset --yes and enrol it anew",
            )
        plain = bytearray(header.length)
        with memoryview(plain) as view:
            written = payload.open_into([data[len(head) :]], self._key, CONTEXT + head, view)
        if written != header.length:
            raise PayloadError(Reason.PAYLOAD_TRUNCATED, f"opens to {written} bytes of {header.length}")
        return decode(bytes(plain))


def encode(ring: Ring) -> bytes:
    """A ring as canonical JSON, secrets included: for sealing alone."""
    return strictjson.canonical(
        {
            "format": _FORMAT,
            "storage": [_text(key) for key in ring.storage],
            "hpke": [_text(key) for key in ring.hpke],
            "tls": _identity_fields(ring.tls),
            "tls_trial": _identity_fields(ring.tls_trial),
        }
    )


def decode(data: bytes) -> Ring:
    """Read what `encode` wrote, and nothing else.

    Raises:
        OtaError: `bad_json`; the message shows no value.
    """
    body = strictjson.loads(data, max_bytes=MAX_RING_BYTES, what="key ring")
    try:
        if not isinstance(body, dict) or body.keys() != {"format", "storage", "hpke", "tls", "tls_trial"}:
            raise ValueError("other fields than a ring has")
        if body["format"] != _FORMAT or isinstance(body["format"], bool):
            raise ValueError(f"not of format {_FORMAT}")
        ring = Ring(
            tuple(_bytes(text) for text in _list(body["storage"])),
            tuple(_bytes(text) for text in _list(body["hpke"])),
            _identity(body["tls"]),
            _identity(body["tls_trial"]),
        )
        if encode(ring) != data:
            raise ValueError("not written as this device writes it")
    except ValueError as e:
        # the cause would show the secret in a traceback: only its words are kept
        raise OtaError(Reason.BAD_JSON, f"key ring: {e}") from None
    return ring


def is_wiped(fs: Fs) -> bool:
    """Whether `wipe` was begun here and no enrolment has come since."""
    return fs.size(WIPED) is not None


def refuse_wiped(fs: Fs) -> None:
    """Raise for a device whose keys were destroyed; ends a wipe that a cut came between.

    Raises:
        StoreError: `keys_wiped`.
    """
    if is_wiped(fs):
        wipe(fs)
        raise StoreError(
            Reason.KEYS_WIPED, "the keys of this device were destroyed on purpose", hint="enrol the device anew"
        )


def forget_wipe(fs: Fs) -> None:
    """New keys may be made here: enrolment's first step on a device that was wiped.

    Raises:
        StoreError: `io_error`.
    """
    if is_wiped(fs):
        wipe(fs)
        fs.remove(WIPED)


def wipe(fs: Fs) -> None:
    """Destroy every file in `keys/`, whatever custody is in force: overwritten, synced, unlinked, synced.

    The intent is on the disk first; a cut in between is made good by the next `Keyring` or by calling this again.
    Overwriting reaches the file's own blocks; flash may keep an older copy of them out of reach of any file system.

    Raises:
        StoreError: `io_error` after everything that could be destroyed was.
    """
    failed: list[StoreError] = []

    def attempt(step: Callable[[], None]) -> None:
        try:
            step()
        except StoreError as e:
            failed.append(e)

    attempt(lambda: fs.make_dirs(DIRECTORY))
    attempt(lambda: fs.write_atomic(WIPED, b"begun\n"))
    for name in fs.names(DIRECTORY):
        path = f"{DIRECTORY}/{name}"
        if path != WIPED:
            attempt(partial(_overwrite, fs, path))
            attempt(partial(fs.remove, path))
    attempt(lambda: fs.write_atomic(WIPED, b"done\n"))  # syncs the directory, so the files stay unlinked
    if failed:
        raise failed[0]


def destroy(fs: Fs, path: str) -> None:
    """Overwrite one file and remove it; as good as `wipe` is. Again after a cut that brought the name back.

    Raises:
        StoreError: `io_error`.
    """
    _overwrite(fs, path)
    fs.remove(path)


def _overwrite(fs: Fs, path: str) -> None:
    fs.write_at(path, 0, bytes(fs.size(path) or 0))
    fs.flush(path)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str) or len(text) > 4 * MAX_PEM_BYTES:
        raise ValueError("a value is not text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("a value is not base64") from None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_STORAGE_KEYS:
        raise ValueError("keys are not a short list")
    return value


def _identity_fields(identity: TlsIdentity | None) -> dict[str, str] | None:
    if identity is None:
        return None
    return {"key": _text(identity.key_pem), "certificate": _text(identity.certificate_pem)}


def _identity(value: Any) -> TlsIdentity | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"key", "certificate"}:
        raise ValueError("a TLS identity has other fields")
    return TlsIdentity(_bytes(value["key"]), _bytes(value["certificate"]))
