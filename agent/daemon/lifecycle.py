"""A device's life in its fleet, in the running daemon: its certificate stays young, it can be expelled and reset.

Puts together what `renewal`, `revoked` and `reset` do; decides nothing of it. Invariants: whether the device is
expelled its own trust decides, never the server that says so; what ends the daemon leaves its mark on the disk first,
and the process carries it out after everything has stopped (`agent.service`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.daemon import enroll, renewal, reset, revoked
from agent.daemon.control import Reply, Route, asker, json_reply
from agent.daemon.keys import TLS_KEY, KeyProvider, OpenKeys, TlsFiles
from agent.daemon.link import Link
from agent.daemon.renewal import Renewal
from agent.daemon.telemetry import Telemetry
from agent.errors import AgentError, CustodyError
from ota.client.keyring import TlsIdentity
from ota.client.transports.documents import DocumentTransport
from ota.client.updater import Updater
from ota.errors import BrokerError, OtaError, Reason, StoreError
from ota.mqtt import Tls
from ota.payload import key_id

log = logging.getLogger(__name__)

# who asked for a reset still gets the answer
_ANSWER_S = 0.5


class Lifecycle:
    """The life cycle of one device.

    Args:
        link: None for a daemon without a broker: nothing is renewed then.
        updater: asked when it is needed: it is made after this.

    Attributes:
        leaving: set when the daemon has to end and the process to look at the state directory anew.
    """

    def __init__(
        self,
        state_dir: Path,
        source: KeyProvider,
        opened: OpenKeys,
        link: Link | None,
        updater: Callable[[], Updater],
        telemetry: Telemetry,
        *,
        clock: renewal.Clock,
        rng: random.Random,
    ) -> None:
        self._state_dir = state_dir
        self._opened = opened
        self._link = link
        self._updater = updater
        self._telemetry = telemetry
        self.leaving = asyncio.Event()
        self._renewal = self._make_renewal(source, clock, rng)

    def routes(self) -> dict[str, Route]:
        """Requests of the control socket."""
        return {"POST /reset": self._post_reset}

    async def run(self) -> None:
        """Tell of a reset before this life, then keep the certificate young, until cancelled."""
        before = reset.last(self._state_dir)
        if before is not None:
            self._telemetry.event("reset", before, alarm=True)
        if self._renewal is not None:
            await self._renewal.run()

    def status(self) -> dict[str, Any] | None:
        """The certificate, for `status`; None where nothing can be renewed."""
        return None if self._renewal is None else self._renewal.status()

    def conditions(self) -> list[dict[str, str]]:
        """What a person should know."""
        return [] if self._renewal is None else self._renewal.conditions()

    def revoke(self) -> None:
        """Verified metadata says that this device is expelled: destroy its keys, then end the daemon."""
        log.error("this device was revoked by its operator", extra={"reason": "device_revoked", "hint": revoked.HINT})
        self._telemetry.event(
            "revoked",
            {"reason": "device_revoked", "message": "keys destroyed, nothing is served", "hint": revoked.HINT},
            alarm=True,
        )
        try:
            revoked.mark(self._state_dir)
        except StoreError as e:
            log.error("revoked: %s", e.message, extra={"reason": e.reason.value, "hint": e.hint})
        self.leaving.set()

    # --- parts -------------------------------------------------------------------------------------------------------

    def _make_renewal(self, source: KeyProvider, clock: renewal.Clock, rng: random.Random) -> Renewal | None:
        ring, link = self._opened.keyring, self._link
        enrolment = enroll.load(self._state_dir)
        if ring is None or link is None or enrolment is None:
            return None
        try:
            key = b"" if ring.ring.tls else source.secret(TLS_KEY)
        except CustodyError:
            return None  # `OpenKeys.troubles` says so
        own = ring.ring.tls or TlsIdentity(key, enrolment.certificate.read_bytes())
        orders = renewal.Orders(self._ask, self._accuse, self._add_key, self._tell)
        return Renewal(
            enrolment,
            ring,
            own,
            _Line(link),
            orders,
            clock=clock,
            monotonic=time.monotonic,
            rng=rng,
        )

    def _tell(self, kind: str, facts: Mapping[str, Any], alarm: bool) -> None:
        self._telemetry.event(kind, facts, alarm=alarm)

    def _add_key(self, key: X25519PrivateKey) -> None:
        """Grants for the new key may come from now on; those for the old ones still open."""
        self._opened.device.hpke[key_id(key.public_key().public_bytes_raw())] = key

    def _ask(self, url: str, ca: str, wanted: Any) -> str:
        """The next certificate, as PEM; a later certificate of the authority is kept by the way."""
        from agent.daemon import registrar

        try:
            answer = registrar.renew(registrar.parse_server(url), ca, wanted)
        except AgentError as e:
            raise OtaError(Reason.SERVER_UNREACHABLE, f"the bundle names no server: {e.message}") from e
        try:
            if answer.ca and enroll.keep_authority(answer.ca, self._state_dir):
                log.info("the fleet's authority has a later certificate")
        except (AgentError, StoreError) as e:
            # without it this device goes on as it did
            log.warning("certificate of the authority: %s", e.message, extra={"reason": e.reason.value, "hint": e.hint})
        return answer.certificate

    async def _accuse(self, evidence: Mapping[str, bytes]) -> None:
        """A server says that this device is revoked. If its documents prove that, `revoke` is called by the updater."""
        if evidence:
            await self._updater().consult(DocumentTransport("evidence", evidence))

    async def _post_reset(self, fields: Mapping[str, Any]) -> Reply:
        asker().require_operator("reset this device")
        reset.begin(self._state_dir, owner=fields.get("owner") is True)
        asyncio.get_running_loop().call_later(_ANSWER_S, self.leaving.set)
        return json_reply({"state": "resetting"})


class _Line:
    """The link as a renewal uses it: identities become files that the TLS library can read."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._latest: tuple[TlsIdentity, TlsFiles] | None = None

    def status(self) -> dict[str, Any]:
        return self._link.status()

    def retry_now(self) -> None:
        self._link.retry_now()

    async def try_identity(self, identity: TlsIdentity) -> BrokerError | None:
        # a trial is repeated for weeks where the broker is away, and the files stay open as long as the process
        if self._latest is None or self._latest[0] != identity:
            self._latest = identity, TlsFiles.of(identity)
        files = self._latest[1]
        return await self._link.try_tls(Tls(self._link.tls.ca, files.certificate or "", files.key))
