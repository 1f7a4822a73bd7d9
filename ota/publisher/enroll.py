"""Enrolment: a device's request becomes its certificate and the bundle that it is started with.

The publisher takes two public keys and a name out of a request and nothing else. A device that is known is enrolled
again only with the same keys, unless the operator says that it was replaced.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
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
from ota.publisher import files, sticks
from ota.publisher.certificates import certificate_pem
from ota.publisher.repository import Repository, check_device

FORMAT = 1
MAX_REQUEST_BYTES = 16384
_MAX_DEVICE_BYTES = 16384
_HPKE_PUBLIC_BYTES = 32
MAX_OLDER = 64


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was issued to a device: its serial number and its end."""

    serial: int
    expires: str


@dataclass(frozen=True, slots=True)
class Device:
    """`devices/<id>/device.json`: what the publisher knows of a device.

    `hpke_public` is the newest key that the device reported, the one that grants are made for; `former_hpke` the one
    before, until a grant for the new one is signed. `older` are certificates before the newest that may still be
    valid. `revoked` is since when the device is expelled, or empty; `decommissioned` that it is not coming back.
    """

    device: str
    hpke_public: bytes
    certificate_key: bytes
    certificate_serial: int
    certificate_expires: str
    enrolled: str
    desired_version: int
    former_hpke: bytes = b""
    older: tuple[Issued, ...] = ()
    revoked: str = ""
    decommissioned: bool = False

    @property
    def kid(self) -> str:
        """Which HPKE key its grants are made for."""
        return key_id(self.hpke_public)

    @property
    def certificates(self) -> tuple[Issued, ...]:
        """Every certificate of this device that may still be valid, the newest first."""
        return (Issued(self.certificate_serial, self.certificate_expires), *self.older)


@dataclass(frozen=True, slots=True)
class Places:
    """Where a device finds its fleet: the broker; the listener for renewals and the web server, empty for none."""

    host: str
    port: int
    renewal: str = ""
    https: str = ""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A new enrolment; `bundle` is the file that goes back to the device and holds nothing secret."""

    device: Device
    bundle: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """What an enrolment request asks for, checked."""

    device: str
    public_key: ec.EllipticCurvePublicKey
    hpke_public: bytes

    @property
    def certificate_key(self) -> bytes:
        """The public key in DER."""
        return self.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def is_of(self, device: Device) -> bool:
        """Whether the board that asks is the one that is known, by its newest keys."""
        return (device.hpke_public, device.certificate_key) == (self.hpke_public, self.certificate_key)


def enroll(
    repository: Repository,
    request: bytes,
    *,
    host: str,
    port: int,
    renewal: str = "",
    https: str = "",
    replace: bool = False,
) -> Enrolled:
    """Answer the bytes of an enroll-request.json.

    Args:
        host, port, renewal, https: see `Places`; the broker as the device will reach it.
        replace: let a known device come back with other keys.

    Raises:
        PublishError: `bad_request` for a request that is malformed or signed by another key, or keys of the wrong kind;
            `device_exists` for a known device with other keys; `device_revoked` for one that was expelled;
            `unknown_device` for a name outside the grammar.
        OtaError: `bad_json`.
    """
    wanted = parse_request(request)
    with repository.locked():
        return admit(repository, wanted, Places(host, port, renewal, https), replace=replace)


def admit(repository: Repository, wanted: Request, places: Places, *, replace: bool = False) -> Enrolled:
    """As `enroll`, for a checked request, by a caller that holds the repository's lock. With `replace` the record of
    another board with this id is overwritten: `revocation.take_over` revokes its certificates first."""
    now = repository.now().replace(microsecond=0)
    known = load_device(repository, wanted.device) if has_device(repository, wanted.device) else None
    if known is not None and known.revoked and not replace:
        raise revoked_error(known)
    same = known is not None and wanted.is_of(known)
    if known is not None and not replace and not same:
        raise PublishError(
            Reason.DEVICE_EXISTS,
            f"device {wanted.device} is enrolled with other keys",
            hint="choose another device id, or add --replace if its storage was replaced",
        )
    certificate = issue(repository, wanted, now)
    device = Device(
        wanted.device,
        wanted.hpke_public,
        wanted.certificate_key,
        certificate.serial_number,
        _iso(certificate.not_valid_after_utc),
        _iso(now),
        0 if known is None else known.desired_version,
        older=() if known is None or not same else still_valid(known.certificates, now)[:MAX_OLDER],
    )
    files.make_directory(repository.device_path(wanted.device))
    store_device(repository, device)
    return Enrolled(device, bundle(repository, device, certificate, places))


def issue(repository: Repository, wanted: Request, now: datetime) -> x509.Certificate:
    """A certificate for a checked request."""
    return repository.authority.issue_device(
        wanted.device, wanted.public_key, now, repository.settings.device_certificate_days
    )


def still_valid(issued: Iterable[Issued], now: datetime) -> tuple[Issued, ...]:
    """Those that have not ended."""
    return tuple(one for one in issued if datetime.fromisoformat(one.expires) > now)


def revoked_error(device: Device) -> PublishError:
    """The refusal of a device that was expelled."""
    what = "decommissioned" if device.decommissioned else "revoked"
    return PublishError(
        Reason.DEVICE_REVOKED,
        f"device {device.device} was {what} at {device.revoked}",
        hint="a new board under this id: edge-ota replace REPO DEVICE; else enrol it under another id",
    )


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
            former_hpke=base64.b64decode(record.get("former_hpke", ""), validate=True),
            older=tuple(Issued(int(one["serial"], 16), str(one["expires"])) for one in record.get("older", [])),
            revoked=str(record.get("revoked", "")),
            decommissioned=record.get("decommissioned", False) is True,
        )
    except (KeyError, TypeError, ValueError) as e:
        raise PublishError(Reason.STATE_CORRUPT, f"{path} is not a device record: {e!r}", hint="restore it") from e


def store_device(repository: Repository, device: Device) -> None:
    """Write the device's record."""
    record: dict[str, Any] = {
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
    if device.former_hpke:
        record["former_hpke"] = base64.b64encode(device.former_hpke).decode()
        record["former_kid"] = key_id(device.former_hpke)
    if device.older:
        record["older"] = [{"serial": f"{one.serial:x}", "expires": one.expires} for one in device.older]
    if device.revoked:
        record |= {"revoked": device.revoked, "decommissioned": device.decommissioned}
    files.write_atomic(repository.device_path(device.device) / "device.json", strictjson.canonical(record) + b"\n")


def has_device(repository: Repository, device: str) -> bool:
    """Whether a device of that id was ever enrolled."""
    return (repository.device_path(device) / "device.json").is_file()


def parse_request(data: bytes) -> Request:
    """Check an enrolment request.

    Raises:
        PublishError, OtaError: as `enroll`.
    """
    record = strictjson.loads(data, max_bytes=MAX_REQUEST_BYTES, what="enrolment request")
    if not isinstance(record, dict) or record.get("version") != FORMAT:
        raise _bad(f"it is not of version {FORMAT}")
    return request_from(record)


def request_from(record: Mapping[str, Any]) -> Request:
    """The same from a parsed object that holds `device`, `csr` and `hpke_public`.

    Raises:
        PublishError: as `enroll`.
    """
    device = check_device(_text(record, "device"))
    return Request(device, _csr_key(_text(record, "csr"), device), _hpke_key(_text(record, "hpke_public")))


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
    except ValueError as e:  # not base64, or not even ASCII
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


def bundle(repository: Repository, device: Device, certificate: x509.Certificate, places: Places) -> bytes:
    """What the device is started with."""
    root = repository.read_metadata("root", repository.root_version())
    if root is None:
        raise PublishError(Reason.STATE_CORRUPT, "the newest root metadata cannot be read", hint="restore a backup")
    fields: dict[str, Any] = {
        "version": FORMAT,
        "device": device.device,
        "tenant": repository.tenant,
        "certificate": certificate_pem(certificate),
        "ca": certificate_pem(repository.authority.certificate()),
        "broker": {"host": places.host, "port": places.port},
        "root": root.decode(),
    }
    fields |= {key: url for key, url in (("renewal", places.renewal), ("https", places.https)) if url}
    # long-lived metadata for sticks is signed by keys of its own, which the device trusts for sticks alone
    if (sideload_root := sticks.pin(repository, device.device)) is not None:
        fields["sideload_root"] = sideload_root
    return strictjson.canonical(fields) + b"\n"


def _iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
