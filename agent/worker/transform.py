"""The transform worker: turns a payload (and its base) into the plain file, all in memfds.

The codecs are `ota.delta`; this process gives them bounded memory and a body that may crash. It checks no hash: whoever
asked knows the signed one. Invariants: the result has exactly the signed length and is sealed before it leaves.
"""

from __future__ import annotations

import mmap
import os
import time

from agent import memfd, protocol
from agent.errors import AgentError, Reason
from agent.worker import channel
from ota import delta


def run(link: channel.Channel) -> int:
    """Serve the daemon until it ends this worker."""

    def obey(packet: protocol.Packet) -> bool:
        message = packet.message
        if isinstance(message, protocol.StopWorker):
            return False
        if not isinstance(message, protocol.Transform):
            raise channel.unexpected(message, "transform")
        _transform(link, message, packet)
        return True

    while link.serve_one(obey):
        pass
    return 0


def _transform(link: channel.Channel, message: protocol.Transform, packet: protocol.Packet) -> None:
    started = time.process_time()
    fds = packet.take(2 if message.codec in delta.DELTA_CODECS else 1)
    out_fd = -1
    try:
        if not 0 < message.out_bytes <= delta.MAX_PLAIN_BYTES:
            raise AgentError(Reason.BAD_MESSAGE, f"a result of {message.out_bytes} bytes")
        inputs = [_map(fd) for fd in fds]
        out_fd = memfd.create("plain", message.out_bytes)
        with mmap.mmap(out_fd, message.out_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as out:
            with memoryview(out) as view:
                delta.apply(message.codec, inputs[0], inputs[1] if len(inputs) > 1 else None, view)
        memfd.seal(out_fd)
        cpu_ms = round((time.process_time() - started) * 1e3, 3)
        link.send(protocol.Transformed(message.out_bytes, cpu_ms), (out_fd,))
    finally:
        for fd in (*fds, out_fd):
            if fd >= 0:
                os.close(fd)


def _map(fd: int) -> memoryview:
    if not memfd.is_sealed(fd) or not os.fstat(fd).st_size:
        raise AgentError(Reason.BAD_MESSAGE, "what is to be transformed is not a sealed memfd with something in it")
    return memoryview(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ))
