"""Every bound of the updater, by name and unit. Values are for a small board on a mobile link."""

from __future__ import annotations

import datetime
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of metadata, transfer, disk and trials.

    Attributes:
        window_blocks: outstanding blocks of 64 KiB; window × block ≥ 2 × bandwidth × delay fills a link.
        block_timeout_s: silence after which a block is asked for again.
        block_attempts: how often one block is asked for before the transfer gives up.
        bad_blocks: refused, duplicate or unasked blocks after which a source is no longer listened to.
        retry_base_s, retry_cap_s: full-jitter back-off before a block is asked for again.
        stall_s: the transfer gives up when the slowest accepted rate was missed for so long.
        min_bytes_per_s: slowest accepted rate, over `stall_s`.
        flush_blocks: blocks after which part and bitmap are made durable against a power cut.
        reserve_bytes: disk kept free for state and metadata.
        trial_attempts: trials of one release that may end without an answer before it is quarantined.
        root_rotations: roots walked in one check.
        metadata_timeout_s: longest wait for one document.
        clock_ceiling: signed dates after it do not move the clock floor (a poisoned floor cannot be lowered).
    """

    window_blocks: int = 4
    block_timeout_s: float = 20.0
    block_attempts: int = 6
    bad_blocks: int = 64
    retry_base_s: float = 0.5
    retry_cap_s: float = 30.0
    stall_s: float = 300.0
    min_bytes_per_s: float = 256.0
    flush_blocks: int = 16
    reserve_bytes: int = 16 << 20
    trial_attempts: int = 3
    root_rotations: int = 256
    metadata_timeout_s: float = 60.0
    root_max_bytes: int = 64 << 10
    timestamp_max_bytes: int = 16 << 10
    snapshot_max_bytes: int = 1 << 20
    targets_max_bytes: int = 1 << 20
    desired_max_bytes: int = 256 << 10
    clock_ceiling: datetime.datetime = datetime.datetime(2045, 1, 1, tzinfo=datetime.UTC)
