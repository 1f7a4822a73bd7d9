"""The ring: one writer, readers that cannot write, sizes that cannot lie."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from agent import memfd
from agent.errors import AgentError, Reason
from agent.worker import ring


@pytest.fixture
def writer():
    writer = ring.RingWriter(4, "uint8", (30, 40, 3))
    yield writer
    writer.close_fd()


def open_reader(writer, **changes):
    geometry = {"slots": 4, "slot_length": writer.slot_bytes, "dtype": "uint8", "shape": (30, 40, 3)}
    return ring.map_ring(writer.fd, **{**geometry, **changes})


def test_readers_see_what_the_writer_writes_without_a_copy(writer):
    frames = open_reader(writer)
    writer.frames[2][:] = 77
    assert frames[2].shape == (30, 40, 3)
    assert (frames[2] == 77).all()
    assert not frames[1].any()


def test_a_reader_cannot_write_through_its_view(writer):
    frame = open_reader(writer)[0]
    assert not frame.flags.writeable
    with pytest.raises(ValueError):
        frame.flags.writeable = True


def test_nobody_can_map_the_ring_writable_any_more(writer):
    with pytest.raises(PermissionError):
        mmap.mmap(writer.fd, writer.slot_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(writer.fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(writer.fd, 0)


def test_the_writer_itself_still_writes_after_the_seal(writer):
    writer.frames[0][:] = np.arange(40, dtype=np.uint8)[None, :, None]
    assert open_reader(writer)[0][5, 39, 1] == 39


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 5},
        {"slots": 3},
        {"shape": (35, 40, 3)},
        {"shape": (30, 0, 3)},
        {"slot_length": 10},
        {"dtype": "object"},
    ],
)
def test_a_geometry_the_memfd_does_not_have_is_refused(writer, changes):
    with pytest.raises(AgentError) as caught:
        open_reader(writer, **changes)
    assert caught.value.reason is Reason.BAD_MESSAGE


def test_a_memfd_that_could_shrink_under_a_reader_is_refused(writer):
    fd = memfd.create("loose", 4 * writer.slot_bytes)
    with pytest.raises(AgentError):
        ring.map_ring(fd, 4, writer.slot_bytes, "uint8", (30, 40, 3))
    os.close(fd)


def test_a_ring_beyond_the_limit_is_refused_before_it_is_made():
    with pytest.raises(AgentError) as caught:
        ring.RingWriter(64, "uint8", (4320, 7680, 3))
    assert "queue_frames" in caught.value.hint
