"""Enrolment: a request leaves the device and a bundle comes back, as files or over the network with a one-time token.

The private keys never leave. The bundle pins the root of trust, so as a file it must come by a trusted way; over the
network the token says which authority may hand it out. Invariant: `bundle.json` is the enrolment; the files beside it
are made of it again where a power cut came between.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import serialization

from agent.config import BrokerConfig
from agent.daemon.keys import DeviceKeys
from agent.errors import ConfigError, Reason
from ota import enrolment, strictjson
from ota.client import trust
from ota.client.fsops import Fs
from ota.client.keyring import MAX_HPKE_KEYS, Keyring, Ring
from ota.client.limits import Limits
from ota.client.transports.address import parse_address
from ota.errors import OtaError
from ota.release import DEVICE_PATTERN

if TYPE_CHECKING:
    from cryptography import x509

MAX_BUNDLE_BYTES = 256 * 1024
FOLDER = "enrolment"
_BUNDLE = "bundle.json"
_ASK = "ask the operator for a new one: edge-ota enroll"
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Who this device is and whom it trusts. Certificate and CA are files because the TLS library reads them.

    `sideload_root` is the root that sticks are signed by; without one they are judged by the fleet's own, `root`.
    `renewal` is the listener that renews certificates, `https` a web server with the repository; empty for none.
    """

    device: str
    tenant: str
    host: str
    port: int
    certificate: Path
    ca: Path
    root: bytes
    sideload_root: bytes | None = None
    renewal: str = ""
    https: str = ""


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
    return json.dumps(_request_fields(device, keys), indent=1).encode() + b"\n"


def by_token(server: str, token_text: str, keys: DeviceKeys, state_dir: Path) -> Enrolment:
    """Enrol over the network: request, answer and installation in one. Again after a power cut is well: the same keys
    with the same token get the same bundle.

    Raises:
        ConfigError: `bad_usage`, `bad_bundle`, `already_enrolled`.
        OtaError: the server cannot be reached or trusted, or refuses: its reason.
    """
    # http.client and x509: memory that the daemon does not need for this
    from agent.daemon import registrar

    token = enrolment.parse_token(token_text)
    where = registrar.parse_server(server)
    # before the token is spent on keys that a reset destroys
    _check_life(token.device, token.ca_sha256, state_dir)
    ca = registrar.fetch_ca(where, token)
    answer = registrar.enroll(where, ca, token_text.strip(), _request_fields(token.device, keys))
    fields = _parse(answer)
    if fields["device"] != token.device or _authority(fields) != token.ca_sha256:
        raise ConfigError(Reason.BAD_BUNDLE, "the server's bundle is not the one that the token is for", hint=_ASK)
    return install(answer, keys, state_dir)


def _request_fields(device: str, keys: DeviceKeys) -> dict[str, Any]:
    from cryptography.hazmat.primitives.asymmetric import ec

    from agent.daemon import registrar

    key = serialization.load_pem_private_key(keys.tls_key.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(Reason.KEY_UNSAFE, f"{keys.tls_key} is not an elliptic-curve key")
    return {
        "version": enrolment.VERSION,
        "device": device,
        "csr": registrar.signing_request(key, device),
        "hpke_public": base64.b64encode(keys.hpke.public_key().public_bytes_raw()).decode(),
    }


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
    """Check a bundle against this device's key and keep it, durably. Renewed identities of the key ring end with it.

    Raises:
        ConfigError: `bad_bundle` for a damaged one, or one made for another device's key; `already_enrolled` when
            this device belongs to another operator or has another id; what was there stays.
        StoreError: the disk cannot be written.
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
    _check_life(fields["device"], _authority(fields), state_dir)
    fs = Fs(state_dir)
    ring = Keyring(fs, keys.storage, (keys.hpke.private_bytes_raw(),))
    if ring.exists:
        ring.update(lambda known: _enrolled_anew(known, keys))
    fs.make_dirs(FOLDER)
    fs.write_atomic(f"{FOLDER}/{_BUNDLE}", bundle)
    _unpack(fields, fs)
    return _enrolment(fields, state_dir / FOLDER)


def load(state_dir: Path) -> Enrolment | None:
    """The enrolment in force, or None for a device that has none.

    Raises:
        ConfigError: `bad_bundle`: it is damaged.
    """
    fields = _kept(state_dir)
    if fields is None:
        return None
    _unpack(fields, Fs(state_dir))
    return _enrolment(fields, state_dir / FOLDER)


def keep_authority(pem: str, state_dir: Path) -> bool:
    """Keep a later certificate of the authority that this device was enrolled by; False when it has that one.

    It is the same authority by key and name, signed by that key: this device trusts nobody more than before, only for
    longer.

    Raises:
        ConfigError: `bad_bundle`: another authority's, or one that ends earlier; what was there stays.
        StoreError: the disk cannot be written.
    """
    known = _kept(state_dir)
    if known is None or known["ca"].strip() == pem.strip():
        return False
    old, new = _certificate(known["ca"]), _certificate(pem)
    if _authority({"ca": pem}) != _authority(known) or new.subject != old.subject:
        raise ConfigError(Reason.BAD_BUNDLE, "the server names another authority than this device's", hint=_ASK)
    if new.not_valid_after_utc <= old.not_valid_after_utc:
        raise ConfigError(Reason.BAD_BUNDLE, "the server's certificate of the authority ends earlier", hint=_ASK)
    path = state_dir / FOLDER / _BUNDLE
    bundle = strictjson.loads(path.read_bytes(), max_bytes=MAX_BUNDLE_BYTES, what="enrolment bundle")
    changed = strictjson.canonical({**bundle, "ca": pem}) + b"\n"
    fields = _parse(changed)  # what the next start could not read must not take the place of what it can
    fs = Fs(state_dir)
    fs.write_atomic(f"{FOLDER}/{_BUNDLE}", changed)
    _unpack(fields, fs)
    return True


def _kept(state_dir: Path) -> dict[str, str] | None:
    """The bundle that was installed here, None where none was.

    Raises:
        ConfigError: `bad_bundle`: it is damaged, and with it whose floors and models these are.
    """
    path = state_dir / FOLDER / _BUNDLE
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ConfigError) as e:
        what = e.strerror if isinstance(e, OSError) else e.message
        raise ConfigError(
            Reason.BAD_BUNDLE,
            f"{path} is damaged: {what}",
            hint="check the device's storage; edge-agent reset --yes, then enrol the device anew",
        ) from e


def _unpack(fields: dict[str, str], fs: Fs) -> None:
    """The files that the TLS library reads, as the bundle has them: a power cut may have come between."""
    for name, text in (("device.crt", fields["certificate"]), ("ca.crt", fields["ca"])):
        path = f"{FOLDER}/{name}"
        if fs.read(path, MAX_BUNDLE_BYTES) != text.encode():
            fs.write_atomic(path, text.encode())


def _enrolled_anew(ring: Ring, keys: DeviceKeys) -> Ring:
    """The ring of a device that was enrolled again with the keys it was born with."""
    own = keys.hpke.private_bytes_raw()
    hpke = (own, *(key for key in ring.hpke if key != own))[:MAX_HPKE_KEYS]
    return replace(ring, hpke=hpke, tls=None, tls_trial=None)


def _check_life(device: str, authority: bytes, state_dir: Path) -> None:
    """Another operator's floors, models and settings must be gone before this one's come, and another id's as well:
    documents of the new one begin below its floors."""
    known = _kept(state_dir)
    if known is None:
        return
    if known["device"] != device and _authority(known) == authority:
        raise ConfigError(
            Reason.ALREADY_ENROLLED,
            f"this device is {known['device']!r}, not {device!r}",
            hint="edge-agent reset --yes wipes it; then enrol it under another id",
        )
    if _authority(known) != authority:
        raise ConfigError(
            Reason.ALREADY_ENROLLED,
            f"this device is {known['device']!r} of another operator",
            hint="edge-agent reset --owner --yes wipes it; then enrol it",
        )


def _authority(fields: dict[str, str]) -> bytes:
    try:
        return enrolment.ca_fingerprint(fields["ca"])
    except ValueError as e:
        raise ConfigError(Reason.BAD_BUNDLE, "enrolment bundle: its ca is not one certificate", hint=_ASK) from e


def with_broker(known: Enrolment, broker: BrokerConfig) -> Enrolment:
    """The enrolment with what agent.toml says of the broker."""
    return replace(known, host=broker.host or known.host, port=broker.port or known.port, ca=broker.ca or known.ca)


def _parse(bundle: bytes) -> dict[str, str]:
    try:
        data = strictjson.loads(bundle, max_bytes=MAX_BUNDLE_BYTES, what="enrolment bundle")
        broker = data["broker"]
        fields = {key: data[key] for key in ("device", "tenant", "certificate", "ca", "root")}
        fields["host"], fields["port"] = broker["host"], str(int(broker["port"]))
        fields |= {key: data.get(key, "") for key in ("sideload_root", "renewal", "https")}
    except OtaError as e:
        raise ConfigError(Reason.BAD_BUNDLE, e.message, hint=_ASK) from e
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(Reason.BAD_BUNDLE, f"enrolment bundle: {e!r} is missing or wrong", hint=_ASK) from e
    if not all(isinstance(value, str) for value in fields.values()):
        raise ConfigError(Reason.BAD_BUNDLE, "enrolment bundle: a field is not a text", hint=_ASK)
    try:
        if fields["https"]:
            parse_address(fields["https"])
    except ValueError as e:
        raise ConfigError(Reason.BAD_BUNDLE, f"enrolment bundle: https: {e}", hint=_ASK) from e
    if not DEVICE_PATTERN.fullmatch(fields["device"]) or not _TENANT.fullmatch(fields["tenant"]):
        raise ConfigError(Reason.BAD_BUNDLE, "enrolment bundle: device or tenant is not an id", hint=_ASK)
    return fields


def _certificate(pem: str) -> x509.Certificate:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.public_key()  # read lazily: its faults belong here too
        return certificate
    except (ValueError, UnsupportedAlgorithm) as e:
        raise ConfigError(Reason.BAD_BUNDLE, "enrolment bundle: a certificate cannot be read", hint=_ASK) from e


def _check_issued(certificate: x509.Certificate, ca: x509.Certificate, device: str) -> None:
    """The broker would refuse anything else, and say less."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.x509 import NameOID

    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as e:
        raise ConfigError(Reason.BAD_BUNDLE, "enrolment bundle: its CA did not issue its certificate", hint=_ASK) from e
    names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [device]:
        raise ConfigError(
            Reason.BAD_BUNDLE, f"enrolment bundle: its certificate is for {names}, not for {device!r}", hint=_ASK
        )


def _check_root(fields: dict[str, str]) -> None:
    """A root that does not sign itself could never be followed."""
    for root in filter(None, (fields["root"], fields["sideload_root"])):
        walk = trust.refresh(root.encode(), {}, {}, fields["device"], datetime.datetime.now(datetime.UTC), Limits())
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
        sideload_root=fields["sideload_root"].encode() or None,
        renewal=fields["renewal"],
        https=fields["https"],
    )
