"""Readers of what a device's life brings: tokens, enrolment and renewal requests, key rings, sticks, addresses."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from agent import config
from agent.daemon import certificate, registrar
from agent.daemon import settings as wished
from ota import enrolment
from ota.client import keyring, policy, sealed
from ota.client.transports.address import parse_address
from ota.client.transports.zip import ZipTransport
from ota.errors import OtaError, Reason, TransferError
from ota.publisher import listener, tokens
from ota.publisher.enroll import Places, request_from
from ota.publisher.repository import Repository
from tests.fuzz import known_keys
from tests.fuzz.engine import Parser

SECRET = b"s" * enrolment.SECRET_BYTES
FINGERPRINT = b"f" * 32
DOCUMENTS = {
    "metadata/timestamp.json": b'{"signed": {}}',
    "devices/cam-1/desired.json": b'{"signed": {}}',
    "payloads/" + "a" * 64: bytes(range(256)) * 8,
}
KNOWN = "cam-7"
PLACES = Places("broker.example", 8883)
_addresses = itertools.count()


def words(read: Callable[[str], object]) -> Callable[[bytes], object]:
    """A parser of a short text that raises ValueError, which its caller turns into its own error."""

    def parse(data: bytes) -> object:
        try:
            return read(data.decode("utf-8", "surrogateescape"))
        except ValueError as e:
            raise OtaError(Reason.BAD_USAGE, "refused") from e

    return parse


def read_token(data: bytes) -> object:
    token = enrolment.parse_token(data.decode("utf-8", "surrogateescape"))
    assert enrolment.parse_token(enrolment.token_text(token)) == token
    return token


def read_header(data: bytes) -> object:
    return sealed.parse(data, keyring.MAGIC, len(data))


def read_zip(folder: Path) -> Callable[[bytes], object]:
    """Every document that a device would ask for; what is read has to stand in the file in one piece."""

    def parse(data: bytes) -> object:
        path = folder / "stick.zip"
        path.write_bytes(data)
        transport = ZipTransport(path, "cam-1")

        async def read() -> list[bytes]:
            found = [await transport.metadata("timestamp", None, 4096), await transport.desired(4096)]
            with contextlib.suppress(TransferError):
                found.append(await transport.target("person/1.0.0/release.json", "b" * 64, 4096))
            for offset in (0, 512, 1 << 40):
                found.append(await transport.block("a" * 64, offset, 1024))
            return found

        found = asyncio.run(read())
        assert all(piece in data for piece in found)
        return found

    return parse


class Registry:
    """The enrolment listener over a repository that has one device, and hands out one token."""

    def __init__(self, repository: Callable[[], Repository]) -> None:
        self._repository = repository
        self._values: dict[str, str] = {}

    def prepare(self) -> None:
        """Enrol the device, once."""
        if not self._values:
            repository = self._repository()
            token = tokens.make(repository, KNOWN).text
            bundle = json.loads(tokens.redeem(repository, token, request_from(enroll_request(KNOWN)), PLACES))
            self._values = {"@token": token, "@certificate": bundle["certificate"]}

    def reader(self, path: str) -> Callable[[bytes], object]:
        """A request from an address that did not ask before. `@token`, `@certificate`, `@nonce` and `@signature` in it
        become what an honest device would send."""

        def parse(data: bytes) -> object:
            self.prepare()
            answering = listener.Registrar(self._repository(), PLACES, clock=lambda: 0.0)
            address = f"192.0.2.{next(_addresses)}"
            nonce = str(answering.answer(address, "POST", "/nonce", b"")["nonce"])
            return answering.answer(address, "POST", path, _completed(data, {**self._values, "@nonce": nonce}))

        return parse


def _completed(data: bytes, values: Mapping[str, str]) -> bytes:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(fields, dict) or not any(isinstance(v, str) and v.startswith("@") for v in fields.values()):
        return data
    fields = {key: values.get(value, value) if isinstance(value, str) else value for key, value in fields.items()}
    if fields.get("signature") == "@signature":
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            signature = known_keys.tls_key().sign(enrolment.proof_input(fields), ec.ECDSA(hashes.SHA256()))
            fields["signature"] = base64.b64encode(signature).decode()
    return json.dumps(fields).encode("utf-8", "surrogatepass")


def read_settings(own: Callable[[], config.Config]) -> Callable[[bytes], object]:
    def parse(data: bytes) -> object:
        return wished.read(data.decode("utf-8", "replace"), own())

    return parse


def parsers(folder: Path, registry: Callable[[], Repository], state: Callable[[], object]) -> list[Parser]:
    """All of them.

    Args:
        folder: scratch space.
        registry: the publisher's repository.
        state: what a refused request must not change in it.
    """
    own = folder / "own.toml"
    listening = Registry(registry)
    strict: dict[str, Any] = {"state": state, "prepare": listening.prepare, "examples": 40}

    def read_own() -> config.Config:
        own.write_text(config.example())
        return config.load(own)

    return [
        Parser("token", read_token, form="bytes", person=True),
        Parser("ring", keyring.decode),
        Parser("sealed-header", read_header, form="bytes"),
        Parser("zip", read_zip(folder), form="bytes", person=True, examples=50),
        Parser(
            "certificate", words(lambda text: certificate.validity(text.encode("utf-8", "surrogateescape"))), "bytes"
        ),
        Parser("https-address", words(parse_address), form="bytes"),
        Parser("server-address", words_of_server, form="bytes", person=True),
        Parser("window", words(policy.parse_window), form="bytes"),
        Parser("settings-toml", read_settings(read_own), form="toml", person=True),
        Parser("listener-enroll", listening.reader("/enroll"), person=True, **strict),
        Parser("listener-renew", listening.reader("/renew"), person=True, **strict),
    ]


def words_of_server(data: bytes) -> object:
    return registrar.parse_server(data.decode("utf-8", "surrogateescape"))


# -- valid inputs ------------------------------------------------------------------------------------------------------


def token() -> enrolment.Token:
    return enrolment.Token("cam-1", SECRET, FINGERPRINT)


def ring() -> bytes:
    pem, _ = known_keys.certificates("cam-1")
    identity = keyring.TlsIdentity(known_keys.tls_key_pem(), pem.encode())
    return keyring.encode(keyring.Ring((b"1" * 32, b"2" * 32), (known_keys.HPKE,), identity, None))


def enroll_request(device: str) -> dict[str, Any]:
    return {
        "version": enrolment.VERSION,
        "device": device,
        "csr": known_keys.csr(device),
        "hpke_public": base64.b64encode(known_keys.hpke_public()).decode(),
    }


def renew_request(device: str) -> bytes:
    proof = {"certificate": "@certificate", "nonce": "@nonce", "signature": "@signature"}
    return json.dumps({**enroll_request(device), **proof}, indent=1).encode()
