"""The device's certificate is renewed at two thirds of its life, and the old one dropped when the new one has worked.

A new key and its signing request are kept in the key ring before the server is asked, so that a power cut changes
nothing: the same request is repeated. The answer stands in the ring as an identity on trial until the broker accepted
it on a second connection (`agent.daemon.uplink`). A device whose certificate ended while it was off asks first and
connects then. Not here: HTTPS (`agent.daemon.registrar`), wiping a revoked device (`agent.daemon.revoked`).
Invariants: the identity in force changes only to one that has carried a connection; whatever fails, it stays, the
failure shows in `status` and it is tried again with a growing delay; a server's word alone never expels a device.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.daemon.certificate import Validity, validity
from agent.daemon.enroll import Enrolment
from ota.client.keyring import Keyring, Ring, TlsIdentity
from ota.errors import BrokerError, OtaError, Reason, StoreError

if TYPE_CHECKING:
    from agent.daemon.registrar import Wanted

log = logging.getLogger(__name__)

_REQUEST = b"-----BEGIN CERTIFICATE REQUEST-----"
# the connection never came to judge the certificate
_NOT_ITS_FAULT = frozenset({Reason.BROKER_UNREACHABLE, Reason.BROKER_NOT_YET_VALID, Reason.BROKER_EXPIRED})
_CLOCK = frozenset({Reason.BROKER_NOT_YET_VALID.value, Reason.SERVER_NOT_YET_VALID.value})

Clock = Callable[[], datetime.datetime]


@dataclass(frozen=True, slots=True)
class Policy:
    """When a certificate is renewed.

    Attributes:
        share: of its life, after which it is due; spread: of its life, over which a fleet is spread; rest: of its
            life, for which a new one is not renewed whatever the clock says.
        first_retry_s, longest_retry_s: range of the delay after a failure, doubled with each.
        clock_s: between two looks at the clock and the link.
        refused_s: after so long of being refused by the broker the server is asked why.
        trials: refusals of the broker after which another certificate is asked for.
    """

    share: float = 2 / 3
    spread: float = 1 / 50
    rest: float = 1 / 2
    first_retry_s: float = 30.0
    longest_retry_s: float = 6 * 3600.0
    clock_s: float = 30.0
    refused_s: float = 600.0
    trials: int = 3


class Line(Protocol):
    """The link, as far as a renewal needs it."""

    def status(self) -> dict[str, Any]:
        """State, reason and since when."""
        ...

    async def try_identity(self, identity: TlsIdentity) -> BrokerError | None:
        """Go over to another identity; None when that worked."""
        ...

    def retry_now(self) -> None:
        """Connect without waiting."""
        ...


@dataclass(frozen=True, slots=True)
class Orders:
    """What a renewal makes the daemon do.

    `ask` sends a request to the server (blocking, in a thread) and returns a certificate; `accuse` judges the documents
    by which the server claims that this device is revoked; `added` hands over another HPKE private key; `tell` sends
    an event. `added` may be called again with the same key.
    """

    ask: Callable[[str, str, Wanted], str]
    accuse: Callable[[Mapping[str, bytes]], Awaitable[None]]
    added: Callable[[X25519PrivateKey], None]
    tell: Callable[[str, Mapping[str, Any], bool], None]


def requested(ring: Ring, device: str, *, hpke: bool) -> Ring:
    """`ring` with another TLS key and the request for its certificate, which the next look sends to the server.

    Args:
        ring: without a request under way: the key that the server learnt of last is among its two newest then.
        hpke: another HPKE key too, which the server learns of with the request.
    """
    from agent.daemon import registrar

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    trial = TlsIdentity(pem, registrar.signing_request(key, device).encode())
    known = ring.with_hpke_key(X25519PrivateKey.generate().private_bytes_raw()) if hpke else ring
    return replace(known, tls_trial=trial)


class Renewal:
    """Keeps the certificate of this device young.

    Args:
        own: the identity in force as long as the key ring has none.
        clock: wall clock, UTC. monotonic: seconds.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        keyring: Keyring,
        own: TlsIdentity,
        line: Line,
        orders: Orders,
        *,
        clock: Clock,
        monotonic: Callable[[], float],
        rng: random.Random,
        policy: Policy | None = None,
    ) -> None:
        self._enrolment = enrolment
        self._keyring = keyring
        self._own = own
        self._line = line
        self._orders = orders
        self._clock = clock
        self._monotonic = monotonic
        self._rng = rng
        self._policy = policy or Policy()
        self._fraction = rng.random()
        self._state = "idle"
        self._error: OtaError | None = None
        self._failures = 0
        self._refusals = 0
        self._wake = asyncio.Event()
        self._refused_since: float | None = None
        self._young_until = -math.inf
        self._again = False

    # --- what status shows -------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The certificate's end, when it is renewed, and what hinders that."""
        dates = self._dates()
        error = self._error
        return {
            "state": self._state,
            "expires": dates.ends.isoformat() if dates else "",
            "renewal": self._due(dates).isoformat() if dates and self._enrolment.renewal else "",
            "server": self._enrolment.renewal,
            "reason": error.reason.value if error else "",
            "message": error.message if error else "",
            "hint": error.hint if error else "",
        }

    def conditions(self) -> list[dict[str, str]]:
        """What a person should know: a clock that is waited for, a certificate that is about to end."""
        found = []
        link = self._line.status()
        waits = next((r for r in (link.get("reason"), self._error and self._error.reason.value) if r in _CLOCK), None)
        if waits:
            text = "the clock is behind: certificates are not valid yet; connecting as soon as it is right"
            found.append({"type": "ClockWait", "status": "True", "reason": str(waits), "message": text})
        dates, now = self._dates(), self._clock()
        if dates is None:
            return found
        late = self._due(dates) + dates.life / 10
        if now >= min(late, dates.ends):
            reason = self._error.reason.value if self._error else "certificate_expired" if now >= dates.ends else "due"
            why = self._error.message if self._error else "no answer yet"
            if not self._enrolment.renewal:
                reason, why = "no_server", "the bundle names no server that renews: ask the operator for a new bundle"
            word = "expired" if now >= dates.ends else "expires"
            text = f"the device's certificate {word} at {dates.ends:%Y-%m-%d %H:%M} UTC and was not renewed: {why}"
            found.append({"type": "CertificateExpiring", "status": "True", "reason": reason, "message": text})
        return found

    def poke(self) -> None:
        """Look again now."""
        self._wake.set()

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Renew, try, wait, until cancelled."""
        offset = self._offset()
        while True:
            until_s = await self.step() + self._monotonic()
            while (left_s := until_s - self._monotonic()) > 0 and not self._wake.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, self._policy.clock_s)):
                        await self._wake.wait()
                now = self._offset()
                if abs(now - offset) > self._policy.clock_s / 2:
                    # somebody set the clock: what was not valid may be now
                    offset = now
                    self._line.retry_now()
                    break
            self._wake.clear()

    async def step(self) -> float:
        """Do what is due; returns the seconds until the next look."""
        try:
            return await self._advance()
        except OtaError as e:
            return self._failed(e)

    async def _advance(self) -> float:
        trial = self._keyring.ring.tls_trial
        if trial is not None and not trial.certificate_pem.startswith(_REQUEST):
            return await self._try(trial)
        wait_s = self._wait_s()
        if wait_s > 0 or not self._enrolment.renewal:
            if self._state != "refused":
                self._state, self._error = "idle", None
            self._note_refusal()
            return min(max(wait_s, 1.0), self._policy.clock_s)
        await self._ask()
        return 0.0

    def _wait_s(self) -> float:
        """Seconds until the server is asked; 0 when that is due."""
        dates = self._dates()
        # a request that was begun is repeated until it is answered: until then nobody knows which keys the server has
        if dates is None or self._keyring.ring.tls_trial is not None or self._refused_for_long():
            return 0.0
        return max(0.0, (self._due(dates) - self._clock()).total_seconds(), self._young_until - self._monotonic())

    async def _ask(self) -> None:
        from agent.daemon import registrar  # http.client and x509: memory that is needed on these days alone

        self._state = "asking"
        ring = self._keyring.ring
        trial = ring.tls_trial or self._prepare()
        current = self._keyring.ring.tls or self._own
        hpke = X25519PrivateKey.from_private_bytes(self._keyring.ring.hpke[0])
        # from now on grants may be for it
        self._orders.added(hpke)
        wanted = registrar.Wanted(
            self._enrolment.device,
            trial.certificate_pem.decode(),
            hpke.public_key().public_bytes_raw(),
            current.certificate_pem.decode(),
            current.key_pem,
        )
        ca = Path(self._enrolment.ca).read_text()
        try:
            pem = await asyncio.to_thread(self._orders.ask, self._enrolment.renewal, ca, wanted)
        except registrar.Expelled as e:
            await self._orders.accuse(e.evidence)
            raise
        got = TlsIdentity(trial.key_pem, self._checked(pem, trial))
        self._keyring.update(lambda ring: replace(ring, tls_trial=got))
        self._refused_since, self._refusals = None, 0

    def _prepare(self) -> TlsIdentity:
        """New key pairs, kept before anybody hears of them."""

        def keep(ring: Ring) -> Ring:
            # after a refusal the other key is as new as ever, and the ring forgets one for each that comes
            return ring if ring.tls_trial is not None else requested(ring, self._enrolment.device, hpke=not self._again)

        trial = self._keyring.update(keep).tls_trial
        assert trial is not None
        return trial

    def _checked(self, pem: str, trial: TlsIdentity) -> bytes:
        """The certificate in `pem` and nothing else of it; the broker would refuse anything else, and say less."""
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

        try:
            certificate = x509.load_pem_x509_certificate(pem.encode())
            certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(self._enrolment.ca.read_bytes()))
            theirs = certificate.public_key()  # read lazily: its faults belong here too
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as e:
            raise OtaError(
                Reason.BAD_PROOF, "the server answered with a certificate of another authority", hint="check the server"
            ) from e
        key = serialization.load_pem_private_key(trial.key_pem, password=None).public_key()
        form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        names = [attribute.value for attribute in certificate.subject]
        if theirs.public_bytes(*form) != key.public_bytes(*form) or names != [self._enrolment.device]:
            raise OtaError(
                Reason.BAD_PROOF, "the server answered with a certificate for another key", hint="check the server"
            )
        return certificate.public_bytes(serialization.Encoding.PEM)

    async def _try(self, trial: TlsIdentity) -> float:
        self._state = "trying"
        error = await self._line.try_identity(trial)
        if error is None:
            self._keyring.update(lambda ring: replace(ring, tls=trial, tls_trial=None))
            self._state, self._error, self._failures, self._refusals = "idle", None, 0, 0
            self._again = False
            dates = self._dates()
            if dates is not None:
                # on a clock that is far ahead every new certificate is due at once
                self._young_until = self._monotonic() + dates.life.total_seconds() * self._policy.rest
            self._orders.tell(
                "certificate_renewed", {"expires": dates.ends.isoformat() if dates else "", "message": ""}, False
            )
            return 1.0
        if error.reason not in _NOT_ITS_FAULT:
            self._refusals += 1
            if self._refusals >= self._policy.trials:
                # this one will not do; the old stays and another is asked for
                self._refusals, self._again = 0, True
                self._keyring.update(lambda ring: replace(ring, tls_trial=None))
        raise error

    # --- moments -----------------------------------------------------------------------------------------------------

    def _dates(self) -> Validity | None:
        identity = self._keyring.ring.tls or self._own
        try:
            return validity(identity.certificate_pem)
        except ValueError:
            return None

    def _due(self, dates: Validity) -> datetime.datetime:
        share = self._policy.share + self._policy.spread * self._fraction
        return dates.begins + dates.life * share

    def _note_refusal(self) -> None:
        """Since when the broker refuses this device."""
        reason = self._line.status().get("reason")
        if reason == Reason.BROKER_REFUSED.value and self._refused_since is None:
            self._refused_since = self._monotonic()
        elif reason != Reason.BROKER_REFUSED.value:
            self._refused_since = None

    def _refused_for_long(self) -> bool:
        self._note_refusal()
        since = self._refused_since
        return since is not None and self._monotonic() - since >= self._policy.refused_s

    def _failed(self, error: OtaError) -> float:
        """Note a failure; returns the delay before the next attempt."""
        log.warning("renewal: %s", error.message, extra={"reason": error.reason.value, "hint": error.hint})
        if self._error is None or self._error.reason is not error.reason:
            facts = {"reason": error.reason.value, "message": error.message, "hint": error.hint}
            self._orders.tell("renewal_failed", facts, True)
        self._state, self._error = "refused" if not error.retry else "waiting", error
        if error.reason.value in _CLOCK:
            return self._policy.clock_s
        window_s = min(self._policy.first_retry_s * 2.0 ** min(self._failures, 32), self._policy.longest_retry_s)
        self._failures += 1
        dates = self._dates()
        if dates is not None and (left := (dates.ends - self._clock()).total_seconds()) > 0:
            # the nearer the end, the more often
            window_s = min(window_s, max(self._policy.first_retry_s / 10, left / 10))
        if isinstance(error, StoreError):
            window_s = self._policy.longest_retry_s
        return self._rng.uniform(window_s / 2, window_s)

    def _offset(self) -> float:
        return self._clock().timestamp() - self._monotonic()
