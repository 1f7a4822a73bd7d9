"""The device's end of the enrolment listener (FORMAT.md 7): HTTPS by the standard library, one request a connection.

Blocking; the daemon calls it in a thread. On first contact the token's fingerprint decides who the authority is, ever
after the enrolled one does. Not here: when to renew (`agent.daemon.renewal`), where anything is kept.
Invariants: no secret is sent to a server, and no word of it shown, before it proved to be of the right authority; an
answer is bounded in bytes and seconds, strict JSON, and checked by whoever uses it; a refusal keeps reason and hint.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.errors import ConfigError, Reason
from ota import enrolment, strictjson
from ota.enrolment import Token
from ota.errors import OtaError
from ota.errors import Reason as OtaReason

# shorter than the time a service manager gives the daemon to stop: a thread that waits cannot be cancelled
TIMEOUT_S = 10.0
# from the connection on, for the whole answer: TIMEOUT_S is between two bytes
ANSWER_S = 15.0
# OpenSSL's X509_V_ERR_* (x509_vfy.h)
_NOT_YET_VALID = 9
_EXPIRED = 10
_WRONG_NAME = (62, 64)


@dataclass(frozen=True, slots=True)
class Server:
    """Where the listener is."""

    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        """As a person writes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}{self.path}"


class Expelled(OtaError):
    """The server says that this device is revoked; `evidence` are the signed documents that prove it, by name."""

    def __init__(self, message: str, hint: str, evidence: Mapping[str, bytes]) -> None:
        super().__init__(OtaReason.DEVICE_REVOKED, message, hint=hint)
        self.evidence = evidence


@dataclass(frozen=True, slots=True)
class Renewed:
    """The next certificate, and the authority's present one; both PEM, the second empty from an older server."""

    certificate: str
    ca: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a renewal asks for: the new key's signing request and HPKE key, and the proof's certificate and key."""

    device: str
    csr: str
    hpke_public: bytes
    certificate_pem: str
    key_pem: bytes = field(repr=False)


def parse_server(text: str) -> Server:
    """The server of `https://HOST:PORT`.

    Raises:
        ConfigError: `bad_usage`.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        port = enrolment.DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:  # a port out of range, half an IPv6 address
        parts, port = urllib.parse.urlsplit(""), 0
    odd = parts.username or parts.query or parts.fragment or not text.isprintable()
    if parts.scheme != "https" or not parts.hostname or not port or odd:
        raise ConfigError(
            Reason.BAD_USAGE, f"{text[:80]!r} is not https://HOST:PORT", hint="as edge-ota listen says it"
        )
    return Server(parts.hostname, port, parts.path.rstrip("/"))


def fetch_ca(server: Server, token: Token) -> str:
    """The authority's certificate as PEM, fetched from a server that nobody vouches for yet and taken only when it is
    the one that the token names.

    Raises:
        OtaError: `server_unreachable`; `server_untrusted` when it is another authority's server.
    """
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    answer = _ask(server, anybody, "GET", "/ca", None, proven=False)
    pem = answer.get("ca")
    with contextlib.suppress(ValueError):
        if isinstance(pem, str) and enrolment.ca_fingerprint(pem) == token.ca_sha256:
            return pem
    raise OtaError(
        OtaReason.SERVER_UNTRUSTED,
        f"{server.url} is not the server that the token is for",
        hint="check the address; if it is right, somebody stands between: do not enrol over this network",
    )


def enroll(server: Server, ca: str, token_text: str, request: Mapping[str, Any]) -> bytes:
    """The bundle for `request`, the fields of an enrolment request. Again with the same keys gives the same bundle.

    Raises:
        OtaError: unreachable or untrusted, or the reason that the server gave.
    """
    answer = _ask(server, trusting(ca), "POST", "/enroll", {**request, "token": token_text})
    return _text(answer, "bundle", server).encode()


def renew(server: Server, ca: str, wanted: Wanted) -> Renewed:
    """The answer to a renewal.

    Raises:
        Expelled: the device is revoked.
        OtaError: unreachable or untrusted, or the reason that the server gave.
    """
    context = trusting(ca)
    nonce = _text(_ask(server, context, "POST", "/nonce", {}), "nonce", server)
    fields: dict[str, str | int] = {
        "version": enrolment.VERSION,
        "device": wanted.device,
        "certificate": wanted.certificate_pem,
        "nonce": nonce,
        "csr": wanted.csr,
        "hpke_public": base64.b64encode(wanted.hpke_public).decode(),
    }
    key = serialization.load_pem_private_key(wanted.key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise OtaError(OtaReason.BAD_PROOF, "this device's key is not an elliptic-curve key", hint="enrol it anew")
    signature = key.sign(enrolment.proof_input(fields), ec.ECDSA(hashes.SHA256()))
    fields["signature"] = base64.b64encode(signature).decode()
    answer = _ask(server, context, "POST", "/renew", fields)
    return Renewed(_text(answer, "certificate", server), str(answer.get("ca", "")))


def trusting(ca: str) -> ssl.SSLContext:
    """TLS towards servers of that authority alone.

    Raises:
        OtaError: `server_untrusted` when `ca` is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca)
    except (ssl.SSLError, ValueError) as e:
        raise OtaError(OtaReason.SERVER_UNTRUSTED, "the authority's certificate cannot be read") from e
    return context


def _ask(
    server: Server,
    context: ssl.SSLContext,
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    *,
    proven: bool = True,
) -> dict[str, Any]:
    """Args: proven: whether the server is one whose words a person may read, and follow."""
    connection = http.client.HTTPSConnection(server.host, server.port, timeout=TIMEOUT_S, context=context)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.connect()
        with _hung_up_after(connection.sock, ANSWER_S):
            connection.request(method, server.path + path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            raw = response.read(enrolment.MAX_ANSWER_BYTES + 1)
    except ssl.SSLCertVerificationError as e:
        raise _untrusted(e, server) from e
    except (OSError, http.client.HTTPException, UnicodeError) as e:  # a name that is none is a UnicodeError
        what = str(e.strerror or e) if isinstance(e, OSError) else type(e).__name__
        raise OtaError(
            OtaReason.SERVER_UNREACHABLE,
            f"{server.url}: {'no answer in time' if isinstance(e, TimeoutError) else what}",
            hint="check network, address and port; is edge-ota listen running?",
            retry=True,
        ) from e
    finally:
        connection.close()
    try:
        answer = strictjson.loads(raw, max_bytes=enrolment.MAX_ANSWER_BYTES, what="answer of the enrolment server")
    except OtaError as e:
        raise _odd(server, f"HTTP {response.status} without JSON") from e
    if not isinstance(answer, dict):
        raise _odd(server, f"HTTP {response.status} without an object")
    if "error" in answer or response.status != http.client.OK:
        refused = _refused(answer, response.status, server)
        raise refused if proven else _odd(server, f"HTTP {response.status} ({refused.reason.value})")
    return answer


@contextlib.contextmanager
def _hung_up_after(sock: socket.socket, seconds: float) -> Iterator[None]:
    """End the connection `sock` when the block takes longer.

    Raises:
        TimeoutError: it did, whatever came of that in the block.
    """
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        with contextlib.suppress(OSError):
            # not `sock.shutdown`, which takes TLS away from under whoever reads
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as e:
        if late.is_set():
            raise TimeoutError from e
        raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError


def _refused(answer: Mapping[str, Any], status: int, server: Server) -> OtaError:
    message, hint = str(answer.get("message", ""))[:400], str(answer.get("hint", ""))[:400]
    try:
        reason = OtaReason(str(answer.get("error", "")))
    except ValueError:
        return _odd(server, message or f"HTTP {status}")
    if reason is OtaReason.DEVICE_REVOKED:
        return Expelled(message, hint, _evidence(answer.get("evidence")))
    return OtaError(reason, message, hint=hint, retry=answer.get("retry") is True)


def _evidence(value: Any) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if isinstance(value, dict) and len(value) <= 1024:
        for name, text in value.items():
            with contextlib.suppress(ValueError):
                found[name] = base64.b64decode(str(text), validate=True)
    return found


def _text(answer: Mapping[str, Any], key: str, server: Server) -> str:
    value = answer.get(key)
    if not isinstance(value, str):
        raise _odd(server, f"an answer without {key}")
    return value


def _odd(server: Server, what: str) -> OtaError:
    return OtaError(
        OtaReason.SERVER_UNREACHABLE,
        f"{server.url}: {what}",
        hint="is this the address that edge-ota listen names?",
        retry=True,
    )


def _untrusted(error: ssl.SSLCertVerificationError, server: Server) -> OtaError:
    code = getattr(error, "verify_code", 0)
    if code == _NOT_YET_VALID:
        return OtaError(
            OtaReason.SERVER_NOT_YET_VALID,
            f"{server.url}: the server's certificate is not valid yet",
            hint="this device's clock is behind: set it, or wait until it is right",
            retry=True,
        )
    if code == _EXPIRED:
        text, hint = "has expired", "restart edge-ota listen; if it is valid, this device's clock is ahead"
    elif code in _WRONG_NAME:
        text, hint = "is for another name", "use the URL that edge-ota listen prints, or its --url"
    else:
        text, hint = "is not from the device's authority", "check the address; somebody may stand between"
    return OtaError(OtaReason.SERVER_UNTRUSTED, f"{server.url}: the server's certificate {text}", hint=hint, retry=True)


def signing_request(key: ec.EllipticCurvePrivateKey, device: str) -> str:
    """A certificate signing request for the name `device`, as PEM."""
    from cryptography import x509

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, device)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM).decode()
