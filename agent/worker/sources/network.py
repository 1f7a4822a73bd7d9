"""RTSP and HTTP streams (H.264, MJPEG, whatever FFmpeg reads), through OpenCV.

It is not a player: nothing is buffered, the newest frame counts. Invariants: user and password of an address are in no
message, log or process title, and FFmpeg, which would print them, is mute; only the protocols of the configured scheme
are spoken, so that a hostile playlist cannot name a file; looking for a host that is not there takes a second, not a
connection's time-out.
"""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cv2

from agent.configtable import Table
from agent.errors import ConfigError, Reason, SourceError
from agent.sourceaddress import PORTS, check_address, shown, with_credentials
from agent.sourceconfig import parse_options
from agent.worker.sources.capture import Capture, Terms

KNOCK_S = 1.0
ANSWER_S = 1.0
# so much of a stream is examined before its first frame is given out: first what a usual one needs, then what any may
QUICK_US, THOROUGH_US = 200_000, 3_000_000
_PROTOCOLS = {"rtsp": "rtsp,rtsps,rtp,tcp,udp,tls,crypto", "http": "http,https,tcp,tls,crypto"}
_SCHEMES = {"rtsp": ("rtsp", "rtsps"), "http": ("http", "https")}


class Stream:
    """How one address is opened.

    Args:
        kind: `rtsp` or `http`.
        url: with user and password, if it needs any.
        transport: of RTSP: `tcp` or `udp`.
        timeout_s: bounds the opening, and the wait for a frame later.

    Raises:
        ConfigError: `bad_config`, an address of another kind.
    """

    def __init__(self, kind: str, url: str, transport: str, timeout_s: float) -> None:
        try:
            self._parts = check_address(url, _SCHEMES[kind])
        except ValueError as e:
            raise ConfigError(Reason.BAD_CONFIG, f"the address of an {kind} source: {e}") from e
        self.name = shown(url)
        self._kind, self._url, self._transport, self._timeout_s = kind, url, transport, timeout_s
        self._thorough = False

    def open(self) -> cv2.VideoCapture:
        """Connect and find the picture stream.

        Raises:
            SourceError: `source_missing` nobody answers there; `source_refused` user or password; `source_lost` the
                connection is there and stays silent; `source_unreadable` there is nothing that can be decoded.
        """
        self._knock()
        analyze_us = THOROUGH_US if self._thorough else QUICK_US
        options = {"protocol_whitelist": _PROTOCOLS[self._kind], "analyzeduration": analyze_us, "fpsprobesize": 0}
        if self._kind == "rtsp":
            options["rtsp_transport"] = self._transport
        os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "|".join(f"{key};{value}" for key, value in options.items())
        os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        limit_ms = round(1000 * self._timeout_s)
        parameters = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit_ms + analyze_us // 1000,
                      cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit_ms, cv2.CAP_PROP_N_THREADS, 1]  # fmt: skip
        capture = cv2.VideoCapture()
        if capture.open(self._url, cv2.CAP_FFMPEG, parameters):
            self._thorough = False
            return capture
        # a stream that says its size only with a key frame, seconds apart, needs a longer look
        self._thorough = not self._thorough
        raise self._why()

    def _knock(self) -> None:
        """Whether anybody listens there: OpenCV would not say, and would take its whole time-out."""
        try:
            self._connect(min(KNOCK_S, self._timeout_s)).close()
        except socket.gaierror as e:
            raise SourceError(
                Reason.SOURCE_MISSING, f"{self.name}: no such host: {e.strerror}", hint="check name and name server"
            ) from e
        except ConnectionRefusedError as e:
            raise SourceError(
                Reason.SOURCE_MISSING, f"{self.name}: refused: nothing listens there", hint="check port and camera"
            ) from e
        except OSError as e:
            raise SourceError(
                Reason.SOURCE_MISSING,
                f"{self.name}: {e.strerror or 'no answer'}",
                hint="check power, cable and network of the camera",
            ) from e

    def _connect(self, timeout_s: float) -> socket.socket:
        host, scheme = self._parts.hostname or "", self._parts.scheme
        return socket.create_connection((host, self._parts.port or PORTS[scheme]), timeout_s)

    def _why(self) -> SourceError:
        """Why FFmpeg found no stream, asked in clear words; it does not say."""
        status = self._status() if self._parts.scheme in ("rtsp", "http") else 0
        if status in (401, 403):
            given = "its user and password are refused" if "@" in self._parts.netloc else "it wants user and password"
            return SourceError(Reason.SOURCE_REFUSED, f"{self.name}: {given} ({status})")
        if status >= 400:
            return SourceError(
                Reason.SOURCE_MISSING, f"{self.name}: it answers {status}", hint="check the path of the address"
            )
        if status < 0:
            return SourceError(Reason.SOURCE_LOST, f"{self.name}: it takes connections and does not answer")
        return SourceError(
            Reason.SOURCE_UNREADABLE,
            f"{self.name}: no picture stream that can be decoded",
            hint="look at it with ffprobe; H.264 and MJPEG work; a larger timeout_s gives a slow camera more time",
        )

    def _status(self) -> int:
        """What the server answers to a bare request; -1 for nothing, 0 for nonsense."""
        path = f"{self._parts.path or '/'}{'?' if self._parts.query else ''}{self._parts.query}"
        host = self._parts.netloc.rpartition("@")[2]
        if self._kind == "rtsp":
            request = f"DESCRIBE rtsp://{host}{path} RTSP/1.0\r\nCSeq: 1\r\nAccept: application/sdp\r\n\r\n"
        else:
            request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{self._login()}\r\n"
        try:
            with self._connect(ANSWER_S) as sock:
                sock.settimeout(ANSWER_S)
                sock.sendall(request.encode("ascii", "replace"))
                words = sock.recv(64).split(maxsplit=2)
        except OSError:
            return -1
        return int(words[1]) if len(words) > 1 and words[1].isdigit() and len(words[1]) == 3 else 0

    def _login(self) -> str:
        """What FFmpeg itself would send, so that a wrong path is not taken for a wrong password."""
        if self._parts.username is None:
            return ""
        login = f"{unquote(self._parts.username)}:{unquote(self._parts.password or '')}"
        return f"Authorization: Basic {base64.b64encode(login.encode()).decode()}\r\n"


def open_network(kind: str, options: Mapping[str, Any]) -> Capture:
    """Open the stream that `options` describe, as `agent.sourceconfig` has them for `kind`: the daemon has put the
    address in the place of `url_file`, and what `credentials_file` holds in its place.

    Raises:
        ConfigError: `bad_config`.
        SourceError: as `Stream.open`.
    """
    checked = parse_options(kind, Table(options, f"{kind} source", Path("/")))
    url = str(checked["url"])
    if checked["credentials_file"]:
        try:
            url = with_credentials(url, str(checked["credentials_file"]))
        except ValueError as e:
            raise ConfigError(Reason.BAD_CONFIG, f"credentials_file: {e}", hint="write user:password into it") from e
    stream = Stream(kind, url, str(checked.get("transport", "tcp")), float(checked["timeout_s"]))
    terms = Terms(stream.name, int(checked["queue_frames"]), float(checked["stale_s"]), float(checked["timeout_s"]))
    return Capture(terms, stream.open)
