"""Rotation of the storage key: a new key in the ring, then every file sealed anew, one by one.

The ring is saved with the new key in front before any file is touched, and without the old ones after none is left
under them: a cut at any step leaves every file readable with a key of the ring, and calling again goes on from there.
Not here: how one file is sealed anew (`store`), where the ring lies (`keyring`).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from functools import partial

from ota.client import offload
from ota.client.keyring import KEY_BYTES, MAX_STORAGE_KEYS, Keyring, Ring
from ota.client.store import Store
from ota.errors import Reason, StoreError


@dataclass(frozen=True, slots=True)
class Resealed:
    """What a rotation did: files sealed anew, and plaintext hashes of files that no key opens (they are left for the
    next update check, which fetches them again)."""

    files: int
    damaged: tuple[str, ...]


async def rotate_storage(keyring: Keyring, store: Store) -> Resealed:
    """Give the store a new key. The event loop goes on between and during files.

    Raises:
        StoreError: `no_space` when one file's second copy does not fit, `io_error`; what was not done yet is done by
            the next call, or by `finish_rotation`.
    """
    if len(keyring.ring.storage) >= MAX_STORAGE_KEYS:
        await finish_rotation(keyring, store)
    key = secrets.token_bytes(KEY_BYTES)
    await offload.finished(partial(keyring.update, lambda ring: ring.with_storage_key(key)))
    return await finish_rotation(keyring, store)


async def finish_rotation(keyring: Keyring, store: Store) -> Resealed:
    """Seal anew what is still under a retired key, then forget these keys; nothing to do is well.

    Raises:
        StoreError: as `rotate_storage`.
    """
    retired = keyring.ring.storage[1:]
    store.use_keys(keyring.ring.storage)
    if not retired:
        return Resealed(0, ())
    files, damaged = 0, []
    for name in await offload.finished(store.stale):
        try:
            files += await offload.finished(partial(store.reseal, name))
        except StoreError as e:
            if e.reason is not Reason.PAYLOAD_CORRUPT:
                raise
            damaged.append(name)

    def forget(ring: Ring) -> Ring:
        return replace(ring, storage=tuple(key for key in ring.storage if key not in retired))

    await offload.finished(partial(keyring.update, forget))
    store.use_keys(keyring.ring.storage)
    return Resealed(files, tuple(damaged))
