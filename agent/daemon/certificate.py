"""From when until when a certificate is valid: the one thing the daemon asks of its own certificate every day.

Reads DER as far as RFC 5280, 4.1 needs for that (`cryptography.x509` costs 2.5 MB of memory). It verifies nothing.
"""

from __future__ import annotations

import datetime
import ssl
from dataclasses import dataclass

_SEQUENCE, _INTEGER, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0x02, 0xA0, 0x17, 0x18


@dataclass(frozen=True, slots=True)
class Validity:
    """The two dates of a certificate, UTC."""

    begins: datetime.datetime
    ends: datetime.datetime

    @property
    def life(self) -> datetime.timedelta:
        """Length of its life."""
        return self.ends - self.begins


def validity(pem: bytes) -> Validity:
    """The dates of the first certificate in `pem`.

    Raises:
        ValueError: it is no certificate.
    """
    first, _, _ = pem.decode("ascii").partition("-----END CERTIFICATE-----")
    der = ssl.PEM_cert_to_DER_cert(first.strip() + "\n-----END CERTIFICATE-----\n")
    certificate, _ = _element(der, _SEQUENCE)
    body, _ = _element(certificate, _SEQUENCE)
    if body[:1] == bytes([_VERSION]):
        _, body = _element(body, _VERSION)
    for tag in (_INTEGER, _SEQUENCE, _SEQUENCE):  # serial number, signature algorithm, issuer
        _, body = _element(body, tag)
    dates, _ = _element(body, _SEQUENCE)
    begins, rest = _time(dates)
    ends, _ = _time(rest)
    return Validity(begins, ends)


def _element(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """Content of the first element, which must have `tag`, and what follows it."""
    if len(data) < 2 or data[0] != tag:
        raise ValueError("not a certificate")
    length, start = data[1], 2
    if length & 0x80:
        count = length & 0x7F
        if not 1 <= count <= 4:
            raise ValueError("not a certificate")
        length, start = int.from_bytes(data[2 : 2 + count], "big"), 2 + count
    if len(data) < start + length:
        raise ValueError("a certificate that was cut short")
    return data[start : start + length], data[start + length :]


def _time(data: bytes) -> tuple[datetime.datetime, bytes]:
    if data[:1] == bytes([_UTC_TIME]):
        text, rest = _element(data, _UTC_TIME)
        year = int(text[:2])
        # RFC 5280, 4.1.2.5.1
        text = f"{2000 + year if year < 50 else 1900 + year}".encode() + text[2:]
    else:
        text, rest = _element(data, _GENERALIZED_TIME)
    return datetime.datetime.strptime(text.decode("ascii"), "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC), rest
