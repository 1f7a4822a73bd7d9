"""Arguments of `edge-ota`: a parser that raises, and the two kinds of value that are not plain text."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ota.errors import PublishError, Reason

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


def seconds(text: str) -> int:
    """A delay in whole seconds."""
    if not text.isascii() or not text.isdigit() or int(text) > MAX_SPREAD_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {MAX_SPREAD_S}")
    return int(text)
