"""An RTSP camera that can be killed, stopped, absent and brought back: the real server of `rtspserver.py` as a process.

Needs Debian's gir1.2-gst-rtsp-server-1.0, python3-gi and GStreamer's base, good and ugly plugins.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fakes.ports import free_port

PYTHON = "/usr/bin/python3"
SERVER = Path(__file__).with_name("rtspserver.py")
PROBE = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import Gst; Gst.init(None); " \
    "assert all(map(Gst.ElementFactory.find, ('videotestsrc', 'x264enc', 'rtph264pay')))"  # fmt: skip


def require() -> None:
    """Skip by name where the server cannot run; under CI=true that is a failure."""
    done = subprocess.run([PYTHON, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = f"no GStreamer RTSP server: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


class RtspCamera:
    """A camera at `url`, off at first."""

    def __init__(self, size: str = "320x240", fps: int = 15, user: str = "", password: str = "") -> None:
        self.port = free_port()
        self.size, self._fps, self._login = size, fps, (user, password)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/cam"

    def start(self) -> None:
        """Power on; returns when it listens."""
        command = [PYTHON, str(SERVER), str(self.port), "--size", self.size, "--fps", str(self._fps)]
        if self._login[0]:
            command += ["--user", self._login[0], "--password", self._login[1]]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        """Power off."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def stall(self) -> None:
        """Take the network away, or hang: connections stay, nothing comes."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """The opposite of `stall`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
