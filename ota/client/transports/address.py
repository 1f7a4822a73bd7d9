"""Where a repository behind a web server is. Pure, and light: the command line checks a configuration with it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Address:
    """Where the repository is: `path` begins with `/` and does not end with one, or is empty; it is kept as it was
    written, percent signs included."""

    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}{self.path}"


def parse_address(text: str) -> Address:
    """Parse `https://host[:port][/path]`.

    Raises:
        ValueError: saying what is wrong.
    """
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError(f"{text!r} is not an https:// address")
    if parts.username is not None or parts.query or parts.fragment or "#" in text or "?" in text:
        raise ValueError(f"{text!r} holds more than host, port and path")
    if not all(0 < len(label) < 64 for label in parts.hostname.removesuffix(".").split(".")) or parts.port == 0:
        raise ValueError(f"{text!r} names a host or a port that cannot be")
    if any(ord(character) < 33 or ord(character) > 126 for character in text):
        raise ValueError(f"{text!r} holds characters that do not belong into an address")
    return Address(parts.hostname, parts.port or 443, parts.path.rstrip("/"))
