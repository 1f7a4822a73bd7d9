"""Destroying the keys: a cut at any call leaves a device that either still has all of them or will finish the job."""

from __future__ import annotations

import pytest

from ota.client import keyring
from ota.client.fsops import Fs
from ota.client.keyring import Keyring, Ring
from ota.errors import Reason, StoreError
from tests.crash.memory import Durable, File, MemoryDisk, Possibilities

CUSTODY = b"c" * 32
SECRET = b"a secret of enrolment's own, as long as a key of any kind is"
OWN = "keys/storage.key"


def device() -> MemoryDisk:
    """Keys on a disk: a ring, its copy, and a file custody's own."""
    disk = MemoryDisk()
    fs = Fs(disk)
    Keyring(fs, CUSTODY).save(Ring((b"s" * 32,)))
    fs.write_atomic(OWN, SECRET)
    disk.settle()
    return disk


def wiped_with_cuts(lies: Durable | None = None) -> tuple[MemoryDisk, list[MemoryDisk], dict[str, File]]:
    """A device wiped, the disk before each call of the wiping, and the files that were there."""
    disk = device()
    before, moments = dict(disk.files()), []
    disk.synced.clear()
    disk.lies, disk.on_call = lies, lambda: moments.append(disk.snapshot())
    keyring.wipe(Fs(disk))
    disk.on_call = None
    return disk, moments, before


def problems(lies: Durable | None = None) -> list[str]:
    """What is wrong with the wiping, on a disk that `lies`."""
    disk, moments, before = wiped_with_cuts(lies)
    found = [f"the sectors of {path} still hold it" for path, file in before.items() if any(file.durable)]
    for number, moment in enumerate([*moments, disk]):
        possible = Possibilities(moment)
        for picks in possible.picks(4096, number):
            left = possible.disk(picks)
            whole = all(path in dict(left.files()) for path in before)
            try:
                Keyring(Fs(left), CUSTODY)
            except StoreError as e:
                if e.reason is not Reason.KEYS_WIPED:
                    found.append(f"cut {number}: {e.reason}")
                names = [path for path, file in left.files() if any(file.content) and path != keyring.WIPED]
                found += [f"cut {number}: {path} stays" for path in names]
                continue
            content = {path: file.content for path, file in left.files()}
            if moment is disk:
                found.append(f"cut {number}: wiped, and the ring opens")
            elif not whole or content[OWN] != SECRET:
                found.append(f"cut {number}: keys are lost, and nothing says so")
    return found


def test_a_cut_at_every_call_of_wiping_leaves_all_keys_or_finishes_with_none() -> None:
    assert not problems()


def _durable_calls() -> list[Durable]:
    # the mark of a wiped device is a name; what stands in the file says nothing, so that it is synced is no use
    return sorted({*wiped_with_cuts()[0].synced} - {("fsync", keyring.WIPED)})


@pytest.mark.parametrize("lies", _durable_calls(), ids="-".join)
def test_wiping_without_one_of_its_fsyncs_is_noticed(lies: Durable) -> None:
    assert problems(lies), f"nothing fails without {lies}"
