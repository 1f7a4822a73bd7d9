"""python-tuf's metadata classes for the client. Not what is done with them: see `ota.client.verify`.

tuf would write documents through temporary files; here `ota.client.fsops` writes, so the daemon need not carry
`tempfile`, `shutil` and the compression libraries behind them. Nor does it sign, least of all with GnuPG.
"""

from __future__ import annotations

from ota.deferred import deferred

with deferred("shutil", "tempfile", "securesystemslib._gpg.functions"):
    from tuf.api.metadata import (
        DelegatedRole,
        Metadata,
        MetaFile,
        Root,
        Signed,
        Snapshot,
        TargetFile,
        Targets,
        Timestamp,
    )

__all__ = [
    "DelegatedRole",
    "MetaFile",
    "Metadata",
    "Root",
    "Signed",
    "Snapshot",
    "TargetFile",
    "Targets",
    "Timestamp",
]
