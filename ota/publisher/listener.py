"""The enrolment listener: HTTPS for devices that have no certificate yet, or an old one.

`GET /ca`, `POST /enroll`, `GET` or `POST /nonce`, `POST /renew`; JSON both ways (FORMAT.md 7). It decides nothing:
`tokens` and `renewal` do. Invariants: a connection makes one request, has a bounded number of bytes and seconds, and
there is a bounded number of connections; one address, and one device, may try only so often; whatever a request
holds, the answer is one line of reason and hint, and the listener goes on.
"""

from __future__ import annotations

import collections
import contextlib
import ipaddress
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from ota import enrolment, strictjson
from ota.errors import PublishError, Reason
from ota.pace import TokenBucket
from ota.publisher import files, renewal, revocation, tokens
from ota.publisher.certificates import certificate_pem
from ota.publisher.conversation import Conversation, refusal
from ota.publisher.enroll import Places, request_from
from ota.publisher.repository import Repository

_T = TypeVar("_T")

_ENROLL_FIELDS = {"version", "token", "device", "csr", "hpke_public"}
_RENEW_FIELDS = {"version", "device", "certificate", "nonce", "csr", "hpke_public", "signature"}
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the listener spends on strangers.

    Attributes:
        connections, address_connections: at the same time, and of these from one address (in IPv6 one /64);
            one more is closed unread.
        read_timeout_s: between two bytes. total_s: for a whole connection.
        address_burst, address_per_s: attempts of one address; device_burst, device_per_s: certificates of one device.
    """

    connections: int = 32
    address_connections: int = 8
    read_timeout_s: float = 10.0
    total_s: float = 30.0
    address_burst: int = 20
    address_per_s: float = 0.5
    device_burst: int = 6
    device_per_s: float = 1 / 600


class Registrar:
    """Answers requests; knows nothing of sockets.

    Args:
        places: what bundles say of the fleet.
        clock: monotonic seconds.
    """

    def __init__(
        self, repository: Repository, places: Places, *, clock: Callable[[], float], bounds: Bounds | None = None
    ) -> None:
        self._repository = repository
        self._places = places
        self._clock = clock
        self._bounds = bounds or Bounds()
        self._nonces = renewal.Nonces(clock)
        self._addresses: collections.OrderedDict[str, TokenBucket] = collections.OrderedDict()
        self._devices: collections.OrderedDict[str, TokenBucket] = collections.OrderedDict()
        self._writing = threading.Lock()
        self._counting = threading.Lock()

    def answer(self, address: str, method: str, path: str, body: bytes) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            OtaError: it is refused; the reason and the hint are what the device is told.
        """
        bounds = self._bounds
        self._admit(self._addresses, _origin(address), bounds.address_per_s, bounds.address_burst, f"address {address}")
        match method, path:
            case "GET", "/ca":
                return {"version": enrolment.VERSION, "ca": certificate_pem(self._repository.authority.certificate())}
            case (("GET" | "POST"), "/nonce"):
                return {"version": enrolment.VERSION, "nonce": self._nonces.make()}
            case "POST", "/enroll":
                return self._enroll(_object(body, _ENROLL_FIELDS, "enrolment request"))
            case "POST", "/renew":
                return self._renew(_object(body, _RENEW_FIELDS, "renewal request"))
        raise PublishError(
            Reason.NOT_FOUND, f"there is no {method} {path[:60]!r} here", hint="is this the enrolment listener's URL?"
        )

    def _enroll(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        wanted = request_from(fields)
        token = fields["token"]
        if not isinstance(token, str):
            raise PublishError(Reason.TOKEN_UNKNOWN, "the token is not a text", hint="pass it with --token")
        bundle = self._patiently(lambda: tokens.redeem(self._repository, token, wanted, self._places))
        return {"version": enrolment.VERSION, "bundle": bundle.decode()}

    def _renew(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        try:
            renewed = self._patiently(lambda: renewal.renew(self._repository, fields, self._nonces, self._spend))
        except PublishError as e:
            if e.reason is not Reason.DEVICE_REVOKED:
                raise
            return {**refusal(e), "evidence": revocation.evidence(self._repository, str(fields["device"])) or {}}
        ca = certificate_pem(self._repository.authority.certificate())
        return {"version": enrolment.VERSION, "certificate": renewed.certificate, "kid": renewed.device.kid, "ca": ca}

    def _spend(self, device: str) -> None:
        bounds = self._bounds
        self._admit(self._devices, device, bounds.device_per_s, bounds.device_burst, f"device {device}")

    def _admit(
        self, buckets: collections.OrderedDict[str, TokenBucket], name: str, per_s: float, burst: int, who: str
    ) -> None:
        with self._counting:
            bucket = buckets.get(name)
            if bucket is None:
                bucket = buckets[name] = TokenBucket(per_s, burst)
                if len(buckets) > _REMEMBERED:
                    buckets.popitem(last=False)
            buckets.move_to_end(name)
            if bucket.take(1, self._clock()):
                return
        raise PublishError(
            Reason.TOO_MANY_ATTEMPTS, f"{who} tries too often", hint="wait some minutes and try again", retry=True
        )

    def _patiently(self, call: Callable[[], _T]) -> _T:
        """Requests of this process one after the other; another process's lock is waited for as well."""
        if not self._writing.acquire(timeout=files.LOCK_WAIT_S):
            raise PublishError(Reason.BUSY, "the repository is busy", hint="try again", retry=True)
        try:
            return call()
        finally:
            self._writing.release()


def _object(body: bytes, wanted: set[str], what: str) -> dict[str, Any]:
    fields = strictjson.loads(body, max_bytes=enrolment.MAX_BODY_BYTES, what=what)
    if not isinstance(fields, dict) or fields.keys() != wanted or fields["version"] != enrolment.VERSION:
        raise PublishError(
            Reason.BAD_REQUEST, f"{what}: not the fields of version {enrolment.VERSION}", hint="update the older end"
        )
    return fields


# --- sockets ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Talk:
    sock: socket.socket
    origin: str
    until_s: float


@dataclass(slots=True)
class Listener:
    """Serves a `Registrar` in threads of its own until `close`.

    Args:
        bind: address to listen on; port 0 takes a free one.
        context: TLS with the listener's certificate, from `tls_context`.
        say: takes one line for what an operator should know; called from threads.
    """

    registrar: Registrar
    bind: tuple[str, int]
    context: ssl.SSLContext
    say: Callable[[str], None]
    bounds: Bounds = field(default_factory=Bounds)
    _socket: socket.socket | None = None
    _open: dict[int, _Talk] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def start(self) -> int:
        """Listen; returns the port.

        Raises:
            PublishError: `io_error` when the address cannot be had.
        """
        family = socket.AF_INET6 if ":" in self.bind[0] else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(self.bind)
        except OSError as e:
            listening.close()
            raise PublishError(
                Reason.IO_ERROR,
                f"cannot listen on {self.bind[0]}:{self.bind[1]}: {e.strerror}",
                hint="is another listener running? --bind names the address",
            ) from e
        listening.listen(64)
        listening.settimeout(1.0)
        self._socket = listening
        self._thread = threading.Thread(target=self._accept, args=(listening,), name="enrolment", daemon=True)
        self._thread.start()
        return int(listening.getsockname()[1])

    def close(self) -> None:
        """Take no more connections and end those that are open."""
        listening, self._socket = self._socket, None
        if self._thread is not None:
            self._thread.join(5)
        if listening is not None:
            listening.close()
        with self._lock:
            for talk in self._open.values():
                _hang_up(talk.sock)

    def _accept(self, listening: socket.socket) -> None:
        while self._socket is not None:
            self._end_slow_ones()
            try:
                sock, address = listening.accept()
            except TimeoutError:
                continue
            except OSError as e:
                if self._socket is not None:
                    self.say(f"cannot accept: {e.strerror}")
                    time.sleep(0.1)  # out of descriptors: no reason to spin
                continue
            # not the descriptor: it is another connection's as soon as this one is closed
            number = next(self._numbers)
            with self._lock:
                origin = _origin(address[0])
                theirs = sum(talk.origin == origin for talk in self._open.values())
                full = len(self._open) >= self.bounds.connections or theirs >= self.bounds.address_connections
                if not full:
                    self._open[number] = _Talk(sock, origin, time.monotonic() + self.bounds.total_s)
            if full:
                sock.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(sock, address, number), daemon=True).start()
            except RuntimeError:  # no thread to be had: the next connection may get one
                with self._lock:
                    self._open.pop(number, None)
                sock.close()

    def _serve(self, sock: socket.socket, address: Any, number: int) -> None:
        try:
            sock.settimeout(self.bounds.read_timeout_s)
            with self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) as secured:
                with self._lock:
                    self._open[number].sock = secured
                secured.do_handshake()
                Conversation(secured, address, self.registrar.answer, self.say)
        except OSError:
            pass  # a stranger's connection that ended, timed out or spoke no TLS
        finally:
            with self._lock:
                self._open.pop(number, None)
            sock.close()

    def _end_slow_ones(self) -> None:
        now = time.monotonic()
        with self._lock:
            for talk in self._open.values():
                if now >= talk.until_s:
                    _hang_up(talk.sock)


def _origin(address: str) -> str:
    """Whom an address counts for: one subscriber has a whole /64 of IPv6."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    if known.version == 4:
        return address
    return str(known.ipv4_mapped or ipaddress.ip_network((int(known), 64), strict=False))


def _hang_up(sock: socket.socket) -> None:
    """Wake the thread that waits for `sock`; it closes it."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def tls_context(repository: Repository, names: tuple[str, ...]) -> ssl.SSLContext:
    """TLS of the listener; its certificate is made or renewed where that is due.

    Args:
        names: host names and addresses under which devices reach it.

    Raises:
        PublishError: `key_missing` when one is due and `ca.key` is elsewhere; `bad_spec` for a name that is none.
    """
    authority, days = repository.authority, repository.settings.server_certificate_days
    state = authority.listener_state()
    half = timedelta(days=days / 2)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    paths = authority.listener_tls
    for attempt in (1, 2):
        if state is None or not set(names) <= set(state[0]) or state[1] - repository.now() < half:
            with repository.locked():
                authority.issue_listener(names, repository.now().replace(microsecond=0), days)
        try:
            context.load_cert_chain(paths.certificate, paths.key)
            break
        except ssl.SSLError as e:
            # a cut between the writing of the two left a pair that does not belong together
            if attempt == 2:
                raise PublishError(
                    Reason.UNSAFE_FILE, f"{paths.certificate} and {paths.key.name} do not match", hint="remove both"
                ) from e
            state = None
    return context
