"""Taking a device out of the fleet: its certificates listed as revoked, no more grants, and the signed word for it.

`revoked.json` holds what is revoked and why, `revoked.pem` is the list for the broker made of it. Nothing is deleted
from the repository. Invariants: the device's record says so first, so that nothing is granted or renewed whatever
happens next; each step done twice is done once; a certificate leaves the list only when nobody accepts it any longer.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ota import strictjson
from ota.errors import PublishError, Reason
from ota.publisher import audit, director, files
from ota.publisher.certificates import REVOKED_LIST
from ota.publisher.enroll import (
    Device,
    Enrolled,
    Issued,
    Places,
    Request,
    admit,
    has_device,
    load_device,
    store_device,
)
from ota.publisher.repository import Repository

FORMAT = 1
_RECORD_FILE = "revoked.json"
_MAX_RECORD_BYTES = 64 << 20
_MAX_REASON = 200


@dataclass(frozen=True, slots=True)
class Revoked:
    """A device that was expelled: its record, the version of its signed document, and the broker's new list."""

    device: Device
    desired_version: int
    certificates: int
    crl: Path


def revoke(repository: Repository, device: str, reason: str = "", *, decommission: bool = False) -> Revoked:
    """Expel `device`; with `decommission` for good, its assignments are dropped too. Again is well.

    Raises:
        PublishError: `unknown_device`; `key_missing` when `director.pem` is elsewhere, or `ca.key`; `state_corrupt`,
            `busy`, `io_error`. When the device's document cannot be signed the broker's list is made all the same, and
            the other way round.
    """
    with repository.locked():
        known = load_device(repository, device)
        now = repository.now().replace(microsecond=0)
        expelled = replace(
            known, revoked=known.revoked or _iso(now), decommissioned=decommission or known.decommissioned
        )
        store_device(repository, expelled)
        try:
            try:
                desired = director.expel(repository, expelled)
            finally:
                # another key signs the list: one that cannot be made does not keep back the other
                path = revoke_certificates(repository, expelled, reason)
        finally:
            told = load_device(repository, device)
            action = "decommissioned" if decommission else "revoked"
            audit.record(repository, action, device, reason=reason[:_MAX_REASON], desired_version=told.desired_version)
        return Revoked(told, desired.version, len(expelled.certificates), path)


def take_over(repository: Repository, wanted: Request, places: Places) -> Enrolled:
    """Give an id to the board that asks: the old board's certificates are revoked and the same releases granted to the
    new keys. Again is well. The caller holds the repository's lock.

    Raises:
        PublishError: as `enroll.enroll`.
    """
    known = load_device(repository, wanted.device) if has_device(repository, wanted.device) else None
    former = () if known is None or wanted.is_of(known) else known.certificates
    if known is not None and former:
        # before the record forgets them: after a cut nobody else could tell which they were
        revoke_certificates(repository, known, "replaced")
    enrolled = admit(repository, wanted, places, replace=True)
    director.resign(repository, enrolled.device.device)
    audit.record(
        repository,
        "replaced",
        enrolled.device.device,
        kid=enrolled.device.kid,
        serial=f"{enrolled.device.certificate_serial:x}",
        former_serials=[f"{one.serial:x}" for one in former],
    )
    return enrolled


def revoke_certificates(
    repository: Repository, device: Device, reason: str, only: Sequence[Issued] | None = None
) -> Path:
    """List every certificate of `device` that may still be accepted, or `only` these; returns the broker's list. The
    caller holds the repository's lock."""
    now = repository.now().replace(microsecond=0)
    record = _load(repository)
    kept = [one for one in record["certificates"] if _end(repository, one["expires"]) > now]
    listed = {one["serial"] for one in kept}
    for one in device.certificates if only is None else only:
        if f"{one.serial:x}" not in listed and _end(repository, one.expires) > now:
            kept.append(
                {
                    "serial": f"{one.serial:x}",
                    "device": device.device,
                    "revoked": _iso(now),
                    "expires": one.expires,
                    "reason": reason[:_MAX_REASON],
                }
            )
    _store(repository, {"version": FORMAT, "number": record["number"] + 1, "certificates": kept})
    return write_list(repository)


def write_list(repository: Repository) -> Path:
    """Make `revoked.pem` of what is revoked.

    Raises:
        PublishError: `key_missing`.
    """
    record = _load(repository)
    revoked = [(int(one["serial"], 16), datetime.fromisoformat(one["revoked"])) for one in record["certificates"]]
    now = repository.now().replace(microsecond=0)
    path = repository.path / REVOKED_LIST
    files.write_atomic(path, repository.authority.revocation_list(revoked, record["number"], now))
    return path


def is_revoked(repository: Repository, serial: int) -> bool:
    """Whether the certificate with that serial number is listed."""
    return f"{serial:x}" in {one["serial"] for one in _load(repository)["certificates"]}


def evidence(repository: Repository, device: str) -> dict[str, Any] | None:
    """What proves to `device` that it is revoked, by the roots it trusts: its signed document, and the metadata that
    leads to whoever signed it. None when there is no such document."""
    desired = repository.read_desired(device)
    if desired is None:
        return None
    snapshot = repository.snapshot().signed
    documents: dict[str, bytes | None] = {"timestamp": repository.read_metadata("timestamp", None), "desired": desired}
    documents[f"snapshot.{snapshot.version}"] = repository.read_metadata("snapshot", snapshot.version)
    targets = snapshot.meta["targets.json"].version
    documents[f"targets.{targets}"] = repository.read_metadata("targets", targets)
    for version in range(1, repository.root_version() + 1):
        documents[f"root.{version}"] = repository.read_metadata("root", version)
    return {name: base64.b64encode(data).decode() for name, data in documents.items() if data is not None}


def _end(repository: Repository, expires: str) -> datetime:
    """When nobody accepts a certificate any longer, for a renewal neither."""
    return datetime.fromisoformat(expires) + timedelta(days=repository.settings.renewal_grace_days)


def _load(repository: Repository) -> dict[str, Any]:
    path = repository.path / _RECORD_FILE
    data = files.read_regular(path, _MAX_RECORD_BYTES)
    if data is None:
        return {"version": FORMAT, "number": 0, "certificates": []}
    record = strictjson.loads(data, max_bytes=_MAX_RECORD_BYTES, what=str(path))
    try:
        for one in record["certificates"]:
            Issued(int(one["serial"], 16), str(datetime.fromisoformat(one["expires"])))
            datetime.fromisoformat(one["revoked"])
        return {"version": FORMAT, "number": int(record["number"]), "certificates": record["certificates"]}
    except (KeyError, TypeError, ValueError) as e:
        raise PublishError(
            Reason.STATE_CORRUPT, f"{path} is not a list of revoked certificates: {e!r}", hint="restore it"
        ) from e


def _store(repository: Repository, record: dict[str, Any]) -> None:
    files.write_atomic(repository.path / _RECORD_FILE, strictjson.canonical(record) + b"\n")


def _iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
