"""A small repository whose keys are always the same, so that kept metadata stays valid, and a walk over it.

Snapshot and timestamp list neither hashes nor lengths: whoever holds those two keys could sign any, so the parsers
behind them must stand alone. An input without signatures is signed by the role it is given for (a stolen key); one that
has signatures is served as it is.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile

from ota.client import trust
from ota.client.desired import Desired
from ota.client.limits import Limits
from tests.ota.client.simulator import NOW, Built, Simulator

DEVICE = "cam-1"
LINE = "person"
RELEASE_ROLE = f"release-{LINE}"
RELEASE = Path(__file__).parent / "corpus" / "release" / "valid-release.json"
ROLES = ("root", "timestamp", "snapshot", "targets", RELEASE_ROLE, "desired")
LIMITS = Limits(root_rotations=4)


@functools.cache
def repository() -> Simulator:
    """One release of one line, assigned to one device."""
    numbers = itertools.count(1)

    def generate() -> CryptoSigner:
        return CryptoSigner(Ed25519PrivateKey.from_private_bytes(next(numbers).to_bytes(32, "big")))

    with mock.patch.object(CryptoSigner, "generate_ed25519", generate):
        simulator = Simulator()
        release = Built(LINE, "1.1.0", 2, RELEASE.read_bytes(), {"c" * 32: b"k" * 32}, {})
        simulator.list_release(release)
    simulator.grant(DEVICE, X25519PrivateKey.from_private_bytes(b"d" * 32), release)
    for role, meta in simulator.snapshot.signed.meta.items():
        simulator.snapshot.signed.meta[role] = MetaFile(meta.version)
    simulator.sign_snapshot()
    simulator.timestamp.signed.snapshot_meta = MetaFile(simulator.snapshot.signed.version)
    simulator.sign_timestamp()
    return simulator


def signed_part(role: str) -> bytes:
    """What the repository signs for `role`, without the signatures; for the root its second version."""
    simulator = repository()
    if role == "root":
        document = json.loads(simulator.documents["root", 1])
        document["signed"]["version"] = 2
    else:
        document = json.loads(simulator.desired[DEVICE] if role == "desired" else _current(simulator, role))
    return json.dumps(document["signed"], indent=1).encode()


def walk(role: str, data: bytes) -> Desired:
    """Refresh with `data` in the place of the document of `role`."""
    simulator = repository()
    served: Mapping[tuple[str, int | None], bytes] = simulator.documents
    document = _signed(simulator, role, data)
    steps = trust.refresh(simulator.documents["root", 1], {}, {}, DEVICE, NOW, LIMITS)
    answer: bytes | None = None
    while True:
        try:
            effect = steps.send(answer)
        except StopIteration as e:
            result: Desired = e.value
            return result
        if isinstance(effect, trust.FetchDesired):
            answer = document if role == "desired" else simulator.desired[DEVICE]
        elif isinstance(effect, trust.FetchMetadata):
            replaced = effect.role == role and (role != "root" or effect.version == 2)
            answer = document if replaced else served.get((effect.role, effect.version))
        else:
            answer = None


def _current(simulator: Simulator, role: str) -> bytes:
    return simulator.documents[role, None if role == "timestamp" else simulator.versions[role]]


def _signed(simulator: Simulator, role: str, data: bytes) -> bytes:
    try:
        value: Any = json.loads(data)
        if not isinstance(value, dict) or "signatures" in value:
            return data
        document = Metadata.from_dict({"signed": copy.deepcopy(value), "signatures": []})
        message = document.signed_bytes
    except (RepositoryError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return data
    keys = (
        simulator.root_signers[:2] if role == "root" else [simulator.signers["director" if role == "desired" else role]]
    )
    made = [key.sign(message) for key in keys]
    signatures = [{"keyid": signature.keyid, "sig": signature.signature} for signature in made]
    return json.dumps({"signatures": signatures, "signed": value}).encode("utf-8", "surrogatepass")
