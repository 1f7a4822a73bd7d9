"""Addresses of network sources, and how user and password stay out of every message, log and command line.

Importable on Python 3.10 with the standard library alone. It opens nothing.
Invariant: no message of an error raised here quotes what may hold a password; `shown` never returns one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

MAX_URL_CHARS = 2000
PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}
_PLAIN = re.compile(r"[!-~]+")


def check_address(url: str, schemes: Sequence[str]) -> SplitResult:
    """The parts of `url`.

    Raises:
        ValueError: it is no address of one of `schemes` with a host; the text quotes nothing of it.
    """
    if len(url) > MAX_URL_CHARS or not _PLAIN.fullmatch(url):
        raise ValueError(f"not one word of at most {MAX_URL_CHARS} plain characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("host or port cannot be read") from None  # its text may quote the password
    if parts.scheme not in schemes:
        raise ValueError(f"the address does not begin with {' or '.join(f'{s}://' for s in schemes)}")
    if not parts.hostname or port == 0:
        raise ValueError("the address names no host")
    return parts


def shown(url: str) -> str:
    """`url` as people may see it: scheme, host, port and path; no user, password, query or fragment, and of the path
    no part with a `=`, behind which some cameras want the password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "(an address that cannot be read)"
    host = f"[{host}]" if ":" in host else host
    path = "/".join("…" if "=" in part else part for part in parts.path.split("/"))
    return urlunsplit((parts.scheme, f"{host}:{port}" if port else host, path, "", ""))


def with_credentials(url: str, credentials: str) -> str:
    """`url` with `credentials`, "user:password", in the place of any that it has.

    Raises:
        ValueError: there is no colon in `credentials`, or a line break.
    """
    user, colon, password = credentials.partition(":")
    if not colon or not credentials.isprintable():
        raise ValueError("not one line of user:password")
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{quote(user, safe='')}:{quote(password, safe='')}@{host}"
    return urlunsplit((parts.scheme, netloc, parts.path, parts.query, parts.fragment))
