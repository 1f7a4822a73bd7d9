"""Enrolment with a file in each direction: a request leaves the device, a bundle comes back.

The private keys never leave. The bundle pins the root of trust, so it must come by a trusted way.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization

from agent.daemon.keys import DeviceKeys
from agent.errors import ConfigError, Reason
from ota import strictjson
from ota.client import trust
from ota.client.limits import Limits
from ota.errors import OtaError
from ota.release import DEVICE_PATTERN

if TYPE_CHECKING:
    from cryptography import x509

MAX_BUNDLE_BYTES = 256 * 1024
_ASK = "ask the operator for a new one: edge-ota enroll"
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Who this device is and whom it trusts. Certificate and CA are files because the TLS library reads them."""

    device: str
    tenant: str
    host: str
    port: int
    certificate: Path
    ca: Path
    root: bytes


def check_device(device: str) -> str:
    """Return `device` when it is in the grammar of device ids.

    Raises:
        ConfigError: `bad_usage`.
    """
    if not DEVICE_PATTERN.fullmatch(device):
        raise ConfigError(
            Reason.BAD_USAGE, f"device id {device[:60]!r} is not allowed", hint="use a-z, 0-9 and -, at most 48"
        )
    return device


def request(device: str, keys: DeviceKeys) -> bytes:
    """The enrolment request: a signing request for the TLS key and the public HPKE key, as JSON.

    Raises:
        ConfigError: `bad_usage` for a device id outside the grammar.
    """
    check_device(device)
    # 2.5 MB that only enrolment needs
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_pem_private_key(keys.tls_key.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(Reason.KEY_UNSAFE, f"{keys.tls_key} is not an elliptic-curve key")
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, device)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    document = {
        "version": 1,
        "device": device,
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
        "hpke_public": base64.b64encode(keys.hpke.public_key().public_bytes_raw()).decode(),
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def read(path: Path) -> bytes:
    """The bytes of a bundle.

    Raises:
        ConfigError: `bad_bundle` when there is none to read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as e:
        raise ConfigError(
            Reason.BAD_BUNDLE, f"{path}: {e.strerror}", hint="name the file that edge-ota enroll wrote"
        ) from e


def install(bundle: bytes, keys: DeviceKeys, state_dir: Path) -> Enrolment:
    """Check a bundle against this device's key and keep it.

    Raises:
        ConfigError: `bad_bundle` for a damaged one, or one made for another device's key; what was there stays.
    """
    fields = _parse(bundle)
    certificate = _certificate(fields["certificate"])
    _check_issued(certificate, _certificate(fields["ca"]), fields["device"])
    _check_root(fields)
    own = serialization.load_pem_private_key(keys.tls_key.read_bytes(), password=None).public_key()
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if certificate.public_key().public_bytes(*form) != own.public_bytes(*form):
        raise ConfigError(
            Reason.BAD_BUNDLE,
            f"the bundle is for another key than this device's (bundle says {fields['device']!r})",
            hint="make a new request here and enrol with it",
        )
    folder = state_dir / "enrolment"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in (("device.crt", fields["certificate"]), ("ca.crt", fields["ca"])):
        _write(folder / name, text.encode())
    _write(folder / "bundle.json", bundle)
    return _enrolment(fields, folder)


def load(state_dir: Path) -> Enrolment | None:
    """The enrolment in force, or None for a device that has none.

    Raises:
        ConfigError: `bad_bundle`.
    """
    folder = state_dir / "enrolment"
    try:
        data = (folder / "bundle.json").read_bytes()
    except FileNotFoundError:
        return None
    return _enrolment(_parse(data), folder)


def _parse(bundle: bytes) -> dict[str, str]:
    try:
        data = strictjson.loads(bundle, max_bytes=MAX_BUNDLE_BYTES, what="enrolment bundle")
        broker = data["broker"]
        fields = {key: data[key] for key in ("device", "tenant", "certificate", "ca", "root")}
        fields["host"], fields["port"] = broker["host"], str(int(broker["port"]))
    except OtaError as e:
        raise ConfigError(Reason.BAD_BUNDLE, e.message, hint=_ASK) from e
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(Reason.BAD_BUNDLE, f"enrolment bundle: {e!r} is missing or wrong", hint=_ASK) from e
    if not all(isinstance(value, str) for value in fields.values()):
        raise ConfigError(Reason.BAD_BUNDLE, "enrolment bundle: a field is not a text", hint=_ASK)
    if not DEVICE_PATTERN.fullmatch(fields["device"]) or not _TENANT.fullmatch(fields["tenant"]):
        raise ConfigError(Reason.BAD_BUNDLE, "enrolment bundle: device or tenant is not an id", hint=_ASK)
    return fields


def _certificate(pem: str) -> x509.Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as e:
        raise ConfigError(Reason.BAD_BUNDLE, "enrolment bundle: a certificate cannot be read", hint=_ASK) from e


def _check_issued(certificate: x509.Certificate, ca: x509.Certificate, device: str) -> None:
    """The broker would refuse anything else, and say less."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.x509 import NameOID

    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as e:
        raise ConfigError(Reason.BAD_BUNDLE, "enrolment bundle: its CA did not issue its certificate", hint=_ASK) from e
    names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [device]:
        raise ConfigError(
            Reason.BAD_BUNDLE, f"enrolment bundle: its certificate is for {names}, not for {device!r}", hint=_ASK
        )


def _check_root(fields: dict[str, str]) -> None:
    """A root that does not sign itself could never be followed."""
    walk = trust.refresh(
        fields["root"].encode(), {}, {}, fields["device"], datetime.datetime.now(datetime.UTC), Limits()
    )
    try:
        next(walk)  # verifies the pinned root before it asks for the following one
    except OtaError as e:
        raise ConfigError(Reason.BAD_BUNDLE, f"enrolment bundle: {e.message}", hint=_ASK) from e
    finally:
        walk.close()


def _enrolment(fields: dict[str, str], folder: Path) -> Enrolment:
    return Enrolment(
        device=fields["device"],
        tenant=fields["tenant"],
        host=fields["host"],
        port=int(fields["port"]),
        certificate=folder / "device.crt",
        ca=folder / "ca.crt",
        root=fields["root"].encode(),
    )


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.replace(temporary, path)
