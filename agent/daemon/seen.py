"""Which commands were carried out here, over restarts and power cuts: a broker may deliver one again at any time.

One small file, replaced durably before the command is acted on, at most once a command. Invariants: the newest
`remembered` ids are known, and of what has to be forgotten first that which would be refused as expired anyway; a
damaged file is an empty one, because commands carry no authority.
"""

from __future__ import annotations

import logging

from ota import strictjson
from ota.client.fsops import Fs
from ota.errors import OtaError

log = logging.getLogger(__name__)

FILE = "commands.json"
MAX_BYTES = 64 * 1024


class Seen:
    """Ids of commands with the time until which each could come again.

    Args:
        fs: the state directory; None keeps them in memory alone.
        remembered: how many ids; 512 of the longest fill 45 KiB.

    Raises:
        StoreError: `io_error`.
    """

    def __init__(self, fs: Fs | None = None, remembered: int = 512) -> None:
        self._fs = fs
        self._remembered = remembered
        self._until: dict[str, int] = {} if fs is None else _load(fs)

    def __contains__(self, number: str) -> bool:
        return number in self._until

    def add(self, number: str, expires_at: int, wall_s: float) -> None:
        """Remember the command `number`, durably.

        Raises:
            StoreError: `no_space` or `io_error`; it is not remembered and must not be carried out.
        """
        known = {**self._until, number: expires_at}
        while len(known) > self._remembered:
            expired = next((one for one, until in known.items() if until <= wall_s), None)
            del known[expired or next(iter(known))]
        if self._fs is not None:
            self._fs.write_atomic(FILE, strictjson.canonical({"v": 1, "seen": list(known.items())}))
        self._until = known


def _load(fs: Fs) -> dict[str, int]:
    size = fs.size(FILE)
    if size is None:
        return {}
    try:
        body = strictjson.loads(fs.read_at(FILE, 0, MAX_BYTES + 1), max_bytes=MAX_BYTES, what=FILE)
        return {str(number): int(until) for number, until in body["seen"]}
    except (OtaError, KeyError, TypeError, ValueError) as e:
        log.warning("%s is damaged: commands that were carried out before may be again: %r", FILE, e)
        return {}
