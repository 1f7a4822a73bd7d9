"""One-time tokens: `tokens/<digest>.json` remembers a token by its hash, until when it is good, and who used it.

Invariants: the token itself is nowhere on disk; one token enrols one pair of keys, whichever of two uses comes first;
the same keys with the same token get the same bundle again, so that a device that lost power before it could store
the answer just repeats its request.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from ota import enrolment, strictjson
from ota.enrolment import Token
from ota.errors import PublishError, Reason
from ota.publisher import audit, files
from ota.publisher.certificates import certificate_pem
from ota.publisher.enroll import (
    Places,
    Request,
    admit,
    has_device,
    load_device,
    revoked_error,
)
from ota.publisher.repository import Repository, check_device
from ota.publisher.revocation import take_over

FORMAT = 1
DEFAULT_HOURS = 24
MAX_HOURS = 24 * 90
_DIRECTORY = "tokens"
_KEPT_AFTER_END = timedelta(days=30)
_MAX_RECORD_BYTES = 8192
_MAX_BUNDLE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Made:
    """A new token: the text to hand over, and until when it can be used."""

    text: str = field(repr=False)
    device: str
    expires: datetime
    replaces: bool


def make(repository: Repository, device: str, hours: int = DEFAULT_HOURS, *, replace: bool = False) -> Made:
    """A token that enrols `device` once. It takes the place of one that was made before and not used: of a token that
    was lost on the way the operator is rid by making another.

    Args:
        replace: the device is known and comes back as another board.

    Raises:
        PublishError: `device_exists` for a known device without `replace`; `unknown_device`; `key_missing` without the
            authority's certificate.
    """
    check_device(device)
    with repository.locked():
        if has_device(repository, device) and not replace:
            known = load_device(repository, device)
            raise (
                revoked_error(known)
                if known.revoked
                else PublishError(
                    Reason.DEVICE_EXISTS,
                    f"device {device} is enrolled already",
                    hint=f"edge-ota replace {repository.path} {device} --token makes a token for another board",
                )
            )
        if replace:
            load_device(repository, device)
        pem = certificate_pem(repository.authority.certificate())
        token = Token(device, secrets.token_bytes(enrolment.SECRET_BYTES), enrolment.ca_fingerprint(pem))
        expires = repository.now().replace(microsecond=0) + timedelta(hours=hours)
        _sweep(repository, device)
        _store(
            repository,
            token.digest,
            {"version": FORMAT, "device": device, "expires": expires.isoformat(), "replace": replace, "used_by": ""},
        )
        audit.record(repository, "token_made", device, expires=expires.isoformat(), replace=replace)
        return Made(enrolment.token_text(token), device, expires, replace)


def redeem(repository: Repository, text: str, wanted: Request, places: Places) -> bytes:
    """The bundle for a request that brings a token.

    Raises:
        PublishError: `token_unknown`, `token_used`, `token_expired`, `token_other_device`; as `enroll.enroll`; `busy`.
    """
    token = enrolment.parse_token(text)
    with repository.locked():
        record = _load(repository, token.digest)
        if record is None:
            raise PublishError(
                Reason.TOKEN_UNKNOWN,
                "this token was not made here, or another took its place",
                hint="edge-ota token REPO DEVICE makes one",
            )
        if record["device"] != wanted.device or token.device != wanted.device:
            raise PublishError(
                Reason.TOKEN_OTHER_DEVICE,
                f"the token is for {token.device}, not for {wanted.device}",
                hint="each device needs a token of its own: edge-ota token REPO DEVICE",
            )
        return _redeem(repository, token, record, wanted, places)


def withdraw(repository: Repository, device: str) -> int:
    """Remove every token of `device`; returns how many there were. The caller holds the repository's lock."""
    count = 0
    for path in sorted((repository.path / _DIRECTORY).glob("*.json")):
        record = _load(repository, path.stem)
        if record is not None and record["device"] == device:
            _remove(repository, path.stem)
            count += 1
    return count


def _redeem(repository: Repository, token: Token, record: dict[str, Any], wanted: Request, places: Places) -> bytes:
    user = hashlib.sha256(wanted.certificate_key + wanted.hpke_public).hexdigest()
    if record["used_by"] not in ("", user):
        raise PublishError(
            Reason.TOKEN_USED,
            f"the token for {token.device} was used by another device",
            hint="make a new one; if nobody of yours used it, revoke the device: edge-ota revoke REPO DEVICE",
        )
    if datetime.fromisoformat(record["expires"]) <= repository.now():
        raise PublishError(
            Reason.TOKEN_EXPIRED,
            f"the token for {token.device} expired at {record['expires']}",
            hint="make a new one: edge-ota token REPO DEVICE; its life is --hours",
        )
    path = repository.path / _DIRECTORY / f"{token.digest}.bundle"
    answered = files.read_regular(path, _MAX_BUNDLE_BYTES) if record["used_by"] else None
    if answered is not None:
        return answered
    # used before it enrols: a power cut between the two leaves a token that only the same keys can finish with
    _store(repository, token.digest, {**record, "used_by": user})
    enrolled = take_over(repository, wanted, places) if record["replace"] else admit(repository, wanted, places)
    files.write_atomic(path, enrolled.bundle)
    audit.record(
        repository,
        "enrolled",
        wanted.device,
        by_token=True,
        kid=enrolled.device.kid,
        serial=f"{enrolled.device.certificate_serial:x}",
    )
    return enrolled.bundle


def _sweep(repository: Repository, device: str) -> None:
    """Forget tokens long past their end, and those of `device` that nobody used; the caller holds the lock."""
    for path in (repository.path / _DIRECTORY).glob("*.json"):
        record = _load(repository, path.stem)
        if record is None:
            continue
        past = datetime.fromisoformat(record["expires"]) + _KEPT_AFTER_END < repository.now()
        if past or (record["device"] == device and not record["used_by"]):
            _remove(repository, path.stem)


def _remove(repository: Repository, digest: str) -> None:
    for suffix in ("bundle", "json"):
        files.remove(repository.path / _DIRECTORY / f"{digest}.{suffix}")


def _load(repository: Repository, digest: str) -> dict[str, Any] | None:
    path = repository.path / _DIRECTORY / f"{digest}.json"
    data = files.read_regular(path, _MAX_RECORD_BYTES)
    if data is None:
        return None
    record = strictjson.loads(data, max_bytes=_MAX_RECORD_BYTES, what=str(path))
    try:
        return {
            "version": FORMAT,
            "device": str(record["device"]),
            "expires": datetime.fromisoformat(record["expires"]).isoformat(),
            "replace": record["replace"] is True,
            "used_by": str(record["used_by"]),
        }
    except (KeyError, TypeError, ValueError) as e:
        raise PublishError(
            Reason.STATE_CORRUPT, f"{path} is not a token's record: {e!r}", hint="remove it and make another token"
        ) from e


def _store(repository: Repository, digest: str, record: dict[str, Any]) -> None:
    files.make_directory(repository.path / _DIRECTORY, files.SECRET_DIRECTORY_MODE)
    files.write_atomic(
        repository.path / _DIRECTORY / f"{digest}.json", strictjson.canonical(record) + b"\n", files.SECRET_MODE
    )
