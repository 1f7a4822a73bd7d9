"""The repository's own certificate authority: EC P-256, for mutual TLS between devices, block servers and the broker.

It is not a public-key infrastructure for anything else and signs no metadata. Nothing of a certificate request but
its public key is taken over into a certificate.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ota.errors import PublishError, Reason
from ota.publisher import files
from ota.publisher.keys import KeyStore, private_pem

# With an underscore, which no device id has, so that no device can be enrolled under these names. Every process that
# connects needs a name of its own: a broker that takes the client id from the certificate ends the older session.
SERVICE_NAME = "ota_service"
OPERATOR_NAME = "ota_operator"
_IDENTITY_PATTERN = re.compile(r"ota_[a-z0-9_]{1,40}")
LISTENER_NAME = "listener"
REVOKED_LIST = "revoked.pem"
DEFAULT_BROKER_NAMES = ("localhost", "127.0.0.1", "::1")
# Boards without a battery-backed clock start in the past; a certificate is valid a day before it was made.
_BACKDATE = timedelta(days=1)
_MAX_PEM_BYTES = 65536


@dataclass(frozen=True, slots=True)
class TlsPaths:
    """Files of one TLS identity, as the broker or a client opens them."""

    ca: Path
    certificate: Path
    key: Path


class Authority:
    """Issues certificates with `ca.key`, kept in the key store."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    @property
    def broker_tls(self) -> TlsPaths:
        """What the broker needs."""
        return self._paths("broker")

    @property
    def listener_tls(self) -> TlsPaths:
        """What the enrolment listener needs."""
        return self._paths(LISTENER_NAME)

    @property
    def service_tls(self) -> TlsPaths:
        """What a block server needs to connect to the broker."""
        return self._paths(SERVICE_NAME)

    @property
    def operator_tls(self) -> TlsPaths:
        """What `edge-ota publish` and `grant` need to connect to the broker and send a hint."""
        return self._paths(OPERATOR_NAME)

    def client_tls(self, name: str) -> TlsPaths:
        """What the identity `name` of `issue_client` needs to connect to the broker.

        Raises:
            PublishError: `key_missing` when it was never issued; `bad_spec` for a name of another form.
        """
        paths = self._paths(check_identity(name))
        if not paths.certificate.is_file() or not paths.key.is_file():
            raise PublishError(
                Reason.KEY_MISSING, f"there is no identity {name}", hint=f"edge-ota identity REPO {name} makes one"
            )
        return paths

    def create(self, tenant: str, now: datetime, days: int) -> None:
        """Make the authority's key and its self-signed certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"edge-ota {tenant}")])
        self._keys.store("ca.key", private_pem(key))
        files.write_atomic(self._keys.directory / "ca.pem", _pem(_self_signed(key, name, now, days)))

    def renew(self, now: datetime, days: int) -> x509.Certificate:
        """Make a later certificate of the same key and name: whatever was issued is valid under either of the two.

        Raises:
            PublishError: `key_missing`; `bad_spec` when it would end no later than the present one.
        """
        present = self.certificate()
        key = self._keys.load("ca.key", ec.EllipticCurvePrivateKey)
        later = _self_signed(key, present.subject, now, days)
        if later.not_valid_after_utc <= present.not_valid_after_utc:
            raise PublishError(
                Reason.BAD_SPEC,
                f"the authority's certificate is valid until {present.not_valid_after_utc:%Y-%m-%d} already",
                hint="ca_days in repo.toml says for how long the next one is",
            )
        files.write_atomic(self._keys.directory / "ca.pem", _pem(later))
        return later

    def ends(self) -> dict[str, datetime]:
        """When each certificate that lies among the keys ends: those of `ca`, `broker`, the listener, and identities.

        Raises:
            PublishError: `unsafe_file` for one that cannot be read.
        """
        found = {path.stem for path in self._keys.directory.glob("*.pem")}
        stems = [stem for stem in ("ca", "broker", LISTENER_NAME) if stem in found]
        stems += sorted(stem for stem in found if _IDENTITY_PATTERN.fullmatch(stem))
        return {stem: self._load(f"{stem}.pem").not_valid_after_utc for stem in stems}

    def certificate(self) -> x509.Certificate:
        """The authority's own certificate.

        Raises:
            PublishError: `key_missing`.
        """
        return self._load("ca.pem")

    def issue_broker(self, names: Sequence[str], now: datetime, days: int) -> None:
        """Make the broker's key and a certificate for the host names and addresses `names`, replacing older ones.

        Raises:
            PublishError: `bad_spec` for a name that is neither.
        """
        alternatives = [_alternative(name) for name in names]
        self._issue_pair("broker", names[0][:64], ExtendedKeyUsageOID.SERVER_AUTH, alternatives, now, days)

    def issue_listener(self, names: Sequence[str], now: datetime, days: int) -> None:
        """As `issue_broker`, for the enrolment listener.

        Raises:
            PublishError: `bad_spec`.
        """
        alternatives = [_alternative(name) for name in names]
        self._issue_pair(LISTENER_NAME, names[0][:64], ExtendedKeyUsageOID.SERVER_AUTH, alternatives, now, days)

    def revocation_list(self, revoked: Iterable[tuple[int, datetime]], number: int, now: datetime) -> bytes:
        """The list of revoked certificates as PEM.

        It stays valid as long as the authority: a broker that meets an expired list refuses every device, and what a
        list on the broker's own disk misses, no date can tell.

        Args:
            revoked: serial number and time of each.
            number: of this list; grows by one with each.
        """
        issuer = self.certificate()
        key = self._keys.load("ca.key", ec.EllipticCurvePrivateKey)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(now - _BACKDATE)
            .next_update(issuer.not_valid_after_utc)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        )
        for serial, moment in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment).build()
            )
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue_client(self, name: str, now: datetime, days: int) -> None:
        """Make a client key and certificate that are no device's, replacing older ones of that name.

        Raises:
            PublishError: `bad_spec` for a name that is not `ota_…`.
        """
        self._issue_pair(check_identity(name), name, ExtendedKeyUsageOID.CLIENT_AUTH, [], now, days)

    def issue_device(
        self, device: str, public_key: ec.EllipticCurvePublicKey, now: datetime, days: int
    ) -> x509.Certificate:
        """A client certificate with the common name `device`."""
        return self._sign(device, public_key, ExtendedKeyUsageOID.CLIENT_AUTH, [], now, days)

    def broker_names(self) -> tuple[str, ...]:
        """Host names and addresses that the broker's certificate is valid for.

        Raises:
            PublishError: `key_missing`.
        """
        return self._names("broker.pem")

    def listener_state(self) -> tuple[tuple[str, ...], datetime] | None:
        """Names and end of the listener's certificate; None when there is none yet."""
        paths = self.listener_tls
        if not paths.certificate.is_file() or not paths.key.is_file():
            return None
        return self._names(paths.certificate.name), self._load(paths.certificate.name).not_valid_after_utc

    def _names(self, file_name: str) -> tuple[str, ...]:
        extension = self._load(file_name).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        hosts = extension.value.get_values_for_type(x509.DNSName)
        addresses = extension.value.get_values_for_type(x509.IPAddress)
        return (*hosts, *(str(address) for address in addresses))

    def _issue_pair(
        self,
        stem: str,
        common_name: str,
        purpose: x509.ObjectIdentifier,
        alternatives: list[x509.GeneralName],
        now: datetime,
        days: int,
    ) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(common_name, key.public_key(), purpose, alternatives, now, days)
        files.write_atomic(self._keys.directory / f"{stem}.key", private_pem(key), files.SECRET_MODE)
        files.write_atomic(self._keys.directory / f"{stem}.pem", _pem(certificate))

    def _sign(
        self,
        common_name: str,
        public_key: ec.EllipticCurvePublicKey,
        purpose: x509.ObjectIdentifier,
        alternatives: list[x509.GeneralName],
        now: datetime,
        days: int,
    ) -> x509.Certificate:
        issuer = self.certificate()
        authority_key = self._keys.load("ca.key", ec.EllipticCurvePrivateKey)
        # nobody accepts it any longer than its issuer's: who goes by its end must see the true one
        end = min(now + timedelta(days=days), issuer.not_valid_after_utc)
        if end <= now:
            raise PublishError(
                Reason.CERTIFICATE_EXPIRED,
                f"the authority's certificate ended on {end:%Y-%m-%d}",
                hint="edge-ota renew-ca REPO; devices that do not have the new one yet need a bundle by hand",
            )
        builder = (
            _builder(
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]), issuer.subject, public_key, now, end
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(authority_key, hashes.SHA256())

    def _load(self, file_name: str) -> x509.Certificate:
        path = self._keys.directory / file_name
        pem = files.read_regular(path, _MAX_PEM_BYTES)
        if pem is None:
            raise PublishError(Reason.KEY_MISSING, f"certificate {path} is missing", hint="bring it here")
        try:
            return x509.load_pem_x509_certificate(pem)
        except ValueError as e:
            raise PublishError(Reason.UNSAFE_FILE, f"{path} is not a certificate in PEM form") from e

    def _paths(self, stem: str) -> TlsPaths:
        directory = self._keys.directory
        return TlsPaths(directory / "ca.pem", directory / f"{stem}.pem", directory / f"{stem}.key")


def check_identity(name: str) -> str:
    """Return `name` when it can be an identity of the operator's side.

    Raises:
        PublishError: `bad_spec`.
    """
    if not _IDENTITY_PATTERN.fullmatch(name):
        raise PublishError(
            Reason.BAD_SPEC, f"identity {name[:60]!r} is not allowed", hint="ota_ and 1 to 40 of a-z, 0-9 and _"
        )
    return name


def certificate_pem(certificate: x509.Certificate) -> str:
    """`certificate` as PEM text."""
    return _pem(certificate).decode()


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _self_signed(key: ec.EllipticCurvePrivateKey, name: x509.Name, now: datetime, days: int) -> x509.Certificate:
    return (
        _builder(name, name, key.public_key(), now, now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(end)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass  # not an address, so it has to be a host name
    labels = name.split(".")
    if len(name) > 253 or not all(
        0 < len(label) <= 63 and label.isascii() and label.replace("-", "").isalnum() for label in labels
    ):
        raise PublishError(
            Reason.BAD_SPEC,
            f"broker name {name[:80]!r} is neither a host name nor an address",
            hint="name it as devices reach it: broker.example or 192.0.2.7",
        )
    return x509.DNSName(name)
