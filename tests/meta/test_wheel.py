"""The wheel holds everything that an installed daemon needs, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.meta.sources import ROOT, modules

OLDEST_SETUPTOOLS = 77  # the first to read pyproject.toml's licence expression


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is left in the checkout."""
    found = metadata.version("setuptools") if "setuptools" in {d.name for d in metadata.distributions()} else "0"
    if int(found.split(".")[0]) < OLDEST_SETUPTOOLS:
        reason = f"building a wheel needs setuptools {OLDEST_SETUPTOOLS}, found {found}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("agent", "ota", "device-profiles"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_every_module_and_profile(wheel: zipfile.ZipFile) -> None:
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    sources = {str(p.relative_to(ROOT)) for p in modules().values()}
    profiles = {f"agent/device-profiles/{p.name}" for p in (ROOT / "device-profiles").iterdir()}
    assert profiles
    assert names == sources | profiles


def test_an_unpacked_wheel_finds_its_profiles(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import agent.profile as p; print(p.__file__); print(*sorted(p.load_all()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, profiles = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert profiles.split() == sorted(
        p.stem for p in (ROOT / "device-profiles").glob("*.toml") if p.stem != "accessories"
    )


def test_wheel_declares_both_commands(wheel: zipfile.ZipFile) -> None:
    entry_points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "edge-agent = agent.app:main" in entry_points
    assert "edge-ota = agent.app:ota_main" in entry_points
