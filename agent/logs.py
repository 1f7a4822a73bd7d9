"""Log lines: JSON for machines, one plain line for a person at a terminal. Control characters never get through raw."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

_EXTRA = ("reason", "hint")


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what came from outside is escaped by JSON itself."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        fields: dict[str, Any] = {
            "t": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields.update({key: value for key in _EXTRA if (value := getattr(record, key, ""))})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class TerminalFormatter(logging.Formatter):
    """Time, level, message; escapes are shown, not obeyed."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, a traceback below it."""
        message = record.getMessage().encode("unicode_escape").decode("ascii")
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname.lower():7} {message}"
        hint = getattr(record, "hint", "")
        line += f" (hint: {hint})" if hint else ""
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(level: str = "INFO", stream: TextIO = sys.stderr) -> None:
    """Log to `stream` in the form that suits whoever reads it."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TerminalFormatter() if stream.isatty() else JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
