"""`edge-agent keys`: what keys there are, rotating them, and moving them under a sealed credential.

Works in the daemon, and beside a dead one on the same state directory. Shows key ids, never keys. Not here: how files
are sealed anew (`ota.client.reseal`), renewal of the certificate (`agent.daemon.renewal`).
Invariants: a key is in the ring, durably, before anything is sealed under it or its file is destroyed; no key that the
server may make grants for is forgotten.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.daemon import enroll, renewal
from agent.daemon.control import Reply, Route, asker, json_reply
from agent.daemon.enroll import Enrolment
from agent.daemon.keys import (
    HPKE_KEY,
    SECRETS,
    TLS_KEY,
    FileKeys,
    KeyProvider,
    OpenKeys,
    open_keys,
    provider,
    seal_mark,
    sealed_names,
)
from agent.errors import ControlError, CustodyError, Reason
from ota.client import keyring, offload, sealed
from ota.client.fsops import Fs
from ota.client.keyring import Keyring, TlsIdentity
from ota.client.limits import Limits
from ota.client.reseal import finish_rotation, rotate_storage
from ota.client.store import Store
from ota.errors import OtaError
from ota.errors import Reason as OtaReason
from ota.payload import key_id

log = logging.getLogger(__name__)

MAX_CERTIFICATE_BYTES = 16 * 1024


class Report(Protocol):
    """How `Telemetry.event` is called."""

    def __call__(self, kind: str, facts: Mapping[str, Any], *, alarm: bool = False) -> None:
        """Tell of an event."""
        ...


class Rotation:
    """The keys of one device as its operator sees them.

    Args:
        opened: what custody and ring gave; its HPKE keys are changed in place, so that the updater has them too.
        enrolment: who the device is, where its certificate lies, and who learns of its keys.
        report: told of what happened, for telemetry.
    """

    def __init__(
        self, source: KeyProvider, opened: OpenKeys, fs: Fs, store: Store, enrolment: Enrolment, report: Report
    ) -> None:
        self._source = source
        self._opened = opened
        self._fs = fs
        self._store = store
        self._enrolment = enrolment
        self._report = report

    @classmethod
    def beside(cls, state_dir: Path, environment: Mapping[str, str]) -> Rotation:
        """The same without a daemon, whose lock the caller holds.

        Raises:
            AgentError, OtaError: the device is not enrolled, or its keys cannot be opened.
        """
        enrolment = enroll.load(state_dir)
        if enrolment is None:
            raise ControlError(Reason.NOT_ENROLLED, "this device is not enrolled", hint="edge-agent enroll --help")
        fs = Fs(state_dir)
        source = provider(state_dir, environment)
        opened = open_keys(source, fs)
        store = Store(fs, opened.device.storage, Limits().reserve_bytes, opened.device.retired_storage)

        def report(kind: str, facts: Mapping[str, Any], *, alarm: bool = False) -> None:
            log.info("%s: %s", kind, dict(facts))

        return cls(source, opened, fs, store, enrolment, report)

    def routes(self) -> dict[str, Route]:
        """The requests of the control socket."""
        return {
            "GET /keys": self._get_keys,
            "POST /keys/rotate": self._post_rotate,
            "POST /keys/seal": self._post_seal,
        }

    async def resume(self) -> None:
        """End a rotation that was cut short; what hinders it is logged and reported, and tried at the next start."""
        ring = self._opened.keyring
        for trouble in self._opened.troubles:
            log.error("keys: %s", trouble.message, extra={"reason": trouble.reason, "hint": trouble.hint})
            self._report(
                "keys", {"state": "unavailable", "reason": trouble.reason, "message": trouble.message}, alarm=True
            )
        if ring is None:
            return
        try:
            await offload.finished(lambda: finish_sealing(self._fs))
            done = await finish_rotation(ring, self._store)
        except OtaError as e:
            log.error("keys: %s", e.message, extra={"reason": e.reason.value, "hint": e.hint})
            self._report("keys", {"state": "failed", "reason": e.reason.value, "message": e.message})
            return
        if done.files or done.damaged:
            self._report("keys", {"state": "rotated", "files": done.files, "damaged_files": len(done.damaged)})

    async def show(self) -> dict[str, Any]:
        """Ids, custody and counts.

        Raises:
            OtaError: the disk cannot be read.
        """
        files = Counter([key for _, key in await offload.finished(lambda: list(self._store.seals()))])
        ring = self._opened.keyring
        storage = [] if ring is None else [sealed.key_id(key) for key in ring.ring.storage]
        return {
            "custody": self._source.custody,
            "sealed_to": self._source.sealed_to,
            "worth": self._source.worth,
            "storage": {name: {"files": files[name], "current": name == storage[0]} for name in storage},
            "unreadable_files": sum(count for name, count in files.items() if name not in storage),
            "hpke": [] if ring is None else [kid_of(raw) for raw in ring.ring.hpke],
            "tls": _tls_state(self._opened, ring, self._source.path(TLS_KEY)),
            "troubles": [{"reason": t.reason, "message": t.message, "hint": t.hint} for t in self._opened.troubles],
        }

    async def rotate(self, *, storage: bool, hpke: bool) -> dict[str, Any]:
        """Give the device new keys of these kinds.

        Raises:
            ControlError: `sealed_key_unavailable`; `bad_usage` for an HPKE key that nobody would learn of.
            OtaError: `busy` while the server was not told of the last HPKE key; the disk: a storage rotation that was
                begun goes on at the next call or start.
        """
        ring = self._ring()
        answer: dict[str, Any] = {}
        if hpke:
            answer["hpke"] = await self._rotate_hpke(ring)
        if storage:
            done = await rotate_storage(ring, self._store)
            answer["storage"] = sealed.key_id(ring.ring.storage[0])
            answer["files"] = done.files
            answer["damaged_files"] = len(done.damaged)
        self._report("keys", {"state": "rotated", **answer})
        return answer

    async def seal(self, *, keep_tls: bool) -> dict[str, Any]:
        """Move what enrolment left in files into the ring, which a credential opens, and destroy the files.

        Args:
            keep_tls: the TLS key stays a file, so that the device can say when its credential does not come.

        Raises:
            ControlError: `bad_usage` when no credential is in force; `sealed_key_unavailable`.
            CustodyError: `key_unsafe`: a file would not have been used either.
            OtaError: the disk.
        """
        ring = self._ring()
        if isinstance(self._source, FileKeys):
            raise ControlError(
                Reason.BAD_USAGE,
                "this device's keys lie in files: no credential is in force that could take their place",
                hint="LoadCredentialEncrypted=storage.key:PATH in a drop-in of edge-agent.service, and restart it",
            )
        moved = tuple(name for name in SECRETS if name != TLS_KEY or not keep_tls)
        certificate = self._enrolment.certificate
        destroyed = await offload.finished(lambda: seal_files(self._source, self._fs, ring, certificate, moved))
        self._report("keys", {"state": "sealed", "destroyed": destroyed})
        return {"destroyed": destroyed, "worth": self._source.worth}

    def _ring(self) -> Keyring:
        if self._opened.keyring is None:
            raise ControlError(
                Reason.SEALED_KEY_UNAVAILABLE,
                "the root secret of this device's keys is not available",
                hint="edge-agent keys show names the cause",
            )
        return self._opened.keyring

    async def _rotate_hpke(self, ring: Keyring) -> str:
        """Begin a renewal, which tells the server of the new key. Never two at once: the second would take the place of
        the key that the server has, and no grant would open."""
        if not self._enrolment.renewal:
            raise ControlError(
                Reason.BAD_USAGE,
                "nobody would make grants for another HPKE key: this device knows no server that renews",
                hint="enrol it with a bundle that names one: edge-ota enroll --renewal https://HOST:PORT",
            )

        def begin(known: keyring.Ring) -> keyring.Ring:
            if known.tls_trial is not None:
                raise OtaError(
                    OtaReason.BUSY,
                    "the server was not told of the last HPKE key yet, or its certificate is on trial",
                    hint="edge-agent status says what hinders the renewal; try again when it is through",
                    retry=True,
                )
            return renewal.requested(known, self._enrolment.device, hpke=True)

        saved = await offload.finished(lambda: ring.update(begin))
        opened = {kid_of(raw): X25519PrivateKey.from_private_bytes(raw) for raw in saved.hpke}
        known = self._opened.device.hpke
        known.update(opened)
        for forgotten in known.keys() - opened.keys():
            del known[forgotten]
        return kid_of(saved.hpke[0])

    async def _get_keys(self, _: Mapping[str, Any]) -> Reply:
        return json_reply(await self.show())

    async def _post_rotate(self, fields: Mapping[str, Any]) -> Reply:
        asker().require_operator("rotate keys")
        wanted = {kind: fields.get(kind) is True for kind in ("storage", "hpke")}
        if not any(wanted.values()):
            raise ControlError(Reason.BAD_USAGE, "neither storage nor hpke is to be rotated")
        return json_reply(await self.rotate(**wanted))

    async def _post_seal(self, fields: Mapping[str, Any]) -> Reply:
        asker().require_operator("seal keys")
        return json_reply(await self.seal(keep_tls=fields.get("keep_tls") is True))


def seal_files(source: KeyProvider, fs: Fs, ring: Keyring, certificate: Path, names: Collection[str]) -> list[str]:
    """The secrets `names` into the ring, then the end of their files, whose names are returned. Again is well.

    Raises:
        ControlError: `not_enrolled`: the certificate is missing.
        CustodyError: `key_unsafe`.
        StoreError: the disk.
    """
    hpke = _file_secret(source, HPKE_KEY) if HPKE_KEY in names else None
    key = _file_secret(source, TLS_KEY) if TLS_KEY in names else None
    pem = fs.read(f"{certificate.parent.name}/{certificate.name}", MAX_CERTIFICATE_BYTES)
    if key is not None and pem is None and ring.ring.tls is None:
        raise ControlError(
            Reason.NOT_ENROLLED, f"{certificate} is missing: its key would be lost", hint="systemctl restart edge-agent"
        )

    def merged(known: keyring.Ring) -> keyring.Ring:
        if hpke is not None and hpke not in known.hpke:
            known = replace(known, hpke=(*known.hpke, hpke)[: keyring.MAX_HPKE_KEYS])
        if key is not None and pem is not None and known.tls is None:
            known = replace(known, tls=TlsIdentity(key, pem))
        return known

    ring.update(merged)
    seal_mark(fs, names)
    return finish_sealing(fs)


def finish_sealing(fs: Fs) -> list[str]:
    """Destroy the files of the secrets that were sealed; returns their names.

    Raises:
        StoreError: the disk.
    """
    names = sealed_names(fs)
    destroyed = [name for name in names if fs.size(f"{keyring.DIRECTORY}/{name}") is not None]
    for name in destroyed:
        keyring.destroy(fs, f"{keyring.DIRECTORY}/{name}")
    if destroyed:
        seal_mark(fs, names)  # syncs the directory: no name comes back
    return destroyed


def kid_of(raw: bytes) -> str:
    """Key id of a raw HPKE private key."""
    return key_id(X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw())


def _file_secret(source: KeyProvider, name: str) -> bytes | None:
    try:
        return source.secret(name)
    except CustodyError as e:
        if e.reason is Reason.SEALED_KEY_UNAVAILABLE:
            return None  # it was moved before
        raise


def _tls_state(opened: OpenKeys, ring: Keyring | None, file: Path) -> str:
    if opened.tls is None:
        return "none"
    renewed = ring is not None and ring.ring.tls is not None
    trial = ring is not None and ring.ring.tls_trial is not None
    return ("in the ring" if renewed else os.fspath(file)) + (", a renewed one on trial" if trial else "")
