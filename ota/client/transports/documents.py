"""Metadata that somebody handed over at once, by name: `timestamp`, `desired`, `root.2`, `snapshot.7`, `targets.3`.

Nothing in it is trusted; it is a source like any other. It has no targets and no payloads.
"""

from __future__ import annotations

from collections.abc import Mapping

from ota.errors import Reason, TransferError


class DocumentTransport:
    """A `Transport` over documents in memory."""

    def __init__(self, name: str, documents: Mapping[str, bytes]) -> None:
        self._name = name
        self._documents = dict(documents)

    @property
    def name(self) -> str:
        """For events and counters."""
        return self._name

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        """See `Transport`."""
        return self._get(role if version is None else f"{role}.{version}", max_bytes)

    async def desired(self, max_bytes: int) -> bytes:
        """See `Transport`."""
        return self._get("desired", max_bytes)

    async def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """There are none."""
        raise _absent(path)

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        """There are none."""
        raise _absent(sha256)

    def _get(self, name: str, max_bytes: int) -> bytes:
        data = self._documents.get(name)
        if data is None:
            raise _absent(name)
        if len(data) > max_bytes:
            raise TransferError(Reason.METADATA_TOO_LARGE, f"{name} has {len(data)} bytes")
        return data


def _absent(name: str) -> TransferError:
    return TransferError(Reason.NOT_FOUND, f"{name} is not among the documents that were handed over")
