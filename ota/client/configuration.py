"""Settings documents on the disk and their record in the journal: `config/<sha256>.toml`, one line of `settings.step`.

Not here: what a document says, and whether the device works with it (whoever embeds this decides), nor what the states
mean (`settings`).
Invariants: a document is durable before the record names it; the record is durable before a trial begins; a document is
used only if it is still the one that its name says.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace

from ota.client import settings
from ota.client.desired import MAX_SETTINGS_BYTES
from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.machine import Outcome
from ota.client.settings import Origin, SettingsRecord
from ota.errors import Reason, StoreError

DIRECTORY = "config"


class Configuration:
    """The settings of one device.

    Args:
        fs: the state directory. journal: its record, which nobody else opens meanwhile.

    Raises:
        StoreError: the disk cannot be written.
    """

    def __init__(self, fs: Fs, journal: Journal) -> None:
        self._fs = fs
        self._journal = journal
        fs.sweep(DIRECTORY)
        with contextlib.suppress(StoreError):  # a disk that turned read-only must not keep anybody from starting
            self._collect()  # a cut may have come after the record and before this

    @property
    def record(self) -> SettingsRecord:
        """What is in force and on trial."""
        return self._journal.record.settings

    def propose(self, document: bytes, file_sha256: str, origin: Origin, expect: tuple[str, ...]) -> str:
        """Keep `document` and put it on trial at the next start; returns its hash.

        Raises:
            StoreError: `no_space` or `io_error`.
            IllegalTransitionError: another document is on trial.
        """
        sha256 = hashlib.sha256(document).hexdigest()
        self._fs.make_dirs(DIRECTORY)
        self._fs.write_atomic(_path(sha256), document)
        self.apply(settings.TrialProposed(sha256, file_sha256, origin, expect))
        return sha256

    def apply(self, event: settings.Event) -> Outcome | None:
        """Journal what `event` makes of the settings; documents that nobody needs any more go.

        Raises:
            StoreError: the journal cannot be written; the record stays as it was.
        """
        record, outcome = settings.step(self.record, event)
        # an outcome goes to every copy, so that no older one names a document that is gone
        self._journal.save(replace(self._journal.record, settings=record), commit=outcome is not None)
        if outcome is not None:
            self._collect()
        return outcome

    def document(self, sha256: str) -> str:
        """The text of a kept document.

        Raises:
            StoreError: `not_found`, or `payload_corrupt` when it is not what its name says; `io_error`.
        """
        data = self._fs.read(_path(sha256), MAX_SETTINGS_BYTES)
        if data is None:
            raise StoreError(Reason.NOT_FOUND, f"{_path(sha256)} is gone", hint="apply the settings again")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError(Reason.PAYLOAD_CORRUPT, f"{_path(sha256)} is damaged", hint="apply the settings again")
        return data.decode()

    def _collect(self) -> None:
        keep = {f"{sha256}.toml" for sha256 in (self.record.active, self.record.trial)}
        for name in self._fs.names(DIRECTORY):
            if name not in keep:
                self._fs.remove(f"{DIRECTORY}/{name}")


def _path(sha256: str) -> str:
    return f"{DIRECTORY}/{sha256}.toml"
