"""Codecs of payloads: how a component's plain bytes become smaller on the way, with and without a base.

Both directions of each codec stand side by side, because together they are the format:
`raw` is the file itself; `zstd` is one Zstandard frame (RFC 8878); `zstd-patch` is one Zstandard frame whose dictionary
is the base, as raw content, with a window that spans base and result together, so any old byte can be referred to from
anywhere: what `zstd --patch-from=BASE` reads and writes. Every frame ends with a checksum.
It neither signs nor hashes results. Importable on Python 3.10; imports zstandard on first use.
Invariants: every frame states its content size, and it is compared with the signed one before anything is decoded; a
decoder never writes beyond the caller's buffer and succeeds only when it is exactly full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ota.errors import OtaError, PayloadError, Reason

if TYPE_CHECKING:
    Bytes = bytes | memoryview

LEVEL = 19
MAX_PLAIN_BYTES = 1 << 31
MAX_WINDOW_LOG = 27
"""Largest window of a full payload, 128 MiB: what a decoder may be made to allocate beside the result."""
_MIN_WINDOW_LOG = 10
_MAX_PATCH_WINDOW_LOG = 31


@dataclass(frozen=True, slots=True)
class Codec:
    """One format: `encode(plain, base)` and `decode(payload, base, out)`; `needs_base` for deltas."""

    needs_base: bool
    encode: Callable[[bytes, bytes], bytes]
    decode: Callable[[Bytes, Bytes, memoryview], None]


def encode(codec: str, plain: bytes, base: bytes | None = None) -> bytes:
    """Encode `plain`, against `base` for a delta codec.

    Raises:
        OtaError: `unsupported` for an unknown codec, a missing or an unwanted base, or a size no decoder takes.
    """
    known = _codec(codec, base is not None)
    if not 0 < len(plain) <= MAX_PLAIN_BYTES:
        raise OtaError(Reason.UNSUPPORTED, f"{len(plain)} bytes cannot be a payload", hint="use a smaller file")
    return known.encode(plain, base or b"")


def apply(codec: str, payload: Bytes, base: Bytes | None, out: memoryview) -> None:
    """Decode `payload` into `out`, whose length is the signed length of the result.

    `out` holds unverified bytes until the caller has compared their hash.

    Raises:
        OtaError: `unsupported` as in `encode`.
        PayloadError: `delta_mismatch` when the result of a delta fails its checksum, which is what another base
            gives; `delta_corrupt` for a delta that cannot be decoded; `payload_corrupt` for a full payload.
    """
    _codec(codec, base is not None).decode(payload, base if base is not None else b"", out)


def _codec(name: str, with_base: bool) -> Codec:
    known = CODECS.get(name)
    if known is None:
        raise OtaError(Reason.UNSUPPORTED, f"codec {name[:40]!r} is unknown", hint="update the agent")
    if known.needs_base != with_base:
        raise OtaError(Reason.UNSUPPORTED, f"codec {name} takes {'a' if known.needs_base else 'no'} base")
    return known


def _encode_raw(plain: bytes, base: bytes) -> bytes:
    return plain


def _decode_raw(payload: Bytes, base: Bytes, out: memoryview) -> None:
    if len(payload) != len(out):
        raise _corrupt(Reason.PAYLOAD_CORRUPT, f"{len(payload)} bytes, not {len(out)}")
    out[:] = payload


def _encode_zstd(plain: bytes, base: bytes) -> bytes:
    import zstandard

    window = min(_window_log(len(plain)), MAX_WINDOW_LOG)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, source_size=len(plain), window_log=window, write_checksum=True
    )
    return bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(plain))


def _decode_zstd(payload: Bytes, base: Bytes, out: memoryview) -> None:
    import zstandard

    decoder = zstandard.ZstdDecompressor(max_window_size=1 << MAX_WINDOW_LOG)
    _decode_frame(decoder, payload, 1 << MAX_WINDOW_LOG, out, Reason.PAYLOAD_CORRUPT)


def _encode_patch(plain: bytes, base: bytes) -> bytes:
    import zstandard

    window = _window_log(len(plain) + len(base))
    if window > _MAX_PATCH_WINDOW_LOG:
        raise OtaError(Reason.UNSUPPORTED, "base and result are too large for a delta", hint="send the full payload")
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL,
        source_size=len(plain),
        dict_size=len(base),
        window_log=window,
        enable_ldm=True,  # finds matches farther back than the level's own tables reach
        write_checksum=True,
        write_dict_id=False,
    )
    words = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return bytes(zstandard.ZstdCompressor(dict_data=words, compression_params=parameters).compress(plain))


def _decode_patch(payload: Bytes, base: Bytes, out: memoryview) -> None:
    import zstandard

    window = 1 << _window_log(len(out) + len(base))
    words = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    decoder = zstandard.ZstdDecompressor(dict_data=words, max_window_size=window)
    _decode_frame(decoder, payload, window, out, Reason.DELTA_CORRUPT)


def _decode_frame(decoder: Any, frame: Bytes, max_window: int, out: memoryview, reason: Reason) -> None:
    """Decode one frame that says it holds exactly `len(out)` bytes and asks for no larger window."""
    import zstandard

    try:
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size != len(out):
            raise _corrupt(reason, "the frame's content size is not the signed length")
        if parameters.window_size > max_window:
            raise _corrupt(reason, f"the frame asks for a window of {parameters.window_size} bytes")
        # In one piece: the decoder then needs no window of its own, and a frame without its end is an error.
        out[:] = decoder.decompress(frame, max_output_size=len(out), allow_extra_data=False)
    except zstandard.ZstdError as e:
        # not "too much memory for decoding", which is what a frame says that asks for an impossible window
        if "allocation" in str(e).lower():
            raise MemoryError from e
        if "checksum" in str(e).lower() and reason is Reason.DELTA_CORRUPT:
            raise PayloadError(
                Reason.DELTA_MISMATCH, "the delta does not belong to this base", hint="fetch the full payload"
            ) from e
        raise _corrupt(reason, str(e)) from e


def _window_log(length: int) -> int:
    return max(_MIN_WINDOW_LOG, length.bit_length())


def _corrupt(reason: Reason, why: str) -> PayloadError:
    what = "delta" if reason is Reason.DELTA_CORRUPT else "payload"
    return PayloadError(reason, f"the {what} cannot be decoded: {why}", hint="fetch the full payload again")


CODECS: Mapping[str, Codec] = {
    "raw": Codec(False, _encode_raw, _decode_raw),
    "zstd": Codec(False, _encode_zstd, _decode_zstd),
    "zstd-patch": Codec(True, _encode_patch, _decode_patch),
}
DELTA_CODECS = tuple(name for name, codec in CODECS.items() if codec.needs_base)
