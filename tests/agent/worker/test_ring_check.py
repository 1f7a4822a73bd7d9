"""A sample of `make ring`, and that it would see a ring that breaks its word."""

from __future__ import annotations

import os
import threading

from agent import protocol
from agent.worker.ring import RingWriter
from tests.bench.ringcheck import FRAME_BYTES, READERS, Numbered, Tally, check, read

FRAMES = 20_000


def test_two_readers_on_other_cores_get_every_frame_once_whole_and_in_order():
    tallies = check(FRAMES)
    assert [(t.frames, t.wrong, t.unordered) for t in tallies] == [(FRAMES, 0, 0)] * READERS


def test_frames_that_are_torn_stale_or_out_of_order_are_counted():
    ours, theirs = protocol.socket_pair()
    notices, readers_end = protocol.socket_pair()
    writer = RingWriter(2, Numbered.dtype, Numbered.shape)
    seen: list[Tally] = []
    core = min(os.sched_getaffinity(0))
    reading = threading.Thread(target=lambda: seen.append(read(theirs.detach(), 4, core)))
    reading.start()
    geometry = protocol.AttachRing(Numbered.dtype, list(Numbered.shape), 2, writer.slot_bytes)
    protocol.send(ours, geometry, (writer.fd, readers_end.fileno()))
    readers_end.close()
    source = Numbered(4)
    for seq, slot in ((0, 0), (1, 1), (2, 0), (4, 1)):  # what the last one announces was never written
        assert notices.recv(protocol.CREDIT.size)
        if seq < 4:
            source.read_into(writer.frames[slot])
        if seq == 1:
            writer.frames[slot][FRAME_BYTES // 2] ^= 1
        notices.send(protocol.NOTICE.pack(seq, 0, slot, 0))
    reading.join(60)
    notices.close()
    ours.close()
    writer.close_fd()
    (tally,) = seen
    assert (tally.frames, tally.wrong, tally.unordered) == (4, 2, 1)
