"""What runtimes compiled, kept between starts: `compiled/<model>-<how>.cmp`, sealed under the device storage key.

A short cut and nothing else: whatever is wrong with a file here, the model is compiled again. Not here: whether an
export fits the runtime and driver of today; the worker compares that (`agent.worker.delegates.compiled`).
Invariants: no plaintext of a model in any file; nothing is handed to a worker before the whole file authenticated, and
only for the model and options that it was sealed for; all files together never take more than `max_bytes`; a file that
killed a worker is gone before the next one starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agent import protocol
from agent.daemon.worker import Worker
from agent.errors import AgentError, Reason, WorkerError
from ota import payload, strictjson
from ota.client import memfd, offload, sealed
from ota.client.fsops import Fs
from ota.client.store import sealed_size
from ota.errors import OtaError, PayloadError, StoreError
from ota.errors import Reason as OtaReason
from ota.release import Component

log = logging.getLogger(__name__)

DIRECTORY = "compiled"
MAGIC = b"EDGECMP\n"
CONTEXT = b"edge-agent compiled v1\0" + payload.SUITE.encode() + b"\0"
# A model that loads in less is not worth flash writes, nor the time to open and import its export.
WORTH_MS = 1000.0
MAX_TOTAL_BYTES = 256 << 20
_SUFFIX = ".cmp"
_ANEW = "it is removed; the model is compiled anew"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def load_options(component: Component) -> dict[str, Any]:
    """`LoadModel.options` of a release's component: which bytes it is, and what its publisher allows."""
    return {"model": component.plain_sha256, "bf16": "bf16" in component.precision}


class CompiledModels:
    """Compiled models of one device.

    Args:
        keys: the storage keys of now, the current one first; empty when there is none: then nothing is kept or found.
        reserve_bytes: disk that stays free for what matters more.
        max_bytes: of all files together.
    """

    def __init__(
        self,
        fs: Fs,
        keys: Callable[[], Sequence[bytes]],
        *,
        reserve_bytes: int,
        max_bytes: int = MAX_TOTAL_BYTES,
    ) -> None:
        self._fs = fs
        self._keys = keys
        self._reserve_bytes = reserve_bytes
        self._max_bytes = max_bytes
        self._turn = asyncio.Lock()
        self._used: list[str] = []
        self._never: set[str] = set()

    async def load(self, worker: Worker, message: protocol.LoadModel, model: int, *, timeout_s: float) -> Any:
        """Let `worker` load the model in the memfd `model`, compiled as it was before where that is known.

        Returns:
            The packet with `ModelLoaded`.

        Raises:
            AgentError: as `Worker.request`, and `blame`.
        """
        name = _name(message)
        kept = await self._open(name)
        try:
            packet = await worker.request(
                message, protocol.ModelLoaded, fds=(model,) if kept is None else (model, kept), timeout_s=timeout_s
            )
        except AgentError as e:
            if kept is not None:
                await self.blame(message, e)
            raise
        finally:
            if kept is not None:
                os.close(kept)
        if kept is not None and packet.message.compiled != "imported":
            await self._discard(name, "it is of another runtime, driver or option")
        return packet

    async def blame(self, message: protocol.LoadModel, error: AgentError) -> None:
        """Remove what was kept for `message`, where a worker that imported it ran into `error` before its first frame.

        Raises:
            WorkerError: `worker_unavailable`: that says nothing about the model, which the next worker compiles. Where
                nothing was kept, or no worker was to be had, this returns.
        """
        name = _name(message)
        if name not in self._used or error.reason is Reason.WORKER_UNAVAILABLE:
            return
        await self._discard(name, f"{error.message} over it")
        raise WorkerError(Reason.WORKER_UNAVAILABLE, f"{error.message} over a kept compilation", hint=_ANEW) from error

    async def keep(
        self, worker: Worker, message: protocol.LoadModel, loaded: protocol.ModelLoaded, *, timeout_s: float
    ) -> bool:
        """Keep what `worker` compiled for `message`, where loading it took long enough; whether it was kept.

        Failing costs nothing but the next compilation, unless it costs the worker: the same is not tried twice.
        """
        name = _name(message)
        if not name or loaded.compiled != "fresh" or loaded.load_ms < WORTH_MS or name in self._never:
            return False
        if not self._keys():
            return False
        try:
            packet = await worker.request(protocol.ExportCompiled(), protocol.Exported, timeout_s=timeout_s)
            (fd,) = packet.take(1)
            try:
                await self._put(name, fd)
            finally:
                os.close(fd)
        except (AgentError, OtaError) as e:
            if isinstance(e, WorkerError):
                self._never.add(name)
            log.warning("compilation %s is not kept: %s", name[:12], e.message, extra={"reason": e.reason.value})
            return False
        return True

    async def collect(self, has_model: Callable[[str], bool], *, room_needed: bool = False) -> None:
        """Remove what belongs to models that are gone, and what a power cut left half-written.

        Args:
            has_model: is asked with the SHA-256 of each.
            room_needed: something that matters more found none: everything goes.
        """
        async with self._turn:
            with contextlib.suppress(StoreError):  # told below: the names cannot be read either
                self._fs.sweep(DIRECTORY)
            for name in self._names():
                if room_needed or not has_model(name.partition("-")[0]):
                    self._remove(name)

    async def _open(self, name: str) -> int | None:
        """A sealed memfd with the compiled model; None when there is none, or none that can be opened."""
        keys = {sealed.key_id(key): key for key in self._keys()}
        if not name or not keys:
            return None
        async with self._turn:
            try:
                if self._fs.size(_path(name)) is None:
                    return None
                fd = await offload.opened(partial(_unseal, self._fs, name, keys))
            except (PayloadError, StoreError) as e:
                log.warning("compiled anew: %s", e.message, extra={"reason": e.reason.value})
                self._remove(name)
                return None
            self._touch(name)
            return fd

    async def _put(self, name: str, fd: int) -> None:
        length = os.fstat(fd).st_size
        needed = sealed_size(length)
        if not memfd.is_sealed(fd) or not 0 < needed <= self._max_bytes:
            raise AgentError(Reason.BAD_MESSAGE, f"{length} bytes are no compiled model, or too many to keep")
        async with self._turn:
            keys = self._keys()
            if not keys:
                raise StoreError(OtaReason.SEALED_KEY_UNAVAILABLE, "the storage key went while it was exported")
            self._make_room(name, needed)
            await offload.finished(partial(_seal, self._fs, name, keys[0], os.dup(fd), length))
            self._touch(name)

    def _make_room(self, name: str, needed: int) -> None:
        """Remove what was used least lately until `needed` bytes fit.

        Raises:
            StoreError: `no_space`.
        """
        others = [other for other in self._names() if other != name]
        others.sort(key=lambda other: self._used.index(other) if other in self._used else -1)
        sizes = {other: self._fs.size(_path(other)) or 0 for other in others}
        total = sum(sizes.values())
        for other in others:
            if total + needed <= self._max_bytes:
                break
            self._remove(other)
            total -= sizes[other]
        if self._fs.free_bytes() < needed + self._reserve_bytes:
            raise StoreError(OtaReason.NO_SPACE, f"a compiled model of {needed} bytes has no room", retry=True)

    async def _discard(self, name: str, why: str) -> None:
        log.warning("compilation %s is not used: %s", name[:12], why)
        async with self._turn:
            self._remove(name)

    def _names(self) -> list[str]:
        try:
            return [name.removesuffix(_SUFFIX) for name in self._fs.names(DIRECTORY) if name.endswith(_SUFFIX)]
        except StoreError as e:
            log.warning("%s", e.message, extra={"reason": e.reason.value})
            return []

    def _remove(self, name: str) -> None:
        if name in self._used:
            self._used.remove(name)
        try:
            self._fs.remove(_path(name))
        except StoreError as e:
            log.warning("%s", e.message, extra={"reason": e.reason.value})  # it is tried again whenever it is met

    def _touch(self, name: str) -> None:
        if name in self._used:
            self._used.remove(name)
        self._used.append(name)


def keeping_nothing() -> CompiledModels:
    """For whoever has no state and no keys."""
    return CompiledModels(Fs(Path(os.devnull)), tuple, reserve_bytes=0)


def _name(message: protocol.LoadModel) -> str:
    """What a compilation is called: its model, and a digest of how it is loaded; empty for a model without a name."""
    model = message.options.get("model")
    if not isinstance(model, str) or not _SHA256.fullmatch(model):
        return ""
    how = strictjson.canonical({"delegate": message.delegate, "options": message.options, "threads": message.threads})
    return f"{model}-{hashlib.sha256(how).hexdigest()[:16]}"


def _path(name: str) -> str:
    return f"{DIRECTORY}/{name}{_SUFFIX}"


def _context(header: bytes, name: str) -> bytes:
    return CONTEXT + header + name.encode()


def _seal(fs: Fs, name: str, key: bytes, fd: int, length: int) -> None:
    """Seal what is behind `fd`, which is closed; whoever waited for it may be gone meanwhile."""
    header = sealed.Header(sealed.key_id(key), length).pack(MAGIC)

    def pieces() -> Iterator[bytes]:
        yield header
        yield from payload.seal_chunks(memfd.chunks(fd), key, _context(header, name))

    try:
        fs.make_dirs(DIRECTORY)
        fs.sweep(DIRECTORY)
        fs.write_atomic(_path(name), pieces())
    finally:
        os.close(fd)


def _unseal(fs: Fs, name: str, keys: dict[str, bytes]) -> int:
    """A sealed memfd of the plaintext.

    Raises:
        PayloadError: the file is damaged, of another name, or sealed under a key that is not here.
        StoreError: the disk does not answer, or there is no memory.
    """
    path = _path(name)
    head = fs.read_at(path, 0, sealed.HEADER_BYTES)
    header = sealed.parse(head, MAGIC, fs.size(path) or 0)
    key = keys.get(header.key_id)
    if key is None:
        raise PayloadError(OtaReason.PAYLOAD_CORRUPT, f"{path} is sealed under key {header.key_id}, which is not here")

    def fill(view: memoryview) -> None:
        if payload.open_into(fs.chunks(path, sealed.HEADER_BYTES), key, _context(head, name), view) != header.length:
            raise PayloadError(OtaReason.PAYLOAD_TRUNCATED, f"{path} opens to less than {header.length} bytes")

    return memfd.write_sealed("compiled", header.length, fill)
