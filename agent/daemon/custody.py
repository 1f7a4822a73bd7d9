"""What the custody in force is worth, said as truthfully as this process can know it.

systemd hands a credential over in clear and does not say what it had been sealed to. The sealed file itself does: its
first 16 bytes name the kind of key (systemd's `creds-util.h`). The guide keeps that file where this process may read
it; where it cannot, the answer is `unknown` and never a guess. Not here: the keys (`agent.daemon.keys`).
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from pathlib import Path

SEALED_STORAGE_KEY = Path("/etc/edge-agent/storage.key.cred")
MAX_SEALED_BYTES = 64 * 1024
_ID_BYTES = 16

HOST = "host"
TPM = "tpm2"
HOST_AND_TPM = "host+tpm2"
NOTHING = "null"
UNKNOWN = "unknown"

# kinds of key that systemd-creds seals under; the _PK ones add a signed PCR policy
_KINDS = {
    "5a1c6a86df9d4096b1d5a65e0862f19a": HOST,
    "0c7cc07b117645919c4b0bea08bc20fe": TPM,
    "faf7eb9341e3412ca1a436f95a29362f": TPM,
    "93a894094874449090caf2fc93cab553": HOST_AND_TPM,
    "af4950a849134eb1a73846304ff30c05": HOST_AND_TPM,
    "058469daf6f54324800549da0f8ea2fb": NOTHING,
}
_WORTH = {
    HOST: "sealed to the host key, which lies on the same disk (/var/lib/systemd/credential.secret): a copied SD card "
    "carries its keys with it, models on it can be opened",
    TPM: "sealed to this board's TPM: a copied SD card opens no model; who takes the whole board can",
    HOST_AND_TPM: "sealed to this board's TPM and its host key: a copied SD card opens no model; who takes the whole "
    "board can",
    NOTHING: "sealed to nothing: anybody who reads the file has the keys, models on a copied SD card can be opened",
    UNKNOWN: "what the credentials are sealed to cannot be seen from here; sealed to a TPM a copied SD card opens "
    "nothing, sealed to the host key it opens everything",
}


@dataclass(frozen=True, slots=True)
class Worth:
    """`sealed_to` is one of the kinds above; `text` one line for a person."""

    sealed_to: str
    text: str


FILE = Worth("", "a copied SD card carries its keys with it: models on it can be opened")


def of_credential(sealed: Path = SEALED_STORAGE_KEY) -> Worth:
    """What the sealed file of the storage key was sealed to."""
    kind = _kind(sealed)
    return Worth(kind, _WORTH[kind])


def _kind(sealed: Path) -> str:
    try:
        fd = os.open(sealed, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            data = file.read(MAX_SEALED_BYTES)
    except OSError:
        return UNKNOWN
    try:
        raw = base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error:
        raw = data
    return _KINDS.get(raw[:_ID_BYTES].hex(), UNKNOWN)
