"""A fleet's way through signed metadata: which releases this device is assigned, on whose word, and with which keys.

A generator over `workflow`: after the top level it asks for the device's own desired.json, a document of the delegated
role `director` outside the snapshot, and for the release role of every line that it names. No I/O.
Invariant: a release counts as assigned only if the line's own release role lists the same hash.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping

from ota.client.desired import (
    Assignment,
    Desired,
    newest_counter,
    parse_allow_rollback_to,
    parse_grants,
    parse_revoked,
    parse_revoked_keys,
    parse_settings,
    split_path,
)
from ota.client.journal import Floor
from ota.client.limits import Limits
from ota.client.tufmetadata import DelegatedRole, TargetFile, Targets
from ota.client.verify import DIRECTOR, absent, check_fresh, keys_digest, load, mismatch, verify
from ota.client.workflow import Effect, FetchDesired, FetchMetadata, Steps, TopLevel, Trusted, Workflow
from ota.errors import OtaError, Reason, TransferError, TrustError
from ota.release import MAX_RELEASE_BYTES

__all__ = ["MAX_ASSIGNMENTS", "Effect", "FetchDesired", "FetchMetadata", "Refresh", "Trusted", "refresh"]

MAX_ASSIGNMENTS = 64
_SHA256 = re.compile(r"[0-9a-f]{64}")
Refresh = Steps[Desired]


def refresh(
    pinned_root: bytes,
    stored: Mapping[str, bytes],
    floors: Mapping[str, Floor],
    device: str,
    reference: datetime.datetime,
    limits: Limits,
) -> Refresh:
    """Walk from the trusted root to this device's assignments.

    Args:
        pinned_root: root metadata that enrolment wrote.
        stored: documents that `Trusted` made durable earlier, by role; damaged ones are fetched again.
        floors: by role, as `Trusted` gave them.
        device: this device's id.
        reference: the one time at which everything is judged.

    Raises (from the generator):
        TrustError: as `Workflow.top_level`, and `not_for_this_device`.
        OtaError: `bad_json`.
        TransferError: `not_found` for a document that must exist; `root_unreachable`; whatever was thrown in.
    """
    workflow = Workflow(stored, floors, reference, limits)
    top = yield from workflow.top_level(pinned_root)
    data = yield FetchDesired(limits.desired_max_bytes)
    if data is None:
        if workflow.known(DIRECTOR):
            raise absent("desired.json of this device, which existed before,")
        return Desired()
    return (yield from _desired(workflow, top, data, device, reference, limits))


def _desired(
    workflow: Workflow, top: TopLevel, data: bytes, device: str, reference: datetime.datetime, limits: Limits
) -> Refresh:
    document = load(Targets, "desired.json", data, limits.desired_max_bytes)
    verify(top.targets, DIRECTOR, document, what="desired.json")
    signed = document.signed
    named = signed.unrecognized_fields.get("device")
    if named != device:
        raise TrustError(
            Reason.NOT_FOR_THIS_DEVICE,
            f"desired.json names device {str(named)[:60]!r}, this one is {device!r}",
            hint="look at the topic or folder that it was put into",
        )
    keys = keys_digest(top.targets, DIRECTOR)
    workflow.check_floor(DIRECTOR, signed.version, keys)
    check_fresh(signed, DIRECTOR, reference, what="desired.json")
    grants = parse_grants(signed.unrecognized_fields.get("grants", {}))
    revoked = parse_revoked(signed.unrecognized_fields.get("revoked", False))
    revoked_keys = parse_revoked_keys(signed.unrecognized_fields.get("revoked_keys", []))
    settings = parse_settings(signed.unrecognized_fields.get("settings"))
    yield workflow.trusted(DIRECTOR, data, signed.version, keys)
    if revoked:
        # at once: nothing that some other role lists, or fails to list, may delay it
        return Desired(revoked=True, revoked_keys=revoked_keys)
    if len(signed.targets) > MAX_ASSIGNMENTS:
        raise mismatch(f"desired.json assigns more than {MAX_ASSIGNMENTS} releases")
    assignments: dict[str, Assignment] = {}
    refused: dict[str, OtaError] = {}
    for path, wanted in signed.targets.items():
        line, version = split_path(path)
        if line in assignments or line in refused:
            raise mismatch(f"desired.json assigns two releases of line {line}")
        try:
            listing = yield from workflow.delegated(top, top.targets, _release_role(line))
            assignments[line] = _agreed(top.targets, listing, path, wanted, line, version)
        except TransferError as e:
            if e.reason is not Reason.NOT_FOUND:
                raise
            refused[line] = e
        except OtaError as e:
            refused[line] = e
    return Desired(assignments, refused, grants, settings=settings)


def _release_role(line: str) -> str:
    return f"release-{line}"


def _agreed(targets: Targets, listing: Targets, path: str, wanted: TargetFile, line: str, version: str) -> Assignment:
    role = _release_role(line)
    delegation = targets.get_delegated_role(role)
    known = listing.targets.get(path)
    allowed = isinstance(delegation, DelegatedRole) and delegation.is_delegated_path(path)
    if known is None or not allowed:
        raise mismatch(f"{path} is assigned, but {role} does not list it")
    sha256 = known.hashes.get("sha256")
    if sha256 is None or known.length != wanted.length or wanted.hashes.get("sha256") != sha256:
        raise mismatch(f"{path} is assigned with another hash or length than {role} signs")
    if not _SHA256.fullmatch(sha256):
        raise mismatch(f"{path} is listed with {sha256[:80]!r}, which is no hash")  # it would name a file
    if known.length > MAX_RELEASE_BYTES:
        raise TrustError(Reason.METADATA_TOO_LARGE, f"{path} has {known.length} bytes")
    back_to = parse_allow_rollback_to(listing.unrecognized_fields.get("allow_rollback_to", 0), role)
    back_from = newest_counter(target.custom for target in listing.targets.values()) if back_to else 0
    return Assignment(line, version, path, known.length, sha256, listing.expires, back_to, back_from)
