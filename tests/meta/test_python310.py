"""What runs under a board vendor's Python 3.10 can be imported there.

Third-party packages are replaced by stand-ins, so a bare interpreter will do; what is asked is whether our own modules
keep to the 3.10 standard library and to the few packages that a worker may have.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.meta.sources import ROOT, modules

ALLOWED = {"numpy", "cv2", "zstandard", "ai_edge_litert", "tflite_runtime", "onnxruntime", "openvino"}
SINGLE = ("agent", "agent.errors", "agent.protocol", "ota", "ota.errors", "ota.delta")

IMPORT_ALL = """
import importlib, importlib.abc, importlib.machinery, json, sys
from unittest.mock import MagicMock

class StandIn(MagicMock):
    __path__ = []
    def __mro_entries__(self, bases):
        return (object,)

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    used = set()
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in ("agent", "ota") or top in sys.stdlib_module_names:
            return None
        self.used.add(top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return StandIn()
    def exec_module(self, module):
        pass

sys.meta_path.append(Finder())
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(Finder.used)))
"""


def python310() -> str | None:
    """A working Python 3.10, or None."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in [shutil.which("python3.10"), *sorted(map(str, versions.glob("3.10*/bin/python3.10")))]:
        if candidate and subprocess.run([candidate, "-V"], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def test_worker_side_imports_on_python_310() -> None:
    interpreter = python310()
    if interpreter is None:
        pytest.skip("no Python 3.10 on this machine")
    wanted = [m for m in modules() if m in SINGLE or m.startswith("agent.worker")]
    assert {"agent.protocol", "agent.worker", "agent.worker.main", "ota.delta"} <= set(wanted)
    done = subprocess.run(
        [interpreter, "-S", "-B", "-c", IMPORT_ALL, *wanted], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) <= ALLOWED
