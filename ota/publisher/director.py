"""The director: one signed document per device that says which releases it should run and holds their keys.

`desired.json` is Targets metadata signed by the role `director`, for one device, outside the snapshot (FORMAT.md §6).
Its version only grows: it is recorded in device.json before the document is written, so a lost document does not
start again at 1, which its device would refuse as a rollback.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from tuf.api.metadata import Metadata, TargetFile, Targets

from ota import payload
from ota.client.limits import Limits
from ota.client.trust import MAX_ASSIGNMENTS
from ota.errors import OtaError, PublishError, Reason
from ota.publisher import files, wanted
from ota.publisher.enroll import Device, load_device, revoked_error, store_device
from ota.publisher.publish import check_signed, check_size, is_signed, past_half
from ota.publisher.repository import Listed, Repository, load_metadata
from ota.publisher.vault import Vault
from ota.release import Release

_MAX_BYTES = Limits().desired_max_bytes


@dataclass(frozen=True, slots=True)
class Desired:
    """What was signed for one device."""

    device: str
    version: int
    expires: datetime
    releases: tuple[Listed, ...]
    grants: int


def grant(repository: Repository, device: str, line: str, version: str) -> Desired:
    """Let `device` run a published release: it replaces the one it had of that line, other lines stay.

    Raises:
        PublishError: `unknown_device`, `device_revoked`, `unknown_release`, `metadata_too_large` for more than a
            device takes, `key_missing`, `busy`, `io_error`, `no_space`.
    """
    with repository.locked():
        enrolled = load_device(repository, device)
        if enrolled.revoked:
            raise revoked_error(enrolled)
        chosen = repository.find(line, version)
        others = [listed for listed in desired_releases(repository, device) if listed.line != line]
        return _sign(repository, enrolled, sorted([*others, chosen], key=lambda listed: listed.line))


def desired_releases(repository: Repository, device: str) -> list[Listed]:
    """The releases that the device's current document names, by line.

    Raises:
        PublishError: `unknown_device`; `state_corrupt` when the document names what is not published.
    """
    current = _current(repository, device)
    if current is None:
        return []
    by_target = {listed.target: listed for listed in repository.published()}
    try:
        return sorted((by_target[path] for path in current.signed.targets), key=lambda listed: listed.line)
    except KeyError as e:
        raise PublishError(
            Reason.STATE_CORRUPT,
            f"desired.json of {device} names {e.args[0]}, which is not published",
            hint="restore the repository from one backup",
        ) from e


def resign(repository: Repository, device: str) -> Desired | None:
    """Sign the device's document anew, same releases, grants for its present key; None when it has none.

    The caller holds the repository's lock.
    """
    releases = desired_releases(repository, device)
    enrolled = load_device(repository, device)
    # a document without releases may still say that the device is revoked, which it is no longer
    known = _current(repository, device) is not None
    needed = known or releases or enrolled.revoked or wanted.stored(repository, device) is not None
    return _sign(repository, enrolled, releases) if needed else None


def expel(repository: Repository, device: Device) -> Desired:
    """Sign what tells a device that it is revoked: no grants, and no releases either once it is decommissioned.

    The caller holds the repository's lock and has stored `device`, which is revoked.
    """
    releases = [] if device.decommissioned else desired_releases(repository, device.device)
    return _sign(repository, device, releases)


def renew(repository: Repository, *, everything: bool = False, only: str | None = None) -> list[Desired]:
    """Sign anew every document that is past half of its life, or signed by a key that was replaced, or whose grants are
    for a key that the device has replaced: it does not keep older keys for ever.

    Args:
        everything: also those that are not.
        only: look at this device alone.

    Raises:
        OtaError: the first cause for which a document could not be signed; all others were all the same.
    """
    with repository.locked():
        renewed: list[Desired] = []
        failure: OtaError | None = None
        delegator = repository.targets().signed
        now, days = repository.now(), repository.settings.desired_days
        for device in [only] if only is not None else list(repository.devices()):
            try:
                current = _current(repository, device)
                if current is None:
                    continue
                due = past_half(current.signed.expires, days, now) or not is_signed(delegator, "director", current)
                known = load_device(repository, device)
                due = due or (bool(known.former_hpke) and not known.revoked)
                signed = resign(repository, device) if everything or due else None
            except OtaError as e:
                failure = failure or e  # one damaged record must not cost the whole fleet its documents
                continue
            renewed += [signed] if signed is not None else []
        if failure is not None:
            raise failure
        return renewed


def _current(repository: Repository, device: str) -> Metadata[Targets] | None:
    data = repository.read_desired(device)
    return None if data is None else load_metadata(data, str(repository.desired_path(device)), Targets)


def _sign(repository: Repository, device: Device, releases: Sequence[Listed]) -> Desired:
    # a device looks at its revocation before it counts
    if len(releases) > MAX_ASSIGNMENTS and not device.revoked:
        raise PublishError(
            Reason.METADATA_TOO_LARGE,
            f"{device.device} would run {len(releases)} lines, and a device takes {MAX_ASSIGNMENTS}",
            hint="nothing was signed; put several models into one line",
        )
    current = _current(repository, device.device)
    version = max(device.desired_version, current.signed.version if current is not None else 0) + 1
    settings = wanted.stored(repository, device.device)
    grants: dict[str, Any] = {}
    for listed in () if device.revoked else releases:
        grants |= grants_for(repository, device, repository.release(listed))
    document = Targets(
        version=version,
        expires=repository.expiry(repository.settings.desired_days),
        targets={
            listed.target: TargetFile(listed.length, {"sha256": listed.sha256}, listed.target) for listed in releases
        },
        unrecognized_fields={
            "device": device.device,
            "grants": grants,
            **({"revoked": True, "revoked_keys": _keys_of(device)} if device.revoked else {}),
            **({} if device.revoked or settings is None else {"settings": settings}),
        },
    )
    metadata = Metadata(document)
    metadata.sign(repository.keys.signer("director"))
    check_signed(repository.targets().signed, "director", metadata)
    data = metadata.to_bytes()
    check_size(f"device {device.device}", len(data), _MAX_BYTES, "shorten its settings, or grant fewer lines")
    # from now on no grant is for the key before; the board that is expelled may know itself by that one alone
    former = device.former_hpke if device.revoked else b""
    store_device(repository, replace(device, desired_version=version, former_hpke=former))
    files.write_atomic(repository.desired_path(device.device), data)
    return Desired(device.device, version, document.expires, tuple(releases), len(grants))


def _keys_of(device: Device) -> list[str]:
    """Ids of the keys that the board being expelled has: a later board under the same id has others."""
    return [device.kid, *([payload.key_id(device.former_hpke)] if device.former_hpke else [])]


def grants_for(repository: Repository, device: Device, release: Release) -> dict[str, Any]:
    """The content keys of `release`, wrapped for `device`, as a desired.json carries them."""
    vault = Vault(repository)
    grants = {}
    for component in (*release.components, release.golden):
        cek_id = component.full.cek_id
        cek = vault.key(release.line, release.version, cek_id)
        info = payload.grant_info(device.device, release.line, release.version, cek_id)
        wrapped = payload.wrap_key(cek, device.hpke_public, info)
        grants[cek_id] = {"kid": device.kid, "wrapped": base64.b64encode(wrapped).decode()}
    return grants
