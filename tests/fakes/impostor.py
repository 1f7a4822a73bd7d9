"""A TLS server that is no broker: presents a certificate, reads what the client says, answers with given bytes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Sequence

from tests.fakes.broker import Identity


class Impostor:
    """Listens on a loopback port until closed; every connection gets `script`, one item after each thing it says.

    `heard` holds what each connection sent before it ended, decrypted; a client that refuses the certificate sends
    nothing. Without `identity` it speaks plain TCP.
    """

    def __init__(self, identity: Identity | None, script: Sequence[bytes] = (), *, hold: bool = True) -> None:
        self._script = script
        self._hold = hold
        self._context = None
        if identity is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(identity.certificate, identity.key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.heard: list[bytes] = []
        self._closing = threading.Event()
        self._talking: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._talking is not None:
            with contextlib.suppress(OSError):
                self._talking.shutdown(socket.SHUT_RDWR)
        # accept() does not notice that its socket was closed
        with socket.socket() as poke:
            poke.connect_ex(("127.0.0.1", self.port))
        self._thread.join(5)
        self._listener.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            raw, _ = self._listener.accept()
            with raw:
                raw.settimeout(5)
                try:
                    self._talk(raw)
                except OSError:
                    pass  # the client hung up, as it should

    def _talk(self, raw: socket.socket) -> None:
        self.heard.append(b"")
        if self._context is None:
            self._converse(raw)
            return
        with self._context.wrap_socket(raw, server_side=True) as sock:
            self._converse(sock)

    def _converse(self, sock: socket.socket) -> None:
        self._talking = sock
        for answer in self._script:
            said = sock.recv(65536)
            self.heard[-1] += said
            if not said:
                return
            sock.sendall(answer)
        if not self._hold:
            return
        while not self._closing.is_set():
            said = sock.recv(65536)
            self.heard[-1] += said
            if not said:
                return
