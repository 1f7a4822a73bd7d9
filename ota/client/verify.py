"""What a signed document has to be before anything in it is used: its size, its form, its signatures, its age.

Pure functions over python-tuf's formats; which document is wanted, and which version, is decided in `workflow`.
Invariants: python-tuf parses nothing that `strictjson` has not read; one key counts once towards a threshold, under
whatever ids and in whatever spelling it stands.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import Key
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError

from ota import strictjson
from ota.client.tufmetadata import Metadata, Root, Signed, Snapshot, Targets, Timestamp
from ota.errors import OtaError, Reason, TransferError, TrustError

DIRECTOR = "director"
_MAX_VERSION = 1 << 53
_EXPIRED = {
    Root.type: Reason.ROOT_EXPIRED,
    Timestamp.type: Reason.TIMESTAMP_EXPIRED,
    Snapshot.type: Reason.SNAPSHOT_EXPIRED,
    Targets.type: Reason.TARGETS_EXPIRED,
    DIRECTOR: Reason.DESIRED_EXPIRED,
}
_S = TypeVar("_S", Root, Timestamp, Snapshot, Targets)


def load(kind: type[_S], what: str, data: bytes, limit: int) -> Metadata[_S]:
    """Parse a document; its signatures are not looked at.

    Args:
        kind: the type it has to have.
        what: its name in an error's text.
        limit: most bytes it may have.

    Raises:
        TrustError: `metadata_too_large`, `metadata_mismatch` for another type.
        OtaError: `bad_json`.
    """
    if len(data) > limit:
        raise TrustError(Reason.METADATA_TOO_LARGE, f"{what}: {len(data)} bytes, more than the {limit} allowed")
    value = strictjson.loads(data, max_bytes=limit, what=what)
    _check_shape(value, what)
    try:
        document = Metadata.from_bytes(data)
        # signatures are checked over what was understood: it has to be all of what was sent
        whole = document.signed_bytes == (encode_canonical(value["signed"]) or "").encode()
    except FormatError as e:
        # floats, for one; nobody can have signed it
        raise OtaError(Reason.BAD_JSON, f"{what} has no canonical form", hint="it was not made by edge-ota") from e
    except RepositoryError as e:
        raise OtaError(Reason.BAD_JSON, f"{what}: {e.__cause__ or e}", hint="it was not made by edge-ota") from e
    if not isinstance(document.signed, kind):
        raise mismatch(f"{what}: a {document.signed.type} document in its place")
    if not whole:
        raise OtaError(Reason.BAD_JSON, f"{what}: a value that is read as another one", hint="sign it anew")
    return document


def verify(delegator: Root | Targets, role: str, document: Metadata[Any], what: str = "") -> None:
    """Require the signatures that `delegator` demands of `role`.

    Raises:
        TrustError: `bad_signature`; `metadata_mismatch` when the role is not delegated.
    """
    what = what or role
    keys_digest(delegator, role)
    try:
        delegator.verify_delegate(role, document.signed_bytes, document.signatures)
    except UnsignedMetadataError as e:
        raise TrustError(
            Reason.BAD_SIGNATURE,
            f"{what}: {e}",
            hint="somebody else signed it, or its keys were rotated without a new root",
        ) from e


def keys_digest(delegator: Root | Targets, role: str) -> str:
    """One value per set of keys and threshold of `role`: what a version floor is bound to. A key id without a key
    verifies nothing and counts for nothing.

    Raises:
        TrustError: `metadata_mismatch` when the role is not delegated; `bad_signature` when one key stands under two
            ids, which is a forged threshold.
    """
    try:
        delegation = delegator.get_delegated_role(role)
    except ValueError as e:
        raise mismatch(f"nobody is entrusted with {role}: {e}") from e
    known = delegator.keys if isinstance(delegator, Root) else _delegated_keys(delegator)
    public = sorted(_material(known[keyid]) for keyid in delegation.keyids if keyid in known)
    if len(set(public)) != len(public):
        raise TrustError(Reason.BAD_SIGNATURE, f"{role}: one key stands under two key ids")
    return joined(str(delegation.threshold), *public)


def _delegated_keys(delegator: Targets) -> Mapping[str, Key]:
    return {} if delegator.delegations is None else delegator.delegations.keys


def joined(*parts: str) -> str:
    """One digest of several texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def check_fresh(signed: Signed, role: str, reference: datetime.datetime, what: str = "") -> None:
    """Refuse what had expired at `reference`.

    Raises:
        TrustError: `root_expired`, `timestamp_expired`, `snapshot_expired`, `targets_expired`, `desired_expired`;
            `delegated_expired` for any other role.
    """
    if signed.is_expired(reference):
        raise TrustError(
            _EXPIRED.get(role, Reason.DELEGATED_EXPIRED),
            f"{what or role} expired at {signed.expires:%Y-%m-%dT%H:%M:%SZ}",
            hint="the operator must sign it anew; also check this device's clock",
            retry=True,
        )


def rollback(role: str, version: int, floor: int) -> TrustError:
    """The error for a version below the one that is due."""
    return TrustError(
        Reason.METADATA_ROLLBACK,
        f"{role} version {version} where {floor} was due",
        hint="an old copy is being replayed; after a restore: edge-ota rotate REPO snapshot, timestamp and director",
    )


def mismatch(message: str) -> TrustError:
    """The error for documents that contradict each other."""
    return TrustError(Reason.METADATA_MISMATCH, message, hint="the repository is inconsistent: publish again")


def absent(what: str) -> TransferError:
    """The error for a document that has to exist and does not."""
    return TransferError(Reason.NOT_FOUND, f"{what} is not at the source", hint="publish it", retry=True)


def _check_shape(value: Any, what: str) -> None:
    """Types that python-tuf would take over unchecked from the JSON and compare later."""
    signed = value.get("signed") if isinstance(value, dict) else None
    version = signed.get("version") if isinstance(signed, dict) else None
    if type(version) is not int or not 1 <= version < _MAX_VERSION:
        raise OtaError(Reason.BAD_JSON, f"{what}: version {str(version)[:40]!r} is not a positive integer")


def _material(key: Key) -> str:
    """The key itself, in one spelling: hexadecimal digits and PEM each have several for the same key."""
    public = str(key.keyval.get("public", ""))
    try:
        if key.keytype == "ed25519":
            return bytes.fromhex(public).hex()
        loaded = serialization.load_pem_public_key(public.encode())
    except (ValueError, UnsupportedAlgorithm):
        return public  # it verifies nothing in any spelling
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return loaded.public_bytes(serialization.Encoding.DER, form).hex()
