"""Blocks: what is asked for, what is believed, and how little is lost when the device is cut off at any moment."""

from __future__ import annotations

import asyncio
import collections
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota import payload
from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.transfer import Block, Counts, Transfer, Verdict, claimed
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
    assert 2 <= scene.source.most_outstanding <= FAST.window_blocks
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
        scene.fetch(cut_after=9)
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
    kept = len(claimed(scene.payload, data) or ()) * LEAF_BYTES
    scene.fetch()
    assert scene.fetched == scene.data
    assert scene.counts.resumed_bytes == kept > 0


@pytest.mark.parametrize("damage", ["zeros", "cut", "gone", "longer"])
def test_blocks_on_disk_are_hashed_again_not_trusted(scene: Scene, damage: str) -> None:
    with pytest.raises(TransferError):
        scene.fetch(cut_after=9)
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
def test_a_flipped_bit_costs_one_leaf(scene: Scene) -> None:
    flipped: list[int] = []

    def flip_once(digest: str, offset: int, data: bytes) -> bytes:
        if offset == 3 * LEAF_BYTES and not flipped:
            flipped.append(len(data))
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    scene.source.on_block = flip_once
    scene.fetch()
    assert scene.fetched == scene.data
    assert flipped
    assert scene.source.sent_bytes == len(scene.data) + LEAF_BYTES
    assert scene.counts.fetched_bytes + scene.counts.refetched_bytes == scene.source.sent_bytes
    assert scene.counts.refetched_bytes == LEAF_BYTES


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
def test_a_file_replaced_at_the_source_ends_the_transfer_and_what_came_before_stays_right(scene: Scene) -> None:
    def replaced(digest: str, offset: int, data: bytes) -> bytes:
        return data if offset < 4 * LEAF_BYTES else bytes(len(data))

    scene.source.on_block = replaced
    with pytest.raises(TransferError) as failure:
        scene.fetch()
    assert failure.value.reason is Reason.TRANSFER_CORRUPT
    assert claimed(scene.payload, (scene.root / "inbox" / f"{scene.payload.sha256}.map").read_bytes()) == [0, 1, 2, 3]
    scene.source.on_block = None
    scene.fetch()
    assert scene.fetched == scene.data


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


@pytest.mark.parametrize(
    "reason", [Reason.UNSUPPORTED, Reason.NOT_FOUND, Reason.SERVER_REFUSED, Reason.BLOCK_TOO_LARGE], ids=str
)
def test_what_one_source_will_not_give_another_is_asked_for(scene: Scene, reason: Reason) -> None:
    def refuse(digest: str, offset: int, data: bytes) -> bytes:
        raise TransferError(reason, "not from here")

    repository = Simulator()
    repository.payloads[scene.payload.sha256] = scene.data
    first = SimulatedTransport(repository, DEVICE)
    first.on_block = refuse
    inbox = Inbox(Fs(QuickDisk(scene.root)), FAST, random.Random(0))
    run(inbox.fetch(scene.payload, [first, scene.source], scene.counts))
    assert scene.fetched == scene.data


def test_no_transport_is_an_error_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(OtaError) as failure:
        run(Inbox(Fs(tmp_path), FAST, random.Random(0)).fetch(_payload(b"x"), [], Counts()))
    assert failure.value.reason is Reason.SOURCE_UNREACHABLE


# -- the core alone ----------------------------------------------------------------------------------------------------


class Core:
    """A transfer and the bytes it is about."""

    def __init__(self, leaves: int = 6, limits: Limits = FAST) -> None:
        self.data = random.Random(1).randbytes(leaves * LEAF_BYTES - 7)
        self.transfer = Transfer(_payload(self.data), limits, 0.0)
        self.written: dict[int, bytes] = {}

    def ask(self, now_s: float = 0.0) -> list[Block]:
        """Everything the window allows."""
        return list(iter(lambda: self.transfer.next(now_s), None))

    def bytes_of(self, block: Block) -> bytes:
        return self.data[block.offset : block.offset + block.length]

    def answer(self, block: Block, now_s: float = 0.01, data: bytes | None = None) -> Verdict:
        """Deliver a block, and keep the leaf it completes."""
        arrival = self.transfer.received(block.offset, self.bytes_of(block) if data is None else data, now_s)
        self.transfer.failed(block, Reason.TRANSFER_CORRUPT)  # as the driver does: there is one answer to a request
        if arrival.verdict is Verdict.ACCEPTED:
            assert arrival.offset not in self.written, "a leaf is accepted once"
            self.written[arrival.offset] = arrival.leaf
        return arrival.verdict

    @property
    def whole(self) -> bytes:
        return b"".join(self.written[offset] for offset in sorted(self.written))


def test_a_leaf_comes_in_blocks_and_is_handed_out_whole_once_its_hash_is_right() -> None:
    core = Core()
    verdicts: list[Verdict] = []
    while not verdicts or verdicts[-1] is Verdict.KEPT:
        block = core.transfer.next(0.0)
        assert block is not None
        assert block.length == 16384
        assert not core.written
        verdicts.append(core.answer(block, 0.0))  # no time passes: nothing is learnt, the size stays
    assert verdicts == [Verdict.KEPT] * 3 + [Verdict.ACCEPTED]
    assert core.written == {0: core.data[:LEAF_BYTES]}


def test_a_lost_block_is_asked_for_again_alone_and_the_rest_of_its_leaf_stays() -> None:
    core = Core(1)
    first, second = core.ask()
    core.transfer.late(first, 5.0)
    assert core.answer(second) is Verdict.KEPT
    asked = []
    while not core.transfer.complete:
        for block in core.ask(6.0):
            asked.append(block)
            core.answer(block, 6.0)
    assert sum(block.length for block in asked) == len(core.data) - second.length
    assert [block.attempt for block in asked if block.offset < first.length] == [2] * (first.length // 8192)
    assert core.transfer.counts.lost_blocks == 1
    assert core.whole == core.data


def test_a_block_given_up_as_late_is_welcome_and_its_repetition_a_duplicate_and_no_offence() -> None:
    core = Core()
    first, second = core.ask()
    core.transfer.late(first, 5.0)
    core.answer(second, 5.0)
    again = core.ask(5.0)
    assert core.answer(first, 6.0) is Verdict.KEPT
    assert {core.answer(block, 6.0) for block in again if block.offset < first.length} == {Verdict.DUPLICATE}
    assert core.transfer.counts.refused_blocks == 0


def test_a_way_on_which_every_answer_is_late_but_right_is_no_offender() -> None:
    core = Core(4 * FAST.bad_blocks)
    now_s = 0.0
    while not core.transfer.complete:
        asked = core.ask(now_s)
        for block in asked:
            core.transfer.late(block, now_s + 5)
        again = core.ask(now_s + 5)
        now_s += 6
        for block in (*asked, *again):  # first what was given up, then what was asked instead of it
            core.answer(block, now_s)
    assert core.transfer.counts.duplicate_bytes > 2 * FAST.bad_blocks * 4096
    assert core.transfer.counts.refused_blocks == 0
    assert core.whole == core.data


def test_a_spoilt_leaf_comes_again_whole_and_is_right_then() -> None:
    core = Core(1)
    while core.transfer.counts.refused_blocks == 0:
        for block in core.ask():
            core.answer(block, data=bytes(block.length) if block.offset == 0 else None)
    assert not core.written
    while not core.transfer.complete:
        for block in core.ask():
            core.answer(block)
    assert core.whole == core.data
    counts = core.transfer.counts
    assert (counts.fetched_bytes, counts.refetched_bytes) == (len(core.data), len(core.data))


@pytest.mark.fault("F18")
@pytest.mark.parametrize("offset", [-LEAF_BYTES, -1, 1, LEAF_BYTES - 1, 6 * LEAF_BYTES, 1 << 63, 1 << 200])
def test_blocks_at_impossible_offsets_are_ignored_and_counted(offset: int) -> None:
    core = Core()
    core.ask()
    assert core.transfer.received(offset, core.data[:16384], 0.0).verdict is Verdict.UNASKED
    counts = core.transfer.counts
    assert (counts.duplicate_bytes, counts.fetched_bytes, counts.refused_blocks) == (16384, 0, 1)


@pytest.mark.fault("F18")
@pytest.mark.parametrize("offset", [4096, 12288, 20480, LEAF_BYTES - 4096])
def test_blocks_that_overlap_what_was_asked_for_are_ignored(offset: int) -> None:
    core = Core()
    core.ask()
    assert core.transfer.received(offset, core.data[offset : offset + 16384], 0.0).verdict is Verdict.UNASKED
    assert core.transfer.counts.fetched_bytes == 0


@pytest.mark.fault("F19")
def test_a_duplicate_block_is_counted_and_not_kept_twice() -> None:
    core = Core()
    blocks = core.ask()
    assert core.answer(blocks[0]) is Verdict.KEPT
    assert core.answer(blocks[0], data=bytes(blocks[0].length)) is Verdict.DUPLICATE
    assert core.transfer.counts.duplicate_bytes == blocks[0].length
    while not core.transfer.complete:
        for block in blocks:
            core.answer(block)
        blocks = core.ask()
    assert core.whole == core.data


@pytest.mark.fault("F20")
def test_blocks_in_any_order_make_the_same_payload() -> None:
    core = Core()
    waiting: list[Block] = []
    rng = random.Random(3)
    while not core.transfer.complete:
        waiting += core.ask()
        core.answer(waiting.pop(rng.randrange(len(waiting))))
    assert core.whole == core.data


@pytest.mark.fault("F21")
def test_a_block_nobody_asked_for_is_dropped() -> None:
    core = Core()
    core.ask()
    assert core.transfer.received(5 * LEAF_BYTES, core.data[5 * LEAF_BYTES :], 0.0).verdict is Verdict.UNASKED


@pytest.mark.fault("F22")
def test_more_bytes_than_asked_for_are_refused_and_the_block_asked_for_again() -> None:
    core = Core()
    first = core.ask()[0]
    assert core.answer(first, data=core.data[:LEAF_BYTES]) is Verdict.WRONG_LENGTH
    assert core.transfer.counts.fetched_bytes == 0
    assert core.ask()[0].offset == first.offset


@pytest.mark.fault("F23")
def test_endless_unasked_blocks_end_the_transfer() -> None:
    core = Core()
    first = core.ask()[0]
    core.answer(first)
    for _ in range(FAST.bad_blocks):
        assert core.answer(first) is Verdict.DUPLICATE
    with pytest.raises(TransferError) as failure:
        core.answer(first)
    assert failure.value.reason is Reason.TRANSFER_CORRUPT


@pytest.mark.fault("F24")
def test_one_block_in_59_seconds_is_given_up() -> None:
    core = Core(8, Limits(window_blocks=1, block_attempts=100))

    def one_block(number: int) -> None:
        now_s = 59.0 * number
        for block in core.ask(now_s - 59.0):
            core.answer(block, now_s)
        core.transfer.window.lost(4096, now_s, now_s)  # nothing larger gets through
        core.transfer.check_rate(now_s)

    with pytest.raises(TransferError) as failure:
        collections.deque(map(one_block, range(1, 100)), maxlen=0)
    assert failure.value.reason is Reason.TRANSFER_TIMEOUT
    assert failure.value.retry


def test_a_slow_but_steady_source_is_not_given_up() -> None:
    core = Core(limits=Limits(stall_s=100, min_bytes_per_s=600))
    second = 0.0
    waiting: list[Block] = []
    while not core.transfer.complete:
        waiting += core.ask(second)
        block = waiting.pop(0)
        second += 0.001 * block.length
        core.answer(block, second)
        core.transfer.check_rate(second)
    assert second > 300


def test_time_in_which_nobody_was_asked_does_not_count_against_the_source() -> None:
    core = Core(limits=Limits(stall_s=100, min_bytes_per_s=1000))
    core.transfer.paused(950.0)
    core.transfer.check_rate(1000.0)
    with pytest.raises(TransferError):
        core.transfer.check_rate(1100.0)


def test_a_source_whose_broker_carries_less_is_asked_for_less_at_once() -> None:
    core = Core()
    for block in core.ask():
        core.transfer.too_large(block, 10_000)
    asked = core.ask()
    assert {block.length for block in asked} == {8192}
    with pytest.raises(TransferError) as failure:
        core.transfer.too_large(asked[0], 4095)
    assert failure.value.reason is Reason.BLOCK_TOO_LARGE


def test_another_source_goes_on_with_what_the_first_one_brought() -> None:
    core = Core(1)
    first, second = core.ask()
    core.answer(first)
    core.transfer.release(1.0)
    asked: list[Block] = []
    while not core.transfer.complete:
        for block in core.ask(1.0):
            asked.append(block)
            core.answer(block, 1.1)
    assert sum(block.length for block in asked) == len(core.data) - first.length
    assert core.whole == core.data
    assert second.offset in {block.offset for block in asked}


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_order_with_losses_duplicates_and_rubbish_ends_complete_within_the_window(data: st.DataObject) -> None:
    """A network that loses, delays, repeats, reorders, cuts and corrupts; the core stays within its window, its buffers
    stay few, and its counts add up."""
    core = Core(4, Limits(block_attempts=10_000, bad_blocks=10_000))
    transfer = core.transfer
    waiting: list[Block] = []
    late: list[Block] = []
    now_s, sent = 0.0, 0
    actions = st.sampled_from(["deliver"] * 5 + ["lose", "late", "corrupt", "cut", "halve", "repeat", "overtaken"])
    for _ in range(1500):
        if transfer.complete:
            break
        now_s += data.draw(st.sampled_from([0.001, 0.01, 1.0]))
        waiting += core.ask(now_s)
        assert len(waiting) <= 8
        assert len(transfer._making) <= 8
        assert waiting, "while something is missing, something is asked for"
        block = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        good = core.bytes_of(block)
        match data.draw(actions):
            case "lose":
                transfer.late(block, now_s)
                continue
            case "late":
                transfer.late(block, now_s)
                late.append(block)
                continue
            case "corrupt":
                answers = [(block, bytes(len(good)))]
            case "cut":
                answers = [(block, good[:-1])]
            case "halve":
                answers = [(block, good[: max(4096, len(good) // 2 // 4096 * 4096)])]
            case "repeat":
                answers = [(block, good)] * 2
            case "overtaken" if late:
                answers = [(late.pop(), None), (block, good)]
            case _:
                answers = [(block, good)]
        for one, answer in answers:
            answer = core.bytes_of(one) if answer is None else answer
            sent += len(answer)
            core.answer(one, now_s, answer)
        counts = transfer.counts
        assert counts.fetched_bytes + counts.refetched_bytes + counts.duplicate_bytes == sent
        # an answer may have made others of its leaf pointless, or wanted again
        waiting = [one for one in waiting if (one.offset, one.length) in transfer._outstanding]
    if transfer.complete:
        assert core.whole == core.data
        assert transfer.missing_bytes == 0
