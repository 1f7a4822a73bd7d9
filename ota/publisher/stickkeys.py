"""Replacing a key of the repository of sticks: after a theft, or because it is time."""

from __future__ import annotations

from ota.errors import PublishError, Reason
from ota.publisher import sticks
from ota.publisher.repository import Repository
from ota.publisher.rotate import Rotated, sign_root


def rotate(repository: Repository, name: str) -> Rotated:
    """Replace a key of the repository of sticks; sticks made before keep working until they expire, unless their
    device has seen one made after. Interrupted anywhere, the same call finishes.

    Raises:
        PublishError: `repository_missing` for a fleet without sticks; `key_missing`, `io_error`, `no_space`, `busy`.
    """
    with repository.locked():
        own = sticks.opened(repository)
        if own is None:
            raise PublishError(
                Reason.REPOSITORY_MISSING, "this fleet has no sticks", hint=f"edge-ota sticks {repository.path}"
            )
        if name not in sticks.SIGNERS:
            raise PublishError(
                Reason.KEY_MISSING, f"sticks have no key {name[:60]!r}", hint=f"one of {', '.join(sticks.SIGNERS)}"
            )
        signer = own.keys.next_signer(name)
        if name != "director":
            sign_root(own, name, signer)
        else:
            # found out before anything moves: it has to sign the new delegation
            own.keys.signer("targets")
        retired = own.keys.replace(name)
        sticks.renew(repository, own)
        return Rotated(name, signer.public_key.keyid, own.root_version(), retired)
