"""Renewal: a device that proves it holds the key of its certificate gets the next one, also shortly after the end.

The proof is a signature over a nonce of ours and the whole request, not TLS: an expired certificate opens no TLS
connection. Invariants: an expelled device and a revoked certificate get nothing; the key of a request is the device's
newest from then on, and so is its HPKE key; a repeated request gets the certificate that was issued for it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ota import enrolment
from ota.errors import PublishError, Reason
from ota.publisher import audit, files, revocation
from ota.publisher.certificates import certificate_pem
from ota.publisher.enroll import (
    MAX_OLDER,
    Device,
    Request,
    issue,
    load_device,
    request_from,
    revoked_error,
    still_valid,
    store_device,
)
from ota.publisher.repository import Repository

NONCE_LIFE_S = 120.0
_MAX_USED = 4096
_NONCE = struct.Struct(">d16s32s")
_CERTIFICATE_FILE = "certificate.pem"
_MAX_CERTIFICATE_BYTES = 16384


@dataclass(frozen=True, slots=True)
class Renewed:
    """A device's next certificate."""

    device: Device
    certificate: str


class Nonces:
    """Nonces that need no memory until they are used: a time, random bytes, and a MAC over both.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._used: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def make(self) -> str:
        """A nonce that can be used once, within `NONCE_LIFE_S`."""
        moment, noise = self._clock(), secrets.token_bytes(16)
        return base64.b64encode(_NONCE.pack(moment, noise, self._mac(moment, noise))).decode()

    def use(self, text: str) -> bool:
        """Whether `text` is a nonce of ours, fresh and unused; it is used from now on."""
        try:
            moment, noise, mac = _NONCE.unpack(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError, struct.error):
            return False
        if not hmac.compare_digest(mac, self._mac(moment, noise)):
            return False
        now = self._clock()
        with self._lock:
            self._used = {seen: at for seen, at in self._used.items() if now - at < NONCE_LIFE_S}
            if noise in self._used or not 0 <= now - moment < NONCE_LIFE_S or len(self._used) >= _MAX_USED:
                return False
            self._used[noise] = now
            return True

    def _mac(self, moment: float, noise: bytes) -> bytes:
        return hmac.digest(self._key, struct.pack(">d", moment) + noise, hashlib.sha256)


def renew(
    repository: Repository, fields: Mapping[str, Any], nonces: Nonces, spend: Callable[[str], None] = lambda _: None
) -> Renewed:
    """Answer a renewal request, a parsed JSON object.

    Args:
        spend: called with the device before another certificate is issued to it; raises to refuse.

    Raises:
        PublishError: `bad_proof` when it does not prove the key of a certificate of ours; `device_revoked`;
            `certificate_expired` beyond the grace; `bad_request`, `unknown_device`, `busy`, `key_missing`.
    """
    texts = {key: _text(fields, key) for key in ("device", "certificate", "nonce", "csr", "hpke_public", "signature")}
    wanted = request_from(fields)
    certificate = _certificate(repository, texts["certificate"], wanted.device)
    _check_proof(certificate, fields, texts["signature"])
    with repository.locked():
        if not nonces.use(texts["nonce"]):
            raise PublishError(
                Reason.BAD_PROOF,
                "the nonce is not of this server, old or used",
                hint="ask again: it is tried anew",
                retry=True,
            )
        device = load_device(repository, wanted.device)
        serial = certificate.serial_number
        if device.revoked or revocation.is_revoked(repository, serial):
            raise revoked_error(device) if device.revoked else _replaced(device)
        now = repository.now().replace(microsecond=0)
        _check_grace(repository, certificate, now)
        # what a former board had, or what ended before the newest was made: its key may be anywhere
        if serial not in {one.serial for one in device.certificates}:
            raise _replaced(device)
        return _issue(repository, device, wanted, serial, now, spend)


def _issue(
    repository: Repository, device: Device, wanted: Request, shown: int, now: datetime, spend: Callable[[str], None]
) -> Renewed:
    """Args: shown: serial number of the certificate that proved who asks."""
    path = repository.device_path(device.device) / _CERTIFICATE_FILE
    if device.certificate_key == wanted.certificate_key:
        kept = files.read_regular(path, _MAX_CERTIFICATE_BYTES)
        if kept is not None and _serial(kept) == device.certificate_serial:
            return Renewed(device, kept.decode())
    spend(device.device)
    certificate = issue(repository, wanted, now)
    same_hpke = device.hpke_public == wanted.hpke_public
    valid = still_valid(device.certificates, now)
    # the one in use stays known although it ended: the device may never get to use the new one
    older = [one for one in device.certificates if one in valid[:MAX_OLDER] or one.serial == shown]
    if len(valid) > MAX_OLDER:
        # they leave the record, and a revocation goes by the record
        revocation.revoke_certificates(repository, device, "too many", [one for one in valid if one not in older])
    renewed = replace(
        device,
        hpke_public=wanted.hpke_public,
        certificate_key=wanted.certificate_key,
        certificate_serial=certificate.serial_number,
        certificate_expires=certificate.not_valid_after_utc.isoformat().replace("+00:00", "Z"),
        former_hpke=device.former_hpke if same_hpke else device.hpke_public,
        older=tuple(older),
    )
    pem = certificate_pem(certificate)
    # the record first: it is what a revocation goes by
    store_device(repository, renewed)
    files.write_atomic(path, pem.encode())
    audit.record(
        repository, "renewed", device.device, kid=renewed.kid, serial=f"{certificate.serial_number:x}",
        # not the newest: the board never used that one, or somebody else did
        expires=renewed.certificate_expires, shown=f"{shown:x}", superseded=shown != device.certificate_serial,
    )  # fmt: skip
    return Renewed(renewed, pem)


def _certificate(repository: Repository, pem: str, device: str) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.verify_directly_issued_by(repository.authority.certificate())
    except (ValueError, TypeError, InvalidSignature) as e:
        raise _bad_proof("its certificate was not issued here") from e
    if [(a.oid, a.value) for a in certificate.subject] != [(NameOID.COMMON_NAME, device)]:
        raise _bad_proof(f"its certificate is not that of {device}")
    return certificate


def _check_proof(certificate: x509.Certificate, fields: Mapping[str, Any], signature: str) -> None:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _bad_proof("its certificate has a key of another kind")
    try:
        key.verify(base64.b64decode(signature, validate=True), enrolment.proof_input(fields), ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature) as e:  # not base64, or not even ASCII
        raise _bad_proof("it is not signed by the key of its certificate") from e


def _check_grace(repository: Repository, certificate: x509.Certificate, now: datetime) -> None:
    days = repository.settings.renewal_grace_days
    end = certificate.not_valid_after_utc
    if now > end + timedelta(days=days):
        raise PublishError(
            Reason.CERTIFICATE_EXPIRED,
            f"the certificate expired at {end:%Y-%m-%d %H:%M} UTC, more than {days} days ago",
            hint="edge-ota replace REPO DEVICE --token, then enrol the device with that token",
        )


def _replaced(device: Device) -> PublishError:
    return PublishError(
        Reason.DEVICE_REVOKED,
        f"this certificate of {device.device} counts no longer: another board or a later certificate has its place",
        hint="enrol this board under another id, or edge-ota replace REPO DEVICE --token",
    )


def _serial(pem: bytes) -> int:
    try:
        return x509.load_pem_x509_certificate(pem).serial_number
    except ValueError:
        return 0


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise PublishError(
            Reason.BAD_REQUEST, f"renewal request refused: {key} is missing or not a text", hint="update the agent"
        )
    return value


def _bad_proof(why: str) -> PublishError:
    return PublishError(
        Reason.BAD_PROOF, f"renewal refused: {why}", hint="is this the server of the device's own operator?"
    )
