"""A real nginx as a child process on a loopback port, serving a repository over mutual TLS as the HTTPS guide shows.

Needs `nginx` (Debian package nginx-light) and the standard library.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.fakes.broker import Identity
from tests.fakes.ports import free_port

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "https.md"
_START_S = 10.0
_CONFIGURATION = """\
daemon off;
master_process {master};
{user}
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 256; }}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
{server}
}}
"""


class WebServer:
    """One nginx with the `server` block of the guide, its port and paths replaced.

    Args:
        directory: for its configuration and logs.
        repository: what it serves.
        server: its own certificate; `server.ca` is what clients are checked against.
        lines: further lines of the server block, such as a fault to be tested.
    """

    def __init__(
        self, directory: Path, repository: Path, server: Identity, *, host: str = "127.0.0.1", lines: str = ""
    ) -> None:
        self.directory = directory
        self.host = host
        self.port = free_port(host)
        self._repository = repository
        self._server = server
        self._lines = lines
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def available() -> bool:
        """Whether nginx is installed."""
        return _nginx() is not None

    @property
    def url(self) -> str:
        """What a device is configured with."""
        return f"https://{self.host}:{self.port}/edge"

    def __enter__(self) -> WebServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until the port answers.

        Raises:
            RuntimeError: nginx is missing, or ended at once; the text holds its log.
        """
        program = _nginx()
        if program is None:
            raise RuntimeError("nginx is not installed (Debian package nginx-light)")
        configuration = self.directory / "nginx.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                directory=self.directory,
                master="on",
                user="user root;" if os.geteuid() == 0 else "",
                server=self._server_block(),
            )
        )
        with (self.directory / "stderr.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-p", str(self.directory), "-c", str(configuration)], stdin=subprocess.DEVNULL, stderr=log
            )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((self.host, self.port)) == 0:
                    return
            time.sleep(0.01)
        self.stop()
        raise RuntimeError(f"nginx did not come up: {(self.directory / 'stderr.log').read_text()[-2000:]}")

    def stop(self) -> None:
        """End it at once."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            process.wait(10)

    def requests(self) -> list[str]:
        """Lines of the access log."""
        path = self.directory / "access.log"
        return path.read_text().splitlines() if path.exists() else []

    def _server_block(self) -> str:
        block = server_block(GUIDE.read_text())
        replaced = {
            "listen": f"{self.host}:{self.port} ssl",
            "ssl_certificate": self._server.certificate,
            "ssl_certificate_key": self._server.key,
            "ssl_client_certificate": self._server.ca,
            "alias": f"{self._repository}/$1",
        }
        for key, value in replaced.items():
            block, count = re.subn(rf"(?m)^(\s*){key} [^;]*;", lambda m: f"{m[1]}{key} {value};", block)  # noqa: B023
            if not count:
                raise RuntimeError(f"the guide's server block has no {key}")
        head, brace, tail = block.rpartition("}")
        return f"{head}{self._lines}\n{brace}{tail}"


def server_block(guide: str) -> str:
    """The nginx configuration that a guide shows."""
    match = re.search(r"(?ms)^```nginx\n(.*?)^```", guide)
    if match is None:
        raise RuntimeError("the guide shows no nginx configuration")
    return match[1]


def _nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
