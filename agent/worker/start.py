"""Starts the worker program under another interpreter than the one that this package was installed for.

`PYTHON -I agent/worker/start.py ROLE ...` is what `python -m agent.worker.main ROLE ...` is elsewhere. The folder in
which `agent` lies holds packages that were built for the daemon's Python; of that folder `agent` and `ota` can be
imported and nothing else, so that numpy and the runtimes are those of the interpreter that runs this. `--check` in the
place of a role prints the interpreter's version.
Invariants: an interpreter that cannot run workers says so before any worker starts, so that no model is blamed for it;
one that is too old reads this file as far as its own message, so there is no future import.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec

OLDEST = (3, 10)
# What a worker imports beside its runtimes, and the package that brings it.
NEEDED = {"numpy": "numpy", "cv2": "opencv-python-headless", "zstandard": "zstandard"}
NOT_CONFIGURED = 78  # EX_CONFIG


class Lent:
    """Finds `agent` and `ota` in `folder`, and nothing else there."""

    def __init__(self, folder: str) -> None:
        self._folder = [folder]

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """See `importlib.abc.MetaPathFinder`."""
        return PathFinder.find_spec(name, self._folder) if name in ("agent", "ota") else None


def complaint() -> str:
    """Why this interpreter cannot run workers, and in a second line what to do; empty when it can."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < OLDEST:
        oldest = ".".join(str(part) for part in OLDEST)
        return f"it is Python {version}, a worker needs {oldest} or newer\nname a newer Python"
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        packages = " ".join(NEEDED[name] for name in missing)
        return f"it does not have {', '.join(missing)}\n{sys.executable} -m pip install {packages}"
    return ""


def run(words: "list[str]") -> int:
    """Run the role that `words` name; returns its exit status."""
    told = complaint()
    if told:
        why, _, hint = told.partition("\n")
        sys.stderr.write(f"error: {sys.executable} cannot run workers: {why}\nhint: {hint}\n")
        return NOT_CONFIGURED
    here = os.path.realpath(__file__)
    sys.meta_path.insert(0, Lent(os.path.dirname(os.path.dirname(os.path.dirname(here)))))
    from agent.worker.main import main

    if words == ["--check"]:
        print(".".join(str(part) for part in sys.version_info[:3]))
        return 0
    return main(words, entry=("-I", here))


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
