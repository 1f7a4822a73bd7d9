"""Blocks: what is asked for, what is believed, and how little is lost when the device is cut off at any moment."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota import payload
from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.transfer import Counts, Transfer, Verdict, claimed
from ota.errors import OtaError, Reason, TransferError
from ota.release import LEAF_BYTES, Payload
from tests.ota.client.conftest import DEVICE, FAST, QuickDisk, run
from tests.ota.client.simulator import SimulatedTransport, Simulator, sha256

WINDOW_BYTES = FAST.window_blocks * LEAF_BYTES


def _payload(data: bytes) -> Payload:
    return Payload(sha256(data), len(data), "raw", "cobblestone-256", "0" * 32, payload.leaves(data))


class Scene:
    """A payload at a source and an inbox on a disk."""

    def __init__(self, root: Path, blocks: int, limits: Limits = FAST) -> None:
        self.root = root
        self.data = random.Random(blocks).randbytes(blocks * LEAF_BYTES - 1000)
        self.payload = _payload(self.data)
        self.limits = limits
        repository = Simulator()
        repository.payloads[self.payload.sha256] = self.data
        self.source = SimulatedTransport(repository, DEVICE)
        self.counts = Counts()

    def fetch(self, cut_after: int | None = None) -> None:
        """One process's attempt."""
        self.source.cut_after = cut_after
        self.counts = Counts()
        run(
            Inbox(Fs(QuickDisk(self.root)), self.limits, random.Random(0)).fetch(
                self.payload, [self.source], self.counts
            )
        )

    @property
    def fetched(self) -> bytes:
        return (self.root / "inbox" / f"{self.payload.sha256}.part").read_bytes()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, 10)


def test_a_payload_is_fetched_in_a_window_of_blocks_and_nothing_twice(scene: Scene) -> None:
    scene.fetch()
    assert scene.fetched == scene.data
    assert scene.source.most_outstanding == FAST.window_blocks
    assert scene.source.sent_bytes == len(scene.data) == scene.counts.fetched_bytes
    assert (scene.counts.refetched_bytes, scene.counts.duplicate_bytes) == (0, 0)


@pytest.mark.parametrize("cut", range(10))
def test_a_connection_cut_at_any_block_costs_at_most_one_window(tmp_path: Path, cut: int) -> None:
    scene = Scene(tmp_path, 10)
    with pytest.raises(TransferError) as failure:
        scene.fetch(cut_after=cut)
    assert failure.value.reason is Reason.SOURCE_UNREACHABLE
    scene.fetch()
    assert scene.fetched == scene.data
    assert scene.source.sent_bytes <= len(scene.data) + WINDOW_BYTES


@pytest.mark.parametrize("seed", range(12))
def test_a_process_killed_at_any_moment_refetches_at_most_one_window(tmp_path: Path, seed: int) -> None:
    """Killed: nothing after the moment runs, not even the driver's last flush."""
    scene = Scene(tmp_path, 10)
    left = random.Random(seed).randrange(1, 60)

    class Killed(BaseException):
        pass

    class Mortal(QuickDisk):
        def _live(self) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        def write(self, path: str, offset: int, data: bytes) -> None:
            self._live()
            super().write(path, offset, data)

        def fsync(self, path: str) -> None:
            self._live()

        def fsync_dir(self, path: str) -> None:
            self._live()

    try:
        run(Inbox(Fs(Mortal(tmp_path)), scene.limits, random.Random(0)).fetch(scene.payload, [scene.source], Counts()))
    except Killed:
        pass
    scene.fetch()
    assert scene.fetched == scene.data
    assert scene.source.sent_bytes <= len(scene.data) + WINDOW_BYTES


def test_a_cancelled_transfer_resumes(scene: Scene) -> None:
    async def scenario() -> None:
        inbox = Inbox(Fs(QuickDisk(scene.root)), FAST, random.Random(0))
        task = asyncio.create_task(inbox.fetch(scene.payload, [scene.source], Counts()))
        while len(scene.source.asked) < 7:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())
    scene.fetch()
    assert scene.fetched == scene.data
    assert scene.counts.resumed_bytes > 0
    assert scene.source.sent_bytes <= len(scene.data) + WINDOW_BYTES


@pytest.mark.fault("F28")
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "long"])
def test_a_damaged_bitmap_is_discarded_and_every_block_proves_itself(scene: Scene, damage: str) -> None:
    with pytest.raises(TransferError):
        scene.fetch(cut_after=5)
    path = scene.root / "inbox" / f"{scene.payload.sha256}.map"
    data = path.read_bytes()
    assert claimed(scene.payload, data)
    damaged = {
        "flip": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[:-1],
        "empty": b"",
        "other": Transfer(_payload(b"x" * len(scene.data)), FAST, 0).bitmap(),
        "long": data + b"\xff" * 5000,
    }[damage]
    path.write_bytes(damaged)
    assert claimed(scene.payload, damaged) is None
    scene.fetch()
    assert scene.fetched == scene.data
    assert scene.counts.resumed_bytes == 5 * LEAF_BYTES


@pytest.mark.parametrize("damage", ["zeros", "cut", "gone", "longer"])
def test_blocks_on_disk_are_hashed_again_not_trusted(scene: Scene, damage: str) -> None:
    with pytest.raises(TransferError):
        scene.fetch(cut_after=6)
    path = scene.root / "inbox" / f"{scene.payload.sha256}.part"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        zeroed = data[:LEAF_BYTES] + bytes(LEAF_BYTES) + data[2 * LEAF_BYTES :]
        path.write_bytes({"zeros": zeroed, "cut": data[:LEAF_BYTES], "longer": data + bytes(len(scene.data))}[damage])
    scene.fetch()
    assert scene.fetched == scene.data
    if damage == "zeros":
        assert scene.counts.refetched_bytes == LEAF_BYTES


@pytest.mark.fault("F17")
def test_a_flipped_bit_costs_one_block(scene: Scene) -> None:
    def flip_once(digest: str, offset: int, data: bytes) -> bytes:
        if offset == 3 * LEAF_BYTES and scene.source.asked.count((digest, offset)) == 1:
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    scene.source.on_block = flip_once
    scene.fetch()
    assert scene.fetched == scene.data
    assert scene.counts.refetched_bytes == LEAF_BYTES
    assert len(scene.source.asked) == 11


@pytest.mark.fault("F16")
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"", lambda data: data[: len(data) // 2]])
def test_a_block_that_is_always_short_ends_the_transfer_after_bounded_retries(scene: Scene, change) -> None:  # type: ignore[no-untyped-def]
    scene.source.on_block = lambda digest, offset, data: change(data) if offset == 0 else data
    with pytest.raises(TransferError) as failure:
        scene.fetch()
    assert failure.value.reason is Reason.TRANSFER_CORRUPT
    assert scene.source.asked.count((scene.payload.sha256, 0)) == FAST.block_attempts


def test_a_source_that_sends_nothing_but_rubbish_is_dropped(scene: Scene) -> None:
    scene.source.on_block = lambda digest, offset, data: b"rubbish"
    with pytest.raises(TransferError) as failure:
        scene.fetch()
    assert failure.value.reason is Reason.TRANSFER_CORRUPT
    assert len(scene.source.asked) <= FAST.window_blocks * FAST.block_attempts


@pytest.mark.fault("F26")
def test_a_file_replaced_at_the_source_ends_the_transfer(scene: Scene) -> None:
    scene.source.repository.payloads[scene.payload.sha256] = bytes(len(scene.data))
    with pytest.raises(TransferError) as failure:
        scene.fetch()
    assert failure.value.reason is Reason.TRANSFER_CORRUPT


def test_silence_is_asked_again_and_then_reported_as_a_time_out(tmp_path: Path) -> None:
    scene = Scene(tmp_path, 3)
    scene.source.silent = frozenset({"block"})
    scene.limits = Limits(block_timeout_s=0.01, retry_base_s=0.001, block_attempts=3)
    with pytest.raises(TransferError) as failure:
        scene.fetch()
    assert failure.value.reason is Reason.TRANSFER_TIMEOUT
    assert failure.value.retry


def test_a_payload_that_is_not_there_is_not_asked_for_twice(scene: Scene) -> None:
    scene.source.repository.payloads.clear()
    with pytest.raises(TransferError) as failure:
        scene.fetch()
    assert failure.value.reason is Reason.NOT_FOUND
    assert len(scene.source.asked) <= FAST.window_blocks


# -- the core alone ----------------------------------------------------------------------------------------------------


def _core(blocks: int = 6, limits: Limits = FAST) -> tuple[bytes, Transfer]:
    data = random.Random(1).randbytes(blocks * LEAF_BYTES - 7)
    return data, Transfer(_payload(data), limits, 0.0)


@pytest.mark.fault("F18")
@pytest.mark.parametrize("offset", [-LEAF_BYTES, -1, 1, LEAF_BYTES - 1, 6 * LEAF_BYTES, 1 << 63, 1 << 200])
def test_blocks_at_impossible_offsets_are_ignored_and_counted(offset: int) -> None:
    data, transfer = _core()
    list(transfer.requests())
    assert transfer.received(offset, data[:LEAF_BYTES]) is Verdict.UNASKED
    assert transfer.counts.duplicate_bytes == LEAF_BYTES
    assert transfer.counts.fetched_bytes == 0


def test_a_duplicate_block_is_counted_and_not_written(scene: Scene) -> None:
    data, transfer = _core()
    list(transfer.requests())
    assert transfer.received(0, data[:LEAF_BYTES]) is Verdict.ACCEPTED
    assert transfer.received(0, data[:LEAF_BYTES]) is Verdict.DUPLICATE
    assert transfer.counts.duplicate_bytes == LEAF_BYTES


@pytest.mark.fault("F21")
def test_a_block_nobody_asked_for_is_dropped(scene: Scene) -> None:
    data, transfer = _core()
    list(transfer.requests())
    assert transfer.received(5 * LEAF_BYTES, data[5 * LEAF_BYTES :]) is Verdict.UNASKED


def test_an_oversize_block_is_refused() -> None:
    data, transfer = _core()
    list(transfer.requests())
    assert transfer.received(0, data) is Verdict.WRONG_LENGTH


def test_endless_unasked_blocks_end_the_transfer() -> None:
    data, transfer = _core()
    list(transfer.requests())
    transfer.received(0, data[:LEAF_BYTES])
    for _ in range(FAST.bad_blocks):
        assert transfer.received(0, data[:LEAF_BYTES]) is Verdict.DUPLICATE
    with pytest.raises(TransferError) as failure:
        transfer.received(0, data[:LEAF_BYTES])
    assert failure.value.reason is Reason.TRANSFER_CORRUPT


def test_a_trickle_is_given_up() -> None:
    data, transfer = _core(limits=Limits(stall_s=100, min_bytes_per_s=1000))
    list(transfer.requests())
    transfer.check_rate(99)
    transfer.received(0, data[:LEAF_BYTES])
    with pytest.raises(TransferError) as failure:
        transfer.check_rate(100)
    assert failure.value.reason is Reason.TRANSFER_TIMEOUT


def test_a_slow_but_steady_source_is_not_given_up() -> None:
    data, transfer = _core(limits=Limits(stall_s=100, min_bytes_per_s=600))
    for second in (0, 100, 200, 300):
        for block in transfer.requests():
            transfer.received(block.offset, data[block.offset : block.offset + block.length])
            break
        transfer.check_rate(second)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_order_with_losses_duplicates_and_rubbish_ends_complete_within_the_window(data: st.DataObject) -> None:
    """A network that loses, repeats, reorders and corrupts; the core stays within its window and its counts add up."""
    plain, transfer = _core(5, Limits(block_attempts=1000, bad_blocks=1000))
    written: dict[int, bytes] = {}
    in_flight: list[int] = []
    sent = 0
    for _ in range(400):
        if transfer.complete:
            break
        in_flight += [block.index for block in transfer.requests()]
        assert len(set(in_flight)) <= 4
        index = data.draw(st.sampled_from(in_flight))
        good = plain[index * LEAF_BYTES : (index + 1) * LEAF_BYTES]
        action = data.draw(st.sampled_from(["deliver", "deliver", "lose", "corrupt", "repeat"]))
        if action == "lose":
            in_flight.remove(index)
            transfer.again(index, Reason.TRANSFER_TIMEOUT)
            continue
        chunk = bytes(len(good)) if action == "corrupt" else good
        sent += len(chunk)
        verdict = transfer.received(index * LEAF_BYTES, chunk)
        in_flight.remove(index)
        if verdict is Verdict.ACCEPTED:
            assert index not in written
            written[index] = chunk
        if action == "repeat":
            sent += len(good)
            assert transfer.received(index * LEAF_BYTES, good) is Verdict.DUPLICATE
        counts = transfer.counts
        assert counts.fetched_bytes + counts.refetched_bytes + counts.duplicate_bytes == sent
    if transfer.complete:
        assert b"".join(written[index] for index in range(5)) == plain
        assert transfer.missing_bytes == 0


def test_no_transport_is_an_error_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(OtaError) as failure:
        run(Inbox(Fs(tmp_path), FAST, random.Random(0)).fetch(_payload(b"x"), [], Counts()))
    assert failure.value.reason is Reason.SOURCE_UNREACHABLE
