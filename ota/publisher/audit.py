"""`audit.jsonl`: who did what to which device, one JSON object a line, appended and synced before the verb answers.

Invariants: lines are only ever added; no secret stands in one. It is a record for people; nothing reads it.
"""

from __future__ import annotations

import errno
import getpass
import os
from typing import Any

from ota import strictjson
from ota.errors import PublishError, Reason
from ota.publisher import files
from ota.publisher.repository import Repository

FILE = "audit.jsonl"


def record(repository: Repository, action: str, device: str, **facts: Any) -> None:
    """Append what was done.

    Args:
        action: `enrolled`, `renewed`, `revoked`, `replaced`, `decommissioned`, `token_made`.
        facts: plain values.

    Raises:
        PublishError: `io_error`.
    """
    moment = repository.now().replace(microsecond=0).isoformat().replace("+00:00", "Z")
    line = strictjson.canonical({"time": moment, "action": action, "device": device, "by": _operator(), **facts})
    path = repository.path / FILE
    try:
        if not path.exists():
            files.write_atomic(path, b"", files.SECRET_MODE)  # its name is to last as well
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, files.SECRET_MODE)
        try:
            before = os.fstat(fd).st_size
            if os.write(fd, line + b"\n") != len(line) + 1:
                os.ftruncate(fd, before)  # the next line would become part of half a one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise PublishError(
            Reason.IO_ERROR, f"cannot write {path}: {e.strerror}", hint="check the repository's disk and owner"
        ) from e


def _operator() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
