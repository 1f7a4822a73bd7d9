"""A small real HTTP camera: multipart/x-mixed-replace with numbered JPEG pictures, on a port of the loopback interface.

It can be killed, stalled and brought back, may ask for user and password, and may change its picture's size.

    mjpegserver.py PORT [USER:PASSWORD]     serves until it is killed
"""

from __future__ import annotations

import base64
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np

BOUNDARY = "picture"


def picture(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG whose eight bars say `number`, as `frame_number` reads them."""
    frame = np.zeros((size[1], size[0], 3), np.uint8)
    columns = size[0] // 8
    for bit in range(8):
        if number >> bit & 1:
            frame[:, bit * columns : (bit + 1) * columns] = 255
    return cv2.imencode(".jpg", frame)[1].tobytes()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A camera that is cut off says nothing."""


class MjpegCamera:
    """A camera at `url`. `stalled` makes it send nothing more without closing anything."""

    def __init__(self, size: tuple[int, int] = (160, 120), fps: float = 25.0, login: str = "", port: int = 0) -> None:
        self.size, self.fps, self.stalled = size, fps, False
        self._login = base64.b64encode(login.encode()).decode() if login else ""
        self.port = port or _free_port()
        self.asked: list[str] = []
        self._connections: list[socket.socket] = []
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/video"

    def start(self) -> None:
        """Listen on the port, as after power-on."""
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera._answer(self)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self._server = _Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection, as a process that is killed."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._connections.clear()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        server = self._server
        self.asked.append(request.path)
        if self._login and request.headers.get("Authorization") != f"Basic {self._login}":
            request.send_response(401)
            request.send_header("WWW-Authenticate", 'Basic realm="camera"')
            request.end_headers()
            return
        if not request.path.startswith("/video"):
            request.send_error(404)
            return
        self._connections.append(request.connection)
        request.send_response(200)
        request.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        request.end_headers()
        number = 0
        while self._server is server:
            if not self.stalled:
                data = picture(number % 256, self.size)
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                request.wfile.write(head.encode() + data + b"\r\n")
                number += 1
            time.sleep(1 / self.fps)


def _free_port() -> int:
    from tests.fakes.ports import free_port  # not there where this runs as a program, which is given its port

    return free_port()


if __name__ == "__main__":
    MjpegCamera(port=int(sys.argv[1]), login="".join(sys.argv[2:])).start()
    threading.Event().wait()
