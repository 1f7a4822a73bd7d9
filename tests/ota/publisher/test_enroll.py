"""Enrolment: a good request gives a certificate and a bundle, everything else is refused before anything is signed."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tuf.api.metadata import Metadata, Root

from ota.errors import OtaError
from ota.publisher.enroll import enroll, load_device
from ota.publisher.repository import Repository
from tests.ota.publisher.conftest import FakeDevice


def attempt(repository: Repository, request: bytes) -> Any:
    return enroll(repository, request, host="broker.example", port=8883)


def refused(repository: Repository, request: bytes) -> OtaError:
    with pytest.raises(OtaError) as caught:
        attempt(repository, request)
    assert list(repository.devices()) == []
    return caught.value


def test_the_bundle_holds_what_a_device_needs_and_no_secret(repository: Repository) -> None:
    device = FakeDevice("cam-7")
    enrolled = attempt(repository, device.request())
    bundle = json.loads(enrolled.bundle)
    assert bundle.keys() == {"version", "device", "tenant", "certificate", "ca", "broker", "root"}
    assert (bundle["device"], bundle["tenant"]) == ("cam-7", "edge")
    assert bundle["broker"] == {"host": "broker.example", "port": 8883}
    assert "PRIVATE" not in enrolled.bundle.decode()
    root = Metadata[Root].from_bytes(bundle["root"].encode())
    root.verify_delegate("root", root)
    certificate = x509.load_pem_x509_certificate(bundle["certificate"].encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(bundle["ca"].encode()))
    assert certificate.public_key() == device.key.public_key()
    assert [(a.oid, a.value) for a in certificate.subject] == [(NameOID.COMMON_NAME, "cam-7")]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_extensions_that_a_request_asks_for_are_not_granted(repository: Repository) -> None:
    device = FakeDevice("cam-7")
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cam-7")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("broker.example")]), critical=False)
        .sign(device.key, hashes.SHA256())
    )
    enrolled = attempt(repository, device.request(csr=greedy.public_bytes(serialization.Encoding.PEM).decode()))
    certificate = x509.load_pem_x509_certificate(json.loads(enrolled.bundle)["certificate"].encode())
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_the_registry_knows_the_device_afterwards(repository: Repository) -> None:
    device = FakeDevice("cam-7")
    enrolled = attempt(repository, device.request())
    assert list(repository.devices()) == ["cam-7"]
    assert load_device(repository, "cam-7") == enrolled.device
    assert enrolled.device.hpke_public == device.hpke.public_key().public_bytes_raw()
    assert len(enrolled.device.kid) == 16


@pytest.mark.parametrize("name", ["", "Cam", "../x", "fleet", "a_b", "x" * 49, "cam/1", "cam\n"])
def test_a_name_outside_the_grammar_is_refused(repository: Repository, name: str) -> None:
    assert refused(repository, FakeDevice("cam-7").request(device=name)).reason.value == "unknown_device"


def test_a_request_for_another_name_is_refused(repository: Repository) -> None:
    device = FakeDevice("cam-7")
    assert refused(repository, device.request(csr=device.csr("cam-8"))).reason.value == "bad_request"
    assert "alone" in refused(repository, device.request(csr=device.csr("cam-7", "cam-8"))).message


def test_a_request_signed_by_another_key_is_refused(repository: Repository) -> None:
    device = FakeDevice("cam-7")
    request = x509.load_pem_x509_csr(device.csr().encode()).public_bytes(serialization.Encoding.DER)
    other = FakeDevice("cam-7").key.public_key()
    own = device.key.public_key()
    der = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    forged = request.replace(own.public_bytes(*der), other.public_bytes(*der))
    assert forged != request
    pem = x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM).decode()
    assert "not signed by its own key" in refused(repository, device.request(csr=pem)).message


@pytest.mark.parametrize("kind", ["rsa", "p384"])
def test_a_key_of_another_kind_is_refused(repository: Repository, kind: str) -> None:
    device = FakeDevice("cam-7")
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP384R1())
    device.key = key  # type: ignore[assignment]
    assert "not EC P-256" in refused(repository, device.request()).message


LOW_ORDER = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 2}, "not of version 1"),
        ({"csr": "no request"}, "not a certificate request"),
        ({"csr": None}, "csr is missing"),
        ({"hpke_public": "%%%"}, "not base64"),
        ({"hpke_public": "AAAA"}, "has 3 bytes, not 32"),
        ({"hpke_public": LOW_ORDER}, "not a usable X25519 key"),
        ({"hpke_public": 7}, "hpke_public is missing"),
        ({"device": None}, "device is missing"),
    ],
)
def test_a_malformed_request_is_refused_with_what_is_wrong(
    repository: Repository, changes: dict[str, Any], text: str
) -> None:
    error = refused(repository, FakeDevice("cam-7").request(**changes))
    assert (error.reason.value, text in error.message) == ("bad_request", True), error.message


@pytest.mark.parametrize("data", [b"", b"[]", b"{" * 100, b"\xff", b'{"version":1,"version":1}', b" " * 20_000])
def test_bytes_that_are_no_request_are_refused(repository: Repository, data: bytes) -> None:
    assert refused(repository, data).reason.value in ("bad_json", "bad_request")


def test_the_same_device_is_enrolled_again_and_another_in_its_place_only_on_demand(repository: Repository) -> None:
    device = FakeDevice("cam-7")
    first = attempt(repository, device.request())
    again = attempt(repository, device.request())
    assert again.device.certificate_serial != first.device.certificate_serial
    impostor = FakeDevice("cam-7")
    for request in (
        impostor.request(),
        FakeDevice("cam-7", hpke=device.hpke).request(),
        FakeDevice("cam-7", hpke=X25519PrivateKey.generate(), key=device.key).request(),
    ):
        with pytest.raises(OtaError) as caught:
            attempt(repository, request)
        assert caught.value.reason.value == "device_exists"
    replaced = enroll(repository, impostor.request(), host="h", port=1, replace=True)
    assert load_device(repository, "cam-7") == replaced.device
