"""Verified metadata on disk: `<folder>/<role>.json`, one file a role, and its floors in the journal.

Decides nothing: what is given to `keep` was verified, what `stored` returns is verified again. A role's name is
quoted into a file name, so that no name leads elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, unquote

from ota.client.fsops import Fs
from ota.client.journal import Floor, Journal
from ota.client.workflow import Trusted
from ota.errors import StoreError

SUFFIX = ".json"


class Documents:
    """The documents and floors of one repository.

    Args:
        name: the repository's name in the journal.
        folder: where its documents lie below the root of `fs`; `.` is the root.
        max_bytes: a larger file is not one of ours.
    """

    def __init__(self, fs: Fs, journal: Journal, name: str, folder: str, max_bytes: int) -> None:
        self._fs = fs
        self._journal = journal
        self._name = name
        self._folder = folder
        self._max_bytes = max_bytes

    @property
    def floors(self) -> Mapping[str, Floor]:
        """Floors by role."""
        return self._journal.record.floors.get(self._name, {})

    def stored(self) -> dict[str, bytes]:
        """What is on disk, by role; it may be damaged. What the disk does not give back is as good as absent: it is
        fetched, and written anew.

        Raises:
            StoreError: `io_error`: the folder cannot be read.
        """
        names = [name for name in self._fs.names(self._folder) if name.endswith(SUFFIX)]
        found = {
            unquote(name.removesuffix(SUFFIX)): self._read(f"{self._folder}/{name}", self._max_bytes) for name in names
        }
        return {role: data for role, data in found.items() if data is not None}

    def keep(self, trusted: Trusted) -> None:
        """Make a verified document and its floor durable; what is there already is not written again.

        File first: a floor without its file only costs a fetch, a file without its floor is judged again.

        Raises:
            StoreError: `no_space` or `io_error`.
        """
        path = f"{self._folder}/{quote(trusted.role, safe='')}{SUFFIX}"
        if self._read(path, len(trusted.data)) != trusted.data:
            self._fs.make_dirs(self._folder)
            self._fs.write_atomic(path, trusted.data)
        self._journal.save(self._journal.record.with_floor(self._name, trusted.role, trusted.floor))

    def _read(self, path: str, max_bytes: int) -> bytes | None:
        try:
            return self._fs.read_at(path, 0, max_bytes + 1)
        except StoreError:
            return None
