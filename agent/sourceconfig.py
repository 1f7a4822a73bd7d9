"""The `[[source]]` tables of `agent.toml`: which kinds there are, and the options of each.

What an option does is the business of the source's own module in `agent.worker.sources`, which checks it once more by
the same `parse_options`. Importable on Python 3.10, on either side of the privilege boundary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.configtable import Table
from agent.sensorconfig import SENSORS
from agent.sourceaddress import check_address

MAX_SIDE = 16384
MAX_WORDS = 256
NETWORK_KINDS = ("rtsp", "http")
"""Kinds that need the network: where workers are units, they run in edge-source.service."""
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """One camera, file or sensor. `options` are checked here and handed to the source process as they are."""

    name: str
    kind: str
    options: Mapping[str, Any]

    @property
    def live(self) -> bool:
        """Whether it has to be waited for, and found again when it is lost."""
        return self.kind not in ("video", "folder", "csv", "wav")

    @property
    def reach(self) -> tuple[object, ...]:
        """What of this source only the device's own file may decide: programs that it runs and addresses that it calls.

        Empty for a source that does neither.
        """
        if self.kind in NETWORK_KINDS:
            return (self.kind, *(self.options[key] for key in ("url", "url_file", "credentials_file")))
        return (self.kind, *self.options["command"]) if self.kind == "pipe" else ()


def parse_source(table: Table) -> SourceConfig:
    """Check one `[[source]]` table.

    Raises:
        ConfigError: `bad_config`, naming the key and what is allowed.
    """
    kind = table.choice("kind", None, tuple(_KINDS))
    name = table.text("name", None)
    options = _KINDS[kind](table)
    table.finish()
    for key in ("url_file", "credentials_file"):
        # the password itself, taken for its file's name, would be in every message that names the file
        if ":" in str(options.get(key, "")).removeprefix("credential:"):
            raise table.bad(f"{key} has a colon: it is the name of a file", "write into that file what you wrote here")
    return SourceConfig(name, kind, options)


def parse_options(kind: str, table: Table) -> dict[str, Any]:
    """The options of a source of `kind`, each of them present.

    Raises:
        ConfigError: as `parse_source`.
    """
    options = _KINDS[kind](table)
    table.finish()
    return options


def parse_size(text: str) -> tuple[int, int]:
    """`640x480` as (640, 480).

    Raises:
        ValueError: it is none, or longer than `MAX_SIDE`.
    """
    found = _SIZE.fullmatch(text)
    if found is None or max(int(found[1]), int(found[2])) > MAX_SIDE:
        raise ValueError(f"{text!r} is no size such as 640x480")
    return int(found[1]), int(found[2])


def _video(table: Table) -> dict[str, Any]:
    return {
        "path": str(table.path("path", None)),
        "policy": table.choice("policy", "live", ("live", "every")),
        "loop": table.flag("loop", False),
        "queue_frames": int(table.number("queue_frames", 4, 1, 64)),
        "fps": table.number("fps", 0, 0, 1000),
    }


def _folder(table: Table) -> dict[str, Any]:
    return {
        "path": str(table.path("path", None)),
        "policy": table.choice("policy", "every", ("live", "every")),
        "loop": table.flag("loop", False),
        "queue_frames": int(table.number("queue_frames", 4, 1, 64)),
        "fps": table.number("fps", 0, 0, 1000),
        "size": _size(table, ""),
    }


def _camera(table: Table) -> dict[str, Any]:
    return {
        "device": str(table.path("device", None)),
        "size": _size(table, ""),
        "fps": table.number("fps", 0, 0, 1000),
        "fourcc": table.choice("fourcc", "", ("", "MJPG", "YUYV")),
        **_live(table, stale_s=2, timeout_s=3),
    }


def _rtsp(table: Table) -> dict[str, Any]:
    return {**_address(table, ("rtsp", "rtsps")), "transport": table.choice("transport", "tcp", ("tcp", "udp")),
            **_live(table, stale_s=2, timeout_s=3)}  # fmt: skip


def _http(table: Table) -> dict[str, Any]:
    return {**_address(table, ("http", "https")), **_live(table, stale_s=2, timeout_s=3)}


def _pipe(table: Table) -> dict[str, Any]:
    command = table.parsed("command", _check_word)
    if not 0 < len(command) <= MAX_WORDS:
        raise table.bad(
            "command is missing", 'write the program and its arguments: command = ["rpicam-vid", "-t", "0"]'
        )
    frames = table.choice("format", None, ("mjpeg", "raw"))
    options = {
        "command": command,
        "format": frames,
        "size": _size(table, "" if frames == "mjpeg" else None),
        "pixels": table.choice("pixels", "bgr24", ("bgr24", "yuv420p", "nv12")),
        "policy": table.choice("policy", "live", ("live", "every")),
        **_live(table, stale_s=5, timeout_s=10),
    }
    if options["pixels"] != "bgr24" and options["size"] and any(side % 2 for side in parse_size(str(options["size"]))):
        raise table.bad(f"size {options['size']} is odd", f"{options['pixels']} needs even sides")
    return options


def _check_word(word: str) -> None:
    if not word or "\0" in word:
        raise ValueError(f"{word!r} is no word of a command")


def _live(table: Table, *, stale_s: float, timeout_s: float) -> dict[str, Any]:
    return {
        "queue_frames": int(table.number("queue_frames", 4, 1, 64)),
        "stale_s": table.number("stale_s", stale_s, 0.1, 3600),
        "timeout_s": table.number("timeout_s", timeout_s, 1, 3600),
    }


def _size(table: Table, default: str | None) -> str:
    text = table.text("size", default)
    if text or default is None:
        try:
            parse_size(text)
        except ValueError as e:
            raise table.bad(f"size: {e}", 'write width and height in pixels: size = "640x480"') from e
    return text


def _address(table: Table, schemes: tuple[str, ...]) -> dict[str, Any]:
    """Where a stream is: `url`, or a file that holds it; user and password in it, or in a file of their own."""
    url, file = table.text("url", ""), table.text("url_file", "")
    if bool(url) == bool(file):
        raise table.bad(
            "url or url_file has to be there, and only one of them", f'add url = "{schemes[0]}://host/path"'
        )
    if url:
        try:
            check_address(url, schemes)
        except ValueError as e:
            raise table.bad(f"url: {e}", f"write {schemes[0]}://host:port/path") from e
    return {"url": url, "url_file": file, "credentials_file": table.text("credentials_file", "")}


_KINDS: Mapping[str, Callable[[Table], dict[str, Any]]] = {
    "video": _video,
    "folder": _folder,
    "camera": _camera,
    "rtsp": _rtsp,
    "http": _http,
    "pipe": _pipe,
    **SENSORS,
}
