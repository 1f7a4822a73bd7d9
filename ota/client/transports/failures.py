"""What a technician is told of a stick that cannot be read: what the system said, and what to do about that."""

from __future__ import annotations

import errno
from pathlib import Path

from ota.errors import Reason, TransferError

_UNPLUGGED = "is the stick still plugged in and mounted?"
_HINTS = {
    errno.EACCES: "the agent's own user has to read it: mount it below /media or /mnt, readable for everybody",
    errno.ENOENT: "is the stick plugged in, and mounted where the agent sees it, below /media or /mnt?",
    errno.EIO: "it was pulled out, or it is failing: plug it in again, then try another stick",
}
_ALIKE = {errno.EPERM: errno.EACCES, errno.ENOTDIR: errno.ENOENT, errno.EBADMSG: errno.EIO, errno.EUCLEAN: errno.EIO}


def unreachable(place: Path, error: OSError) -> TransferError:
    """The error for a stick at `place` whose reading failed with `error`."""
    number = error.errno or 0
    hint = _HINTS.get(_ALIKE.get(number, number), _UNPLUGGED)
    return TransferError(Reason.SOURCE_UNREACHABLE, f"{place}: {error.strerror}", hint=hint, retry=True)
