"""A thief of root keys that were rotated away, and whether a device falls for what he signs with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from securesystemslib.signer import CryptoSigner

from ota.client.updater import Updater
from tests.crash.scene import CrashDevice, Moment, Scene
from tests.ota.client.simulator import LATER, Simulator


@dataclass(frozen=True)
class ForgedRoot:
    """What a thief of the retired root keys can serve: his own root and timestamp."""

    served: Simulator
    root: bytes


def rotate_root(device: CrashDevice) -> ForgedRoot:
    """New keys for the root; and, with the retired ones, a forgery of the same version."""
    repository = device.repository
    retired = list(repository.root_signers)
    before = copy.deepcopy(repository.root)
    repository.root_signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
    for signer in retired:
        repository.root.signed.revoke_key(signer.public_key.keyid, "root")
    for signer in repository.root_signers:
        repository.root.signed.add_key(signer.public_key, "root")
    repository.root.signed.version += 1
    repository.sign_root(*retired[:2])
    thief = CryptoSigner.generate_ed25519()
    before.signed.revoke_key(repository.signers["timestamp"].public_key.keyid, "timestamp")
    before.signed.add_key(thief.public_key, "timestamp")
    before.signed.version += 1
    before.signatures.clear()
    for signer in retired[:2]:
        before.sign(signer, append=True)
    forged = before.to_bytes()
    served = repository.frozen()
    served.documents["root", before.signed.version] = forged
    timestamp = copy.deepcopy(repository.timestamp)
    timestamp.signed.version = 1000
    timestamp.signed.expires = LATER
    timestamp.sign(thief)
    served.documents["timestamp", None] = timestamp.to_bytes()
    return ForgedRoot(served, forged)


def forged_root_refused(attack: ForgedRoot) -> Callable[[Scene, Moment, CrashDevice, Updater], None]:
    """Once the rotated root was trusted, the retired keys must be worth nothing, whatever a cut left."""

    def also(scene: Scene, moment: Moment, device: CrashDevice, updater: Updater) -> None:
        if not moment.done:
            return
        genuine = device.transport.repository
        device.transport.repository = attack.served
        device.check(updater)
        device.transport.repository = genuine
        for path, file in device.disk.files():  # type: ignore[union-attr]
            assert file.content != attack.root, f"a root by retired keys was trusted ({path})"

    return also
