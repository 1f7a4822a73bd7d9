"""What people did to this device by hand, kept on the device: who, when, what, and how it ended.

The newest records alone, whole and durable, written before the act and again after it, so that a power cut between the
two leaves a record without an end. Anybody who may write the state directory may also forge them: they help an honest
operator, they do not stop a thief.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.daemon.askers import Asker
from ota import strictjson
from ota.client.fsops import Fs
from ota.errors import OtaError

log = logging.getLogger(__name__)

FOLDER = "audit"
_FILE = f"{FOLDER}/records.jsonl"
MAX_RECORDS = 64
MAX_FILE_BYTES = 256 << 10
MAX_TEXT = 512


@dataclass(frozen=True, slots=True)
class Deed:
    """One record. `at` is the wall clock, ISO 8601 in UTC; `outcome` is empty while it goes on, then how it ended."""

    at: str
    action: str
    uid: int
    user: str
    facts: Mapping[str, Any]
    outcome: str = ""


class Audit:
    """The records below the state directory of `fs`."""

    def __init__(self, fs: Fs) -> None:
        self._fs = fs

    def begin(self, at: str, action: str, asker: Asker, facts: Mapping[str, Any]) -> Deed:
        """Note that `asker` is about to do something.

        Raises:
            StoreError: `no_space` or `io_error`: what cannot be noted is not done.
        """
        deed = Deed(at, action, asker.uid, asker.name, {key: _short(value) for key, value in facts.items()})
        self._write([*self.records(), deed])
        log.info("audit: %s by %s", action, asker.name, extra={"facts": dict(deed.facts)})
        return deed

    def end(self, deed: Deed, outcome: str) -> None:
        """Note how it ended.

        Raises:
            StoreError: `no_space` or `io_error`.
        """
        ended = dataclasses.replace(deed, outcome=outcome[:MAX_TEXT])
        self._write([ended if known == deed else known for known in self.records()])
        log.info("audit: %s by %s: %s", deed.action, deed.user, ended.outcome)

    def records(self) -> list[Deed]:
        """All that is kept, the oldest first; a damaged line is left out.

        Raises:
            StoreError: `io_error`.
        """
        data = self._fs.read(_FILE, MAX_FILE_BYTES)
        found = (_parse(line) for line in (data or b"").splitlines())
        return [deed for deed in found if deed is not None]

    def _write(self, deeds: list[Deed]) -> None:
        self._fs.make_dirs(FOLDER)
        lines = [json.dumps(dataclasses.asdict(deed), sort_keys=True).encode() + b"\n" for deed in deeds]
        kept = lines[-MAX_RECORDS:]
        while sum(map(len, kept)) > MAX_FILE_BYTES:
            kept = kept[1:]
        self._fs.write_atomic(_FILE, b"".join(kept))


def _short(value: Any) -> Any:
    """Texts cut to size; bytes of a file name that are no UTF-8 as escapes, because JSON has no room for them."""
    return value[:MAX_TEXT].encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _parse(line: bytes) -> Deed | None:
    try:
        return Deed(**strictjson.loads(line, max_bytes=MAX_FILE_BYTES, what="audit record"))
    except (OtaError, TypeError):
        return None
