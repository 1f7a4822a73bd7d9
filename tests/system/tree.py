"""A Debian tree for `systemd-nspawn`, made once and kept.

Needs root, mmdebstrap and a Debian mirror (about 20 s, 260 MB). The tree is never written to again: containers boot on
a volatile overlay. It lies in `EDGE_TREE_CACHE`, or in `.cache/trees` of the checkout, named after what is in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
PYTHON = (3, 11)  # the suite's own: packages installed for the tests run in the tree only under the same minor version
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "ca-certificates", "procps", "mosquitto"),
    # systemd loads these when a credential is sealed to a TPM
    *("libtss2-esys-3.0.2-0", "libtss2-rc0", "libtss2-tcti-swtpm0"),
)
PROGRAMS = ("mmdebstrap", "systemd-nspawn", "nsenter")


def missing() -> str | None:
    """Why no container can run here, or None."""
    if os.geteuid() != 0:
        return "a container with systemd needs root"
    if sys.version_info[:2] != PYTHON:
        return f"the {SUITE} tree has Python {PYTHON[0]}.{PYTHON[1]}, the tests run under {sys.version.split()[0]}"
    absent = [p for p in PROGRAMS if shutil.which(p) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@contextmanager
def tree() -> Iterator[Path]:
    """The tree, built when it is not there; nobody else boots it meanwhile (nspawn refuses a second boot).

    Raises:
        subprocess.CalledProcessError: mmdebstrap failed; its output is in the message on stderr.
    """
    digest = hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("EDGE_TREE_CACHE") or ROOT / ".cache" / "trees")
    cache.mkdir(parents=True, exist_ok=True)
    ready = cache / f"{SUITE}-{digest}"
    with open(f"{ready}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.is_dir():
            unfinished = Path(f"{ready}.new")
            shutil.rmtree(unfinished, ignore_errors=True)
            include = ",".join(PACKAGES)
            subprocess.run(
                ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={include}", SUITE, str(unfinished)],
                check=True,
            )
            unfinished.rename(ready)
        yield ready
