"""Which encoding of a payload is worth its bytes: the smallest one that is known to decode.

The codecs themselves are `ota.delta`'s. Every result is decoded again before it is returned, so what leaves this module
gives the plaintext back on a device that runs the same code.
"""

from __future__ import annotations

from ota import delta
from ota.errors import OtaError, PublishError, Reason
from ota.release import DELTA_CODECS


def encode_full(plain: bytes) -> tuple[str, bytes]:
    """Codec and bytes of the full payload: `zstd`, or `raw` where that does not pay.

    Raises:
        PublishError: `delta_corrupt` when the result does not decode, which is a fault of this machine.
    """
    compressed = _checked("zstd", plain, None)
    return ("zstd", compressed) if len(compressed) < len(plain) else ("raw", plain)


def encode_delta(base: bytes, plain: bytes) -> tuple[str, bytes] | None:
    """Codec and bytes of the smallest delta that turns `base` into `plain`; None where the two are too large for any.

    Raises:
        PublishError: `delta_corrupt`, as above.
    """
    best: tuple[str, bytes] | None = None
    for codec in DELTA_CODECS:
        try:
            encoded = _checked(codec, plain, base)
        except OtaError as e:
            if e.reason is not Reason.UNSUPPORTED:
                raise
            continue
        if best is None or len(encoded) < len(best[1]):
            best = (codec, encoded)
    return best


def _checked(codec: str, plain: bytes, base: bytes | None) -> bytes:
    encoded = delta.encode(codec, plain, base)
    decoded = bytearray(len(plain))
    delta.apply(codec, encoded, base, memoryview(decoded))
    if decoded != plain:
        raise PublishError(
            Reason.DELTA_CORRUPT, f"what {codec} encoded does not decode to its input", hint="check this machine"
        )
    return encoded
