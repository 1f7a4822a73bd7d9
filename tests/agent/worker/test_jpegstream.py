"""Pictures found in a stream of bytes, however it is cut and whatever lies between them."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import Reason, SourceError
from agent.worker.sources.jpegstream import JpegStream


def jpeg(number: int, *options: int) -> bytes:
    picture = np.random.default_rng(number).integers(0, 255, (24 + number, 32, 3), np.uint8)
    return cv2.imencode(".jpg", picture, list(options))[1].tobytes()


PICTURES = [
    jpeg(0),
    jpeg(1, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    jpeg(2, cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
    jpeg(3, cv2.IMWRITE_JPEG_QUALITY, 5),
]
THUMBNAIL = b"\xff\xe1" + (2 + len(PICTURES[0])).to_bytes(2, "big") + PICTURES[0]


def found(data: bytes, cuts: list[int], limit: int = 1 << 16) -> list[bytes]:
    """What a stream finds in `data` when it comes in pieces of these sizes, again and again."""
    stream, pictures, at, turn = JpegStream(limit), [], 0, 0
    while at < len(data):
        space = stream.space()
        piece = data[at : at + min(cuts[turn % len(cuts)], len(space))]
        space[: len(piece)] = piece
        stream.filled(len(piece))
        at, turn = at + len(piece), turn + 1
        while (picture := stream.next()) is not None:
            pictures.append(bytes(picture))
    return pictures


@given(
    st.lists(st.sampled_from(PICTURES), max_size=6),
    st.lists(st.integers(1, 3000), min_size=1, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_every_picture_comes_out_as_it_went_in_however_the_stream_is_cut(pictures, cuts) -> None:
    assert found(b"".join(pictures), cuts) == pictures


@given(st.lists(st.binary(max_size=40).filter(lambda b: b"\xff" not in b), min_size=3, max_size=3), st.integers(1, 700))
@settings(max_examples=40, deadline=None)
def test_nonsense_between_pictures_is_skipped(between: list[bytes], cut: int) -> None:
    data = between[0] + PICTURES[0] + between[1] + PICTURES[3] + between[2]
    assert found(data, [cut]) == [PICTURES[0], PICTURES[3]]


def test_a_thumbnail_inside_a_picture_is_not_taken_for_one() -> None:
    whole = PICTURES[2][:2] + THUMBNAIL + PICTURES[2][2:]
    assert found(whole + PICTURES[0], [100]) == [whole, PICTURES[0]]


def test_a_picture_that_lost_its_end_costs_only_itself() -> None:
    assert found(PICTURES[2][:-40] + PICTURES[3] + PICTURES[0], [333]) == [PICTURES[3], PICTURES[0]]


@pytest.mark.parametrize("nonsense", [b"\xff\xd8\x00\x00", b"\xff\xd8\xff\xda\x00\x02", b"\xff\xd8\xff\xd9"])
def test_a_megabyte_of_beginnings_without_a_picture_is_passed_over_in_one_go(nonsense: bytes) -> None:
    begun = time.process_time()
    assert found(nonsense * (1_000_000 // len(nonsense)) + PICTURES[0], [1 << 20], limit=2 << 20)[-1] == PICTURES[0]
    assert time.process_time() - begun < 20


def test_a_picture_larger_than_the_limit_is_refused_and_never_held() -> None:
    stream = JpegStream(1000)
    begun = b"\xff\xd8\xff\xda\x00\x02" + b"\x00" * 994
    stream.space()[:1000] = begun
    stream.filled(1000)
    assert stream.next() is None
    with pytest.raises(SourceError) as caught:
        stream.space()
    assert caught.value.reason is Reason.SOURCE_UNREADABLE


@given(st.lists(st.sampled_from([b"\xff", b"\xd8", b"\xd9", b"\xda", b"\x00\x08", b"\xff\xd8\xff", b"a"]), max_size=60))
@settings(max_examples=150, deadline=None)
def test_no_bytes_whatever_make_it_loop_or_hold_more_than_it_may(words: list[bytes]) -> None:
    data = b"".join(words)
    assert sum(map(len, found(data, [7], limit=256))) <= len(data)
