"""Arguments of `edge-ota`: a parser that raises, and the kinds of value that are not plain text."""

from __future__ import annotations

import argparse
import urllib.parse
from typing import NoReturn

from ota import enrolment
from ota.errors import PublishError, Reason
from ota.publisher.tokens import MAX_HOURS

DEFAULT_BROKER_PORT = 8883
MAX_SPREAD_S = 86_400


class Parser(argparse.ArgumentParser):
    """Raises `bad_usage` instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """See `argparse`."""
        raise PublishError(Reason.BAD_USAGE, message, hint=f"{self.prog} --help")


def address(text: str) -> tuple[str, int]:
    """`HOST`, `HOST:PORT` or `[V6]:PORT`."""
    host, separator, port = text.rpartition(":")
    if not separator or (text.startswith("[") and text.endswith("]")):
        host, port = text, str(DEFAULT_BROKER_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST or HOST:PORT")
    return host, int(port)


def listening_address(text: str) -> tuple[str, int]:
    """As `address`, for the enrolment listener."""
    host, port = address(text)
    return (host, port) if text.rstrip("0123456789").endswith(":") else (host, enrolment.DEFAULT_PORT)


def web_address(text: str) -> str:
    """`https://HOST:PORT` with an optional path, or `https://HOST`, which then gets port 443; empty for none."""
    if not text:
        return ""
    parts = urllib.parse.urlsplit(text)
    try:
        port = 443 if parts.port is None else parts.port
    except ValueError:
        port = 0
    odd = parts.username or parts.query or parts.fragment or not text.isprintable() or " " in text
    if parts.scheme != "https" or not parts.hostname or not port or odd:
        raise argparse.ArgumentTypeError(f"{text!r} is not https://HOST:PORT")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"https://{host}:{port}{parts.path.rstrip('/')}"


def hours(text: str) -> int:
    """The life of a token in whole hours."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_HOURS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours from 1 to {MAX_HOURS}")
    return int(text)


def seconds(text: str) -> int:
    """A delay in whole seconds."""
    if not text.isascii() or not text.isdigit() or int(text) > MAX_SPREAD_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {MAX_SPREAD_S}")
    return int(text)
