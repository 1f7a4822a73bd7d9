"""Source and model in one process, for a model that has a local camera to itself.

The same two parts as in processes of their own, with the same ring, leases and accounting; notices and credits go from
one to the other within the process. It knows nothing of frames itself.
Invariant: one thread does both, so a frame is due only when the one before was answered: a file falls behind rather
than dropping frames, a camera's driver drops them.
"""

from __future__ import annotations

import collections
import os
import socket
from collections.abc import Mapping, Sequence
from typing import cast

import cv2

from agent import protocol
from agent.errors import AgentError, Reason
from agent.worker import channel
from agent.worker.delegates import DelegateLoader
from agent.worker.serve import ModelWorker
from agent.worker.source import SourceProcess
from agent.worker.sources import SourceOpener

_FOR_THE_SOURCE = (
    protocol.OpenSource, protocol.Feed, protocol.SetPace, protocol.AttachReader, protocol.SwitchReader,
    protocol.DetachReader, protocol.StopWorker,
)  # fmt: skip


def run(link: channel.Channel, kinds: Mapping[str, SourceOpener], delegates: Mapping[str, DelegateLoader]) -> int:
    """Serve the daemon until it ends this worker; the exit status."""
    cv2.setNumThreads(1)
    channel.wake_on_time()
    process = _FusedProcess(link, kinds, delegates)
    while process.turn():
        pass
    process.leave()
    return process.status


class _FusedProcess(SourceProcess):
    def __init__(
        self, link: channel.Channel, kinds: Mapping[str, SourceOpener], delegates: Mapping[str, DelegateLoader]
    ) -> None:
        super().__init__(link, kinds)
        self._model = ModelWorker(link, delegates, self._models_end)
        self._notices: _End | None = None
        self._sources_end: _End | None = None

    @property
    def status(self) -> int:
        """The model's."""
        return self._model.status

    def descriptors(self) -> list[int]:
        """Source and model do not wait for each other."""
        return [self._link.fileno(), *self._waited]

    def act(self, ready: Sequence[int]) -> bool:
        """What the source does, and the model's answer to the frame that came of it, if one did."""
        if not super().act(ready):
            return False
        if self._notices is not None and self._notices.waiting:
            if not self._model.serve_frame():
                return False
            super()._hear_once()
        return True

    def _hear_once(self) -> None:
        # the one reader is heard at once, when it has answered
        if self._sources_end is None or self._sources_end.waiting:
            super()._hear_once()

    def _timeout_s(self) -> float | None:
        if self._notices is not None and self._notices.waiting:
            return 0.0
        return super()._timeout_s()

    def _obey(self, packet: protocol.Packet) -> bool:
        if isinstance(packet.message, _FOR_THE_SOURCE):
            return super()._obey(packet)
        return self._model.obey(packet)

    def _end_of(self, fd: int) -> socket.socket:
        os.close(fd)
        ours = self._sources_end = _End(-2)
        self._notices = _End(-3)
        ours.peer, self._notices.peer = self._notices, ours
        return cast(socket.socket, ours)

    def _models_end(self, fd: int) -> socket.socket:
        if self._notices is None:
            raise AgentError(Reason.BAD_MESSAGE, "AttachRing before AttachReader")
        os.close(fd)
        return cast(socket.socket, self._notices)


class _End:
    """One end of a way within this process: what source and reader use of a socket, without the kernel.

    `number` stands for a descriptor and is none. `peer` is the other end.
    """

    peer: _End

    def __init__(self, number: int) -> None:
        self._number = number
        self._came: collections.deque[bytes] = collections.deque()
        self._ended = False
        self._closed = False

    @property
    def waiting(self) -> bool:
        """Whether `recv` has something to say, be it the end."""
        return bool(self._came) or (self._ended and not self._closed)

    def fileno(self) -> int:
        return self._number

    def setblocking(self, flag: bool) -> None:
        """It never blocks."""

    def recv_into(self, buffer: bytearray) -> int:
        if self._came:
            data = self._came.popleft()
            buffer[: len(data)] = data
            return len(data)
        if self._ended:
            return 0
        raise BlockingIOError

    def send(self, data: bytes, flags: int = 0) -> int:
        if self.peer._closed:
            raise BrokenPipeError
        self.peer._came.append(data)
        return len(data)

    def shutdown(self, how: int) -> None:
        self.peer._ended = True

    def close(self) -> None:
        self._closed = self.peer._ended = True
