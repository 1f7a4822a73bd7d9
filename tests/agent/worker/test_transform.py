"""Codecs in process, and the transform worker around them."""

from __future__ import annotations

import contextlib
import os
import random

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from workerdriver import Daemon, ask

from agent import memfd, protocol
from agent.errors import Reason
from ota import delta
from ota.errors import OtaError, PayloadError
from ota.errors import Reason as OtaReason

BASE = random.Random(1).randbytes(60_000)
NEW = BASE[:20_000] + b"a changed middle" + BASE[20_500:] + b"tail"


def decode(codec: str, payload: bytes, base: bytes | None, length: int) -> bytes:
    out = bytearray(length)
    delta.apply(codec, payload, base, memoryview(out))
    return bytes(out)


@pytest.mark.parametrize("codec", ["raw", "zstd", "zstd-patch"])
@settings(max_examples=40, deadline=None)
@given(plain=st.binary(min_size=1, max_size=4000), base=st.binary(min_size=1, max_size=4000))
def test_what_is_encoded_is_decoded(codec, plain, base):
    base = base if codec in delta.DELTA_CODECS else None
    assert decode(codec, delta.encode(codec, plain, base), base, len(plain)) == plain


def test_a_patch_finds_old_bytes_wherever_they_lie():
    noise = random.Random(2)
    old = noise.randbytes(12 << 20)
    new = noise.randbytes(1000) + old[:100_000] + old[-100_000:]
    patch = delta.encode("zstd-patch", new, old)
    assert len(patch) < 3000
    assert decode("zstd-patch", patch, old, len(new)) == new


def test_a_patch_is_what_the_zstd_library_reads_with_the_base_as_raw_dictionary():
    words = zstandard.ZstdCompressionDict(BASE, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    assert zstandard.ZstdDecompressor(dict_data=words).decompress(delta.encode("zstd-patch", NEW, BASE)) == NEW


def test_a_patch_on_another_base_is_a_delta_mismatch():
    other = bytes(len(BASE))
    with pytest.raises(PayloadError) as caught:
        decode("zstd-patch", delta.encode("zstd-patch", NEW, BASE), other, len(NEW))
    assert caught.value.reason is OtaReason.DELTA_MISMATCH


@pytest.mark.parametrize("codec", ["zstd", "zstd-patch"])
def test_every_flipped_bit_is_noticed(codec):
    base = BASE if codec == "zstd-patch" else None
    good = delta.encode(codec, NEW, base)
    picks = random.Random(3)
    for _ in range(200):
        bad = bytearray(good)
        bad[picks.randrange(len(bad))] ^= 1 << picks.randrange(8)
        delta_reasons = {OtaReason.DELTA_CORRUPT, OtaReason.DELTA_MISMATCH}
        with contextlib.suppress(PayloadError):
            assert decode(codec, bytes(bad), base, len(NEW)) == NEW  # a bit that says nothing
            continue
        with pytest.raises(PayloadError) as caught:
            decode(codec, bytes(bad), base, len(NEW))
        assert caught.value.reason in ({OtaReason.PAYLOAD_CORRUPT} if codec == "zstd" else delta_reasons)


@pytest.mark.parametrize("codec", ["raw", "zstd", "zstd-patch"])
@pytest.mark.parametrize("change", [-1, 1, 100_000])
def test_another_length_than_the_signed_one_is_refused_before_decoding(codec, change):
    base = BASE if codec == "zstd-patch" else None
    payload = delta.encode(codec, NEW, base)
    with pytest.raises(PayloadError):
        decode(codec, payload, base, len(NEW) + change)


@pytest.mark.parametrize("cut", [0, 1, 5, 40, -1, -5])
def test_a_cut_payload_is_refused(cut):
    payload = delta.encode("zstd-patch", NEW, BASE)
    with pytest.raises(PayloadError) as caught:
        decode("zstd-patch", payload[:cut], BASE, len(NEW))
    assert caught.value.reason is OtaReason.DELTA_CORRUPT


@pytest.mark.fault("F59")
def test_a_decompression_bomb_writes_no_byte_beyond_the_signed_length():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(50 << 20))
    assert len(bomb) < 10_000
    out = bytearray(1000)
    with pytest.raises(PayloadError) as caught:
        delta.apply("zstd", bomb, None, memoryview(out)[:900])
    assert caught.value.reason is OtaReason.PAYLOAD_CORRUPT
    assert not any(out)


def test_a_frame_that_asks_for_a_huge_window_is_refused():
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=30)
    # Streamed, so that the frame cannot be a single segment; with its size stated all the same.
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=1 << 28)
    payload = b"".join(stream.compress(bytes(1 << 24)) for _ in range(16)) + stream.flush()
    assert zstandard.get_frame_parameters(payload).window_size > 1 << delta.MAX_WINDOW_LOG
    with pytest.raises(PayloadError) as caught:
        delta.apply("zstd", payload, None, memoryview(bytearray(1 << 28)))
    assert "window" in caught.value.message


def test_a_frame_without_its_size_is_refused():
    payload = zstandard.ZstdCompressor(write_content_size=False).compress(NEW)
    with pytest.raises(PayloadError):
        decode("zstd", payload, None, len(NEW))


@pytest.mark.parametrize(("codec", "base"), [("lzma", None), ("zstd", BASE), ("raw", BASE), ("zstd-patch", None)])
def test_an_unknown_codec_or_a_wrong_number_of_inputs_is_unsupported(codec, base):
    with pytest.raises(OtaError) as caught:
        decode(codec, b"x", base, 1)
    assert caught.value.reason is OtaReason.UNSUPPORTED


@pytest.mark.parametrize("codec", ["raw", "zstd", "zstd-patch"])
def test_the_worker_answers_with_a_sealed_memfd_of_exactly_the_signed_length(daemon: Daemon, codec):
    contents = [delta.encode(codec, NEW, BASE if codec == "zstd-patch" else None)]
    if codec == "zstd-patch":
        contents.append(BASE)
    worker = daemon.spawn("transform")
    fds = [memfd.of_bytes("input", data) for data in contents]
    worker.send(protocol.Transform(codec, len(NEW)), *fds)
    packet = worker.expect_packet(protocol.Transformed)
    (fd,) = packet.take(1)
    assert packet.message.out_bytes == len(NEW) == os.fstat(fd).st_size
    assert memfd.is_sealed(fd)
    assert os.pread(fd, len(NEW) + 1, 0) == NEW
    for each in (*fds, fd):
        os.close(each)


def test_the_worker_names_what_is_wrong_and_stays(daemon: Daemon):
    worker = daemon.spawn("transform")
    patch = delta.encode("zstd-patch", NEW, BASE)
    cases = [
        (protocol.Transform("zstd-patch", len(NEW)), (patch, bytes(len(BASE))), "delta_mismatch"),
        (protocol.Transform("zstd-patch", len(NEW)), (patch[:-9], BASE), "delta_corrupt"),
        (protocol.Transform("zstd-patch", len(NEW)), (patch,), "bad_message"),
        (protocol.Transform("zstd", len(NEW)), (b"junk",), "payload_corrupt"),
        (protocol.Transform("brotli", len(NEW)), (b"junk",), "unsupported"),
        (protocol.Transform("raw", -1), (b"junk",), "bad_message"),
        (protocol.Transform("raw", 1 << 40), (b"junk",), "bad_message"),
        (protocol.Transform("raw", 4), (b"",), "bad_message"),
    ]
    for message, contents, reason in cases:
        assert ask(worker, message, *contents).reason == reason
    assert isinstance(ask(worker, protocol.Transform("raw", 4), b"junk"), protocol.Transformed)


def test_the_worker_refuses_inputs_that_could_still_change(daemon: Daemon):
    worker = daemon.spawn("transform")
    fd = memfd.create("loose", 10)
    worker.send(protocol.Transform("raw", 10), fd)
    os.close(fd)
    assert worker.receive().message.reason == Reason.BAD_MESSAGE.value
