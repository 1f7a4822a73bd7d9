"""Every bound of the updater, by name and unit. Values are for a small board on a mobile link."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from ota import BUILT


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of metadata, transfer, disk and trials.

    Attributes:
        window_blocks: outstanding blocks at most, each of 64 KiB at most; `ota.client.window` chooses within.
        block_timeout_s: longest silence after which a block is asked for again; shorter ones are learnt.
        block_attempts: how often one block is asked for before the transfer gives up.
        bad_blocks: refused, duplicate or unasked blocks after which a source is no longer listened to.
        retry_base_s, retry_cap_s: full-jitter back-off before a block is asked for again.
        stall_s: the transfer gives up when the slowest accepted rate was missed for so long.
        min_bytes_per_s: slowest accepted rate, over `stall_s`.
        flush_blocks: leaves of 64 KiB after which part and bitmap are made durable against a power cut.
        flush_s: as `flush_blocks`, on a slow link.
        reserve_bytes: disk kept free for state and metadata.
        trial_attempts: trials of one release that may end without an answer before it is quarantined.
        root_rotations: roots walked in one check.
        metadata_timeout_s: longest wait for one document.
        recheck_s: age of the signed assignment after which it is asked for again before a fetched release is tried.
        verifying_timeout_s: longest decryption and decoding of one file, in whatever process.
        staging_timeout_s: longest sealing of one file into the store.
        testing_timeout_s: longest self-test of one candidate, its compilation included.
        activating_timeout_s: longest wait until the candidate serves.
        probation_timeout_s: longest probation, however few frames come; the host's own limits are shorter.
        revert_timeout_s: longest wait until the committed release serves again.
        cancel_timeout_s: longest wait for the end of an update that was cancelled.
        update_timeout_s: longest update of one line, whatever it does.
        lock_wait_s: longest wait for an accelerator, for a line, or for disk that another line reserved.
        lock_timeout_s: longest time that one update keeps an accelerator; covers self-test and activation.
        disk_timeout_s: longest time that one update keeps disk reserved, from admission to staged.
        delegations: delegated roles visited in search of one target.
        built: day on which this software was made: it is certainly not earlier, whatever the clock says.
        clock_ceiling: signed dates after it do not move the clock floor (a poisoned floor cannot be lowered).
    """

    window_blocks: int = 8
    block_timeout_s: float = 20.0
    block_attempts: int = 8
    bad_blocks: int = 64
    retry_base_s: float = 0.5
    retry_cap_s: float = 30.0
    stall_s: float = 300.0
    min_bytes_per_s: float = 256.0
    flush_blocks: int = 64
    flush_s: float = 30.0
    reserve_bytes: int = 16 << 20
    trial_attempts: int = 3
    root_rotations: int = 256
    metadata_timeout_s: float = 60.0
    recheck_s: float = 60.0
    verifying_timeout_s: float = 900.0
    staging_timeout_s: float = 900.0
    testing_timeout_s: float = 3600.0
    activating_timeout_s: float = 300.0
    probation_timeout_s: float = 86_400.0
    revert_timeout_s: float = 300.0
    cancel_timeout_s: float = 60.0
    update_timeout_s: float = 8 * 86_400.0
    lock_wait_s: float = 900.0
    lock_timeout_s: float = 4000.0
    disk_timeout_s: float = 7 * 86_400.0
    root_max_bytes: int = 64 << 10
    timestamp_max_bytes: int = 16 << 10
    snapshot_max_bytes: int = 1 << 20
    targets_max_bytes: int = 1 << 20
    desired_max_bytes: int = 256 << 10
    delegations: int = 32
    built: datetime.datetime = BUILT
    clock_ceiling: datetime.datetime = datetime.datetime(2045, 1, 1, tzinfo=datetime.UTC)
