"""The privilege boundary as imports: who may load what, directly or through any other module of the project."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.demo.footprint import FOREIGN, NEEDLESS, NEEDLESS_PARTS
from tests.meta.sources import ROOT, closure, modules

RUNTIMES = {"numpy", "cv2", "onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime", "tensorrt"}
NETWORK = {"paho", "tuf", "securesystemslib", "cryptography", "ssl", "requests", "urllib3", "http", "urllib.request"}
# package: what none of its modules may load
WALLS = {
    "ota": {"agent"},
    "agent.daemon": RUNTIMES,
    "ota.client": RUNTIMES | {"ota.publisher"},
    "agent.worker": NETWORK | {"agent.daemon", "agent.app", "ota.client", "ota.publisher"},
    "agent.protocol": RUNTIMES | NETWORK,
}


def inside(package: str) -> list[str]:
    return [m for m in modules() if m == package or m.startswith(package + ".")]


@pytest.mark.parametrize("package", WALLS)
def test_no_module_loads_what_its_side_of_the_wall_must_not(package: str) -> None:
    members = inside(package)
    assert members, f"{package} has no modules"
    broken = [
        " -> ".join(chain)
        for member in members
        for loaded, chain in closure(member).items()
        if loaded in WALLS[package]
    ]
    assert not broken, "\n".join(sorted(set(broken)))


@pytest.mark.parametrize(
    ("package", "banned"),
    [
        ("agent.daemon", RUNTIMES),
        ("ota.client", RUNTIMES),
        ("agent.worker.main", NETWORK | {"asyncio"}),
    ],
)
def test_what_is_really_loaded_agrees(package: str, banned: set[str]) -> None:
    """Catches what syntax cannot: a third-party module that brings a banned one along."""
    code = "import importlib, sys\nfor m in sys.argv[2:]: importlib.import_module(m)\n"
    code += "print(*sorted(set(sys.argv[1].split(',')) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, ",".join(banned), *inside(package)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stdout + done.stderr


def test_starting_the_daemon_loads_nothing_that_it_has_no_use_for() -> None:
    """Memory lost in silence: one import at the top of one module, or of a dependency's next version."""
    code = "import sys\nfrom agent import app\nnames = set(sys.argv[1:])\n"
    code += "sys.argv[1:] = ['run', '--config', '/nowhere/a.toml']\nassert app.main()\n"
    code += "print(*sorted(names & set(sys.modules)))"
    command = [sys.executable, "-c", code, *FOREIGN, *NEEDLESS, *NEEDLESS_PARTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stdout + done.stderr


def test_a_chain_of_imports_is_followed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ota").mkdir()
    texts = {"a.py": "def f():\n    from ota.b import x", "b.py": "from . import c", "c.py": "import agent.x"}
    for name, text in texts.items():
        (tmp_path / "ota" / name).write_text(text)
    (tmp_path / "ota" / "__init__.py").touch()
    monkeypatch.setattr("tests.meta.sources.ROOT", tmp_path)
    assert closure("ota.a")["agent"] == ("ota.a", "ota.b", "ota.c", "agent")
