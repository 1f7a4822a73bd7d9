"""What a device and the enrolment listener say to each other: the token's text, the proof of possession, the limits.

Shared by both ends and spoken over HTTPS (FORMAT.md 7). It is no client, no server and no authority. Invariants: a
token names the device it is for and the authority that must vouch for the server, so a device sends its secret to
nobody else; what a device signs names every field of its request, so that no part of it can be exchanged.
"""

from __future__ import annotations

import base64
import hashlib
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field

from ota.errors import OtaError, Reason
from ota.release import DEVICE_PATTERN
from ota.strictjson import canonical

VERSION = 1
DEFAULT_PORT = 8884
MAX_BODY_BYTES = 32 * 1024
MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_CA_BYTES = 64 * 1024
SECRET_BYTES = 24

_PREFIX = "edge1"
_FINGERPRINT_BYTES = 32
_TOKEN = re.compile(r"edge1\.([a-z0-9-]{1,48})\.([A-Za-z0-9_-]{32})\.([A-Za-z0-9_-]{43})")
_PROOF = b"edge-ota renew v1\0"


@dataclass(frozen=True, slots=True)
class Token:
    """A one-time permission to enrol `device`; `ca_sha256` is the authority's `ca_fingerprint`."""

    device: str
    secret: bytes = field(repr=False)
    ca_sha256: bytes

    @property
    def digest(self) -> str:
        """What the server keeps instead of the secret: 24 random bytes need no slow hash."""
        return hashlib.sha256(b"edge-ota token v1\0" + self.device.encode() + b"\0" + self.secret).hexdigest()


def token_text(token: Token) -> str:
    """The text that a person carries from the operator to the device."""
    return ".".join((_PREFIX, token.device, _base64url(token.secret), _base64url(token.ca_sha256)))


def parse_token(text: str) -> Token:
    """The token that a person brought.

    Raises:
        OtaError: `token_unknown` for anything that `edge-ota token` cannot have printed.
    """
    match = _TOKEN.fullmatch(text.strip())
    if match is None or not DEVICE_PATTERN.fullmatch(match[1]):
        raise OtaError(
            Reason.TOKEN_UNKNOWN,
            "this is not a token of edge-ota",
            hint="copy it whole, as edge-ota token REPO DEVICE printed it",
        )
    return Token(match[1], _from_base64url(match[2], SECRET_BYTES), _from_base64url(match[3], _FINGERPRINT_BYTES))


def ca_fingerprint(pem: str) -> bytes:
    """Which authority the one certificate in `pem` is of: the SHA-256 of its public key (SubjectPublicKeyInfo, DER),
    which stays the same when the certificate is renewed.

    Raises:
        ValueError: it is none, or not signed by its own key, or there is more in it: a TLS library would trust a second
            certificate as well.
    """
    from cryptography import x509  # memory that the daemon does not need for this
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = ssl.PEM_cert_to_DER_cert(pem.strip() + "\n")
    # the decoder stops where the first certificate is padded and says nothing of what follows
    if "".join(ssl.DER_cert_to_PEM_cert(der).split()) != "".join(pem.split()):
        raise ValueError("more than one certificate")
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.verify_directly_issued_by(certificate)
        key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (TypeError, InvalidSignature, UnsupportedAlgorithm) as e:
        raise ValueError("not the certificate of an authority") from e
    return hashlib.sha256(key).digest()


def proof_input(fields: Mapping[str, str | int]) -> bytes:
    """The bytes that a device signs with its certificate's key to renew it: everything it sends but the signature."""
    return _PROOF + canonical({key: value for key, value in fields.items() if key != "signature"})


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _from_base64url(text: str, length: int) -> bytes:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError as e:  # not base64, or not even ASCII
        raise OtaError(Reason.TOKEN_UNKNOWN, "this is not a token of edge-ota", hint="copy it whole") from e
    if len(data) != length or _base64url(data) != text:
        raise OtaError(Reason.TOKEN_UNKNOWN, "this is not a token of edge-ota", hint="copy it whole")
    return data
