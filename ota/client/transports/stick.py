"""What a technician brought, as a transport: a directory is read as one, a regular file as a stored zip."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from ota.client.limits import Limits
from ota.client.ports import Transport
from ota.client.transports.failures import unreachable
from ota.client.transports.reading import aside
from ota.errors import OtaError, Reason, TransferError

_T = TypeVar("_T")


def open_stick(path: Path, device: str) -> Transport:
    """The transport over `path` for `device`.

    Raises:
        TransferError: `source_unreachable` when nothing can be looked at there, `unsafe_file` for what is neither a
            directory nor a regular file.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as e:  # a NUL, or half of a surrogate pair
        raise TransferError(Reason.SOURCE_UNREACHABLE, f"{str(path)!r} is no name of a file") from e
    except OSError as e:
        raise unreachable(path, e) from e
    # both are memory that a device without a stick does not need
    if stat.S_ISDIR(mode):
        from ota.client.transports.directory import DirectoryTransport

        return DirectoryTransport(path, device)
    if stat.S_ISREG(mode):
        from ota.client.transports.zip import ZipTransport

        return ZipTransport(path.resolve(), device)
    raise TransferError(
        Reason.UNSAFE_FILE, f"{path} is neither a directory nor a zip file", hint="name what edge-ota bundle wrote"
    )


async def reach(path: Path, device: str) -> Transport:
    """As `open_stick`, without waiting for ever where a file system hangs.

    Raises:
        TransferError: as there; `transfer_timeout`.
    """
    return await _answered(aside(open_stick, path, device))


async def check_names(transport: Transport, device: str) -> None:
    """Refuse a stick that holds nothing for `device`.

    Raises:
        OtaError: `not_for_this_device`; as `Transport.desired` for a stick that cannot be read, `transfer_timeout` for
            one that hangs.
    """
    try:
        await _answered(transport.desired(Limits().desired_max_bytes))
    except TransferError as e:
        if e.reason is not Reason.NOT_FOUND:
            raise
        if await _is_bundle(transport):
            message = f"there is nothing for {device} on it"
            hint = f"edge-ota bundle REPO {device} OUT writes a stick for it"
        else:
            message = "there is no bundle at that place"
            hint = f"name the folder or the .zip itself that edge-ota bundle REPO {device} OUT wrote"
        raise OtaError(Reason.NOT_FOR_THIS_DEVICE, message, hint=hint) from e


async def _is_bundle(transport: Transport) -> bool:
    """Whether it is one for anybody."""
    try:
        await _answered(transport.metadata("timestamp", None, Limits().timestamp_max_bytes))
    except TransferError as e:
        if e.reason is not Reason.NOT_FOUND:
            raise
        return False
    return True


async def _answered(work: Awaitable[_T]) -> _T:
    try:
        async with asyncio.timeout(Limits().metadata_timeout_s):
            return await work
    except TimeoutError as e:
        raise TransferError(
            Reason.TRANSFER_TIMEOUT, "the stick does not answer", hint="unplug it and plug it in again", retry=True
        ) from e
