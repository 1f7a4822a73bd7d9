"""Replacing a signing key: after a theft, or because it is time.

A key of a top-level role is replaced by a new root, which the old root's keys sign as well; a delegated one by new
targets. Interrupted anywhere, the same command finishes: the new key waits as `<name>.next.pem` until the metadata
that names it is written, and nothing is signed with a key that clients do not know (`publish.check_signed`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from ota.errors import PublishError, Reason
from ota.publisher import director, files
from ota.publisher.keys import ROOT_KEYS
from ota.publisher.publish import publish
from ota.publisher.repository import Repository

_TOP_LEVEL = ("targets", "snapshot", "timestamp")


@dataclass(frozen=True, slots=True)
class Rotated:
    """The new key's id, the root that is in force, and where the old key lies (None when it was not at hand)."""

    name: str
    keyid: str
    root_version: int
    retired: Path | None


def rotate(repository: Repository, name: str) -> Rotated:
    """Replace the signing key `name` (a top-level role, `director`, `release-<line>`) and sign anew what it signed.

    Raises:
        PublishError: `key_missing` when a key that has to sign is not at hand, or there is no such role; `busy`,
            `io_error`, `no_space`.
    """
    _refuse_unknown(repository, name)
    with repository.locked():
        signer = repository.keys.next_signer(name)
        if name in ROOT_KEYS or name in _TOP_LEVEL:
            sign_root(repository, name, signer)
        else:
            # found out before anything moves: it has to sign the new delegation
            repository.keys.signer("targets")
        retired = repository.keys.replace(name)
    publish(repository, [], rekey=None if name in ROOT_KEYS or name in _TOP_LEVEL else name)
    director.renew(repository)
    return Rotated(name, signer.public_key.keyid, repository.root_version(), retired)


def _refuse_unknown(repository: Repository, name: str) -> None:
    known = [*ROOT_KEYS, *_TOP_LEVEL, "director", *(f"release-{line}" for line in repository.release_roles())]
    if name not in known:
        raise PublishError(
            Reason.KEY_MISSING, f"there is no signing key {name[:60]!r}", hint=f"one of {', '.join(known)}"
        )


def sign_root(repository: Repository, name: str, signer: CryptoSigner) -> None:
    """Write the next root, with `signer` in the place of `name`; nothing when the newest root has it already."""
    old = repository.root()
    role = "root" if name in ROOT_KEYS else name
    if signer.public_key.keyid in old.signed.roles[role].keyids:
        return
    signers = {key: repository.keys.signer(key) for key in ROOT_KEYS if repository.keys.has(key)}
    new = repository.root()
    for keyid in _replaced(repository, old.signed, role, name, signers):
        new.signed.revoke_key(keyid, role)
    new.signed.add_key(signer.public_key, role)
    new.signed.version += 1
    new.signed.expires = repository.expiry(repository.settings.root_days)
    new.signatures.clear()
    for root_signer in [*signers.values(), *([signer] if role == "root" else [])]:
        new.sign(root_signer, append=True)
    _check_root(old, new)
    files.write_atomic(repository.metadata_path("root", new.signed.version), new.to_bytes())


def _replaced(
    repository: Repository, root: Root, role: str, name: str, signers: dict[str, CryptoSigner]
) -> Iterable[str]:
    """Key ids that leave `role`."""
    if role != "root":
        return list(root.roles[role].keyids)
    if name in signers:
        return [signers[name].public_key.keyid]
    # lost: it is the one that none of the keys at hand is
    left = set(root.roles["root"].keyids) - {signer.public_key.keyid for signer in signers.values()}
    if len(left) != 1:
        raise PublishError(
            Reason.KEY_MISSING,
            f"{name}.pem is not here, and neither are other root keys, so it is not clear which one to replace",
            hint=f"bring the other two root keys to {repository.keys.directory}",
        )
    return left


def _check_root(old: Metadata[Root], new: Metadata[Root]) -> None:
    """A client accepts a root that a threshold of the old and of its own keys signed."""
    for judge in (old.signed, new.signed):
        judged = judge.get_root_verification_result(None, new.signed_bytes, new.signatures)
        if not judged.verified:
            needed = judge.roles["root"].threshold
            raise PublishError(
                Reason.KEY_MISSING,
                f"a new root needs {needed} signatures of root keys, {len(judged.signed)} are here",
                hint="bring the root keys here: root-1.pem, root-2.pem, root-3.pem",
            )
