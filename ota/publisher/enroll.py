"""Enrolment: a device's request becomes its certificate and the bundle that it is started with.

The publisher takes two public keys and a name out of a request and nothing else. A device that is known is enrolled
again only with the same keys, unless the operator says that it was replaced.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from ota import payload, strictjson
from ota.errors import PublishError, Reason
from ota.payload import key_id
from ota.publisher import files
from ota.publisher.certificates import certificate_pem
from ota.publisher.repository import Repository, check_device

FORMAT = 1
MAX_REQUEST_BYTES = 16384
_MAX_DEVICE_BYTES = 16384
_HPKE_PUBLIC_BYTES = 32


@dataclass(frozen=True, slots=True)
class Device:
    """`devices/<id>/device.json`: what the publisher knows of a device."""

    device: str
    hpke_public: bytes
    certificate_key: bytes
    certificate_serial: int
    certificate_expires: str
    enrolled: str
    desired_version: int

    @property
    def kid(self) -> str:
        """Which HPKE key its grants are made for."""
        return key_id(self.hpke_public)


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A new enrolment; `bundle` is the file that goes back to the device and holds nothing secret."""

    device: Device
    bundle: bytes


@dataclass(frozen=True, slots=True)
class _Request:
    device: str
    public_key: ec.EllipticCurvePublicKey
    hpke_public: bytes


def enroll(repository: Repository, request: bytes, *, host: str, port: int, replace: bool = False) -> Enrolled:
    """Answer the bytes of an enroll-request.json.

    Args:
        host: the broker, as the device will reach it.
        replace: let a known device come back with other keys.

    Raises:
        PublishError: `bad_request` for a request that is malformed or signed by another key, or keys of the wrong kind;
            `device_exists` for a known device with other keys; `unknown_device` for a name outside the grammar.
        OtaError: `bad_json`.
    """
    wanted = _parse_request(request)
    with repository.locked():
        now, limits = repository.now().replace(microsecond=0), repository.settings
        certificate_key = wanted.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        known = load_device(repository, wanted.device) if _has_device(repository, wanted.device) else None
        if (
            known is not None
            and not replace
            and (known.hpke_public, known.certificate_key) != (wanted.hpke_public, certificate_key)
        ):
            raise PublishError(
                Reason.DEVICE_EXISTS,
                f"device {wanted.device} is enrolled with other keys",
                hint="choose another device id, or add --replace if its storage was replaced",
            )
        certificate = repository.authority.issue_device(
            wanted.device, wanted.public_key, now, limits.device_certificate_days
        )
        device = Device(
            wanted.device,
            wanted.hpke_public,
            certificate_key,
            certificate.serial_number,
            _iso(certificate.not_valid_after_utc),
            _iso(now),
            0 if known is None else known.desired_version,
        )
        files.make_directory(repository.device_path(wanted.device))
        store_device(repository, device)
        return Enrolled(device, _bundle(repository, device, certificate, host, port))


def load_device(repository: Repository, device: str) -> Device:
    """The enrolled device.

    Raises:
        PublishError: `unknown_device`; `state_corrupt` for an unreadable record.
    """
    path = repository.device_path(device) / "device.json"
    data = files.read_regular(path, _MAX_DEVICE_BYTES)
    if data is None:
        raise PublishError(
            Reason.UNKNOWN_DEVICE,
            f"device {device} is not enrolled here",
            hint=f"edge-ota devices {repository.path} lists those that are",
        )
    record = strictjson.loads(data, max_bytes=_MAX_DEVICE_BYTES, what=str(path))
    try:
        return Device(
            device=str(record["device"]),
            hpke_public=base64.b64decode(record["hpke_public"], validate=True),
            certificate_key=base64.b64decode(record["certificate_key"], validate=True),
            certificate_serial=int(record["certificate_serial"], 16),
            certificate_expires=str(record["certificate_expires"]),
            enrolled=str(record["enrolled"]),
            desired_version=int(record["desired_version"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise PublishError(Reason.STATE_CORRUPT, f"{path} is not a device record: {e!r}", hint="restore it") from e


def store_device(repository: Repository, device: Device) -> None:
    """Write the device's record."""
    record = {
        "version": FORMAT,
        "device": device.device,
        "kid": device.kid,
        "hpke_public": base64.b64encode(device.hpke_public).decode(),
        "certificate_key": base64.b64encode(device.certificate_key).decode(),
        "certificate_serial": f"{device.certificate_serial:x}",
        "certificate_expires": device.certificate_expires,
        "enrolled": device.enrolled,
        "desired_version": device.desired_version,
    }
    files.write_atomic(repository.device_path(device.device) / "device.json", strictjson.canonical(record) + b"\n")


def _has_device(repository: Repository, device: str) -> bool:
    return (repository.device_path(device) / "device.json").is_file()


def _parse_request(data: bytes) -> _Request:
    record = strictjson.loads(data, max_bytes=MAX_REQUEST_BYTES, what="enrolment request")
    if not isinstance(record, dict) or record.get("version") != FORMAT:
        raise _bad(f"it is not of version {FORMAT}")
    device = check_device(_text(record, "device"))
    return _Request(device, _csr_key(_text(record, "csr"), device), _hpke_key(_text(record, "hpke_public")))


def _csr_key(pem: str, device: str) -> ec.EllipticCurvePublicKey:
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        key = csr.public_key()
        valid = csr.is_signature_valid
        names = [(attribute.oid, attribute.value) for attribute in csr.subject]
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as e:
        raise _bad(f"its csr is not a certificate request: {e}") from e
    if not valid:
        raise _bad("its csr is not signed by its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _bad("its csr has a key that is not EC P-256")
    if names != [(NameOID.COMMON_NAME, device)]:
        raise _bad(f"its csr is not for the name {device!r} alone")
    return key


def _hpke_key(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as e:
        raise _bad("its hpke_public is not base64") from e
    if len(raw) != _HPKE_PUBLIC_BYTES:
        raise _bad(f"its hpke_public has {len(raw)} bytes, not {_HPKE_PUBLIC_BYTES}")
    try:
        # a point of low order makes every shared secret zero; the first wrap shows it
        payload.wrap_key(bytes(payload.CEK_BYTES), X25519PublicKey.from_public_bytes(raw).public_bytes_raw(), b"")
    except ValueError as e:
        raise _bad("its hpke_public is not a usable X25519 key") from e
    return raw


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise _bad(f"{key} is missing or not a text")
    return value


def _bad(why: str) -> PublishError:
    return PublishError(
        Reason.BAD_REQUEST, f"enrolment request refused: {why}", hint="make a new one on the device: edge-agent enroll"
    )


def _bundle(repository: Repository, device: Device, certificate: x509.Certificate, host: str, port: int) -> bytes:
    root = repository.read_metadata("root", repository.root_version())
    if root is None:
        raise PublishError(Reason.STATE_CORRUPT, "the newest root metadata cannot be read", hint="restore a backup")
    bundle = {
        "version": FORMAT,
        "device": device.device,
        "tenant": repository.tenant,
        "certificate": certificate_pem(certificate),
        "ca": certificate_pem(repository.authority.certificate()),
        "broker": {"host": host, "port": port},
        "root": root.decode(),
    }
    return strictjson.canonical(bundle) + b"\n"


def _iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
