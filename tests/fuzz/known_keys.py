"""Keys that everybody may know: they make kept bundles and requests valid for ever, and protect nothing."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

HPKE = b"h" * 32
_NOT_BEFORE = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(2126, 1, 1, tzinfo=datetime.UTC)


def tls_key() -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(20260101, ec.SECP256R1())


def tls_key_pem() -> bytes:
    return tls_key().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def hpke_public() -> bytes:
    return X25519PrivateKey.from_private_bytes(HPKE).public_key().public_bytes_raw()


def certificates(device: str) -> tuple[str, str]:
    """A device's certificate and that of the authority that issued it, as PEM."""
    authority = ec.derive_private_key(20260102, ec.SECP256R1())

    def issue(name: str, issuer: str, key: ec.EllipticCurvePublicKey, number: int) -> str:
        builder = x509.CertificateBuilder(
            issuer_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]),
            subject_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
            public_key=key,
            serial_number=number,
            not_valid_before=_NOT_BEFORE,
            not_valid_after=_NOT_AFTER,
        )
        builder = builder.add_extension(x509.BasicConstraints(number == 1, None), critical=True)
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    return issue(device, "fuzz", tls_key().public_key(), 2), issue("fuzz", "fuzz", authority.public_key(), 1)


def csr(device: str) -> str:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(tls_key(), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()
