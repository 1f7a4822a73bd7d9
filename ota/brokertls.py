"""TLS towards the broker: the context, a socket that counts and caps what it reads, and what a failure means.

Mutual TLS is the only way in: there is no switch for plain TCP and none to skip a check. Certificates are read from
their files for every connection, so a renewed one is used by the next.
Invariant: a packet that announces more than the cap is refused before memory is allocated for it.
"""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ota.errors import BrokerError, Reason

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# OpenSSL's X509_V_ERR_* numbers, stable since 1.1 (x509_vfy.h); ssl.SSLCertVerificationError carries them.
_NOT_YET_VALID = 9
_EXPIRED = 10
_HOSTNAME_MISMATCH = 62
_ADDRESS_MISMATCH = 64
_QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)
_NOT_SENT_LOW: int | None = getattr(socket, "TCP_NOTSENT_LOWAT", None)


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of the PEM files: authorities that may vouch for the broker, our certificate and its key."""

    ca: str
    certificate: str
    key: str


@dataclass(slots=True)
class Guard:
    """What one connection's socket has seen.

    `max_packet_bytes` caps one incoming packet, `unsent_bytes` what the kernel holds that has not left yet (0: as much
    as it likes), because nothing overtakes that; `received_bytes` and `sent_bytes` count above TLS; `error` is the
    last exception of the socket other than "try again", which paho reduces to a number.
    """

    max_packet_bytes: int
    unsent_bytes: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    oversize: int = 0
    error: OSError | None = field(default=None, repr=False)


class GuardedSocket(ssl.SSLSocket):
    """An SSL socket that tells its `guard` about every byte.

    paho asks for the whole rest of a packet at once, so the size asked for is the size the peer announced.
    """

    guard: Guard | None = None

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """As `SSLSocket.recv`; a request above the cap raises `ConnectionError`."""
        guard = self.guard
        if guard is None:
            return super().recv(buflen, flags)
        if buflen > guard.max_packet_bytes:
            guard.oversize += 1
            guard.error = ConnectionError(f"the broker announced a packet of {buflen} bytes")
            raise guard.error
        try:
            chunk = super().recv(buflen, flags)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError as e:
            guard.error = e
            raise
        guard.received_bytes += len(chunk)
        if _QUICK_ACK is not None:
            # a broker that leaves Nagle on holds the end of a message back until the rest is acknowledged, and Linux
            # takes its time for that (40 ms) unless it is told so after every read
            self.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)
        return chunk

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        """As `SSLSocket.send`."""
        guard = self.guard
        if guard is None:
            return super().send(data, flags)
        try:
            count = super().send(data, flags)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError as e:
            # the first error names the cause: after a refused certificate comes a reset
            guard.error = guard.error or e
            raise
        guard.sent_bytes += count
        return count


def guard_socket(sock: object, guard: Guard) -> None:
    """Give an opened socket its guard, and switch Nagle off: small packets that wait for a delayed acknowledgement
    cost 40 ms each.

    Raises:
        BrokerError: `broker_tls` when it is no socket made by `client_context`; nothing was sent through it yet.
    """
    if not isinstance(sock, GuardedSocket):
        raise BrokerError(Reason.BROKER_TLS, "refusing a connection without TLS")
    sock.guard = guard
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if guard.unsent_bytes and _NOT_SENT_LOW is not None:
        sock.setsockopt(socket.IPPROTO_TCP, _NOT_SENT_LOW, guard.unsent_bytes)


def client_context(tls: Tls) -> ssl.SSLContext:
    """A context for mutual TLS 1.2 or later that checks chain, validity and host name.

    Raises:
        BrokerError: `broker_tls` when a file is absent or no PEM of its kind.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = GuardedSocket
    try:
        context.load_verify_locations(tls.ca)
        context.load_cert_chain(tls.certificate, tls.key)
    except OSError as e:
        paths = f"{tls.ca}, {tls.certificate}, {tls.key}"
        raise BrokerError(
            Reason.BROKER_TLS,
            f"the TLS files cannot be used: {_text(e)} ({paths})",
            hint="enrol the device again, or correct the paths",
        ) from e
    return context


def connect_failure(error: OSError, host: str, port: int) -> BrokerError:
    """What `error`, raised while connecting to `host`:`port`, says about the broker."""
    where = f"{host}:{port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return _untrusted(error, where)
    if isinstance(error, ssl.SSLError) and _blames_our_certificate(error):
        return closed_early(error, host, port)
    if isinstance(error, ssl.SSLError):
        return BrokerError(
            Reason.BROKER_TLS,
            f"{where}: TLS handshake failed: {_text(error)}",
            hint="is this the broker's TLS port?",
            retry=True,
        )
    if isinstance(error, socket.gaierror):
        message = f"{where}: the name cannot be resolved: {_text(error)}"
    elif isinstance(error, TimeoutError):
        message = f"{where}: no answer in time"
    else:
        message = f"{where}: {_text(error)}"
    return BrokerError(Reason.BROKER_UNREACHABLE, message, hint="check network, address and broker", retry=True)


def closed_early(error: OSError | None, host: str, port: int) -> BrokerError:
    """What it means that the broker ended the connection before it answered CONNECT.

    Under TLS 1.3 the client's certificate is judged after the handshake is over for the client, so a refused one
    arrives here: as an alert when we are lucky, as a bare end of the stream otherwise.
    """
    if isinstance(error, ssl.SSLError) and _blames_our_certificate(error):
        cause = f"refused our certificate: {_text(error)}"
    else:
        cause = "closed the connection without an answer"
    return BrokerError(
        Reason.BROKER_REFUSED,
        f"{host}:{port}: the broker {cause}",
        hint="the device's certificate may be expired, revoked or from another authority",
        retry=True,
    )


def _untrusted(error: ssl.SSLCertVerificationError, where: str) -> BrokerError:
    # an error raised by Python itself carries no code
    code = getattr(error, "verify_code", 0)
    if code == _EXPIRED:
        return BrokerError(
            Reason.BROKER_EXPIRED,
            f"{where}: the broker's certificate has expired",
            hint="renew the broker's certificate; if it is valid, this device's clock is ahead",
            retry=True,
        )
    if code == _NOT_YET_VALID:
        return BrokerError(
            Reason.BROKER_NOT_YET_VALID,
            f"{where}: the broker's certificate is not valid yet",
            hint="this device's clock is behind; it waits until the clock is right",
            retry=True,
        )
    if code in (_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH):
        return BrokerError(
            Reason.BROKER_WRONG_NAME,
            f"{where}: the broker's certificate is for another name",
            hint="use the name that stands in the broker's certificate",
            retry=True,
        )
    return BrokerError(
        Reason.BROKER_UNTRUSTED,
        f"{where}: the broker's certificate is not from a trusted authority: {_text(error)}",
        hint="the device trusts only the authority it was enrolled with",
        retry=True,
    )


def _blames_our_certificate(error: ssl.SSLError) -> bool:
    alert = str(error.reason or "")
    return "ALERT" in alert and ("CERTIFICATE" in alert or "UNKNOWN_CA" in alert)


def _text(error: OSError) -> str:
    """One line about `error` without Python's own file and line numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(getattr(error, "verify_message", error))
    if isinstance(error, ssl.SSLError) and error.reason:
        return str(error.reason).lower().replace("_", " ")
    if error.errno is not None and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return str(error.strerror or error) or type(error).__name__
