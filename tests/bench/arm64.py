"""A Debian arm64 tree with this project's worker side in it, run by qemu-aarch64 in user mode.

Needs root, mmdebstrap and qemu-user-static (about a minute and 200 MB, kept in `.cache/arm64`). It emulates the
instruction set, not the memory model: the host's stronger ordering stands behind what runs here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
PYTHON = "3.11"
PROGRAMS = ("mmdebstrap", "qemu-aarch64-static")
REGISTERED = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
WHEELS = ("numpy",)
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux2014_aarch64")
PARTS = ("agent", "ota", "tests/bench")


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if os.geteuid() != 0:
        return "a tree of another architecture needs root"
    absent = [p for p in PROGRAMS if shutil.which(p) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian packages mmdebstrap, qemu-user-static, binfmt-support)"
    return None if _registered() else "the kernel does not take qemu-aarch64 as an interpreter (binfmt_misc)"


def run(module: str, *arguments: str) -> int:
    """`python -m MODULE ARGUMENTS` inside the tree; its exit status, 1 where nothing can be emulated."""
    why = missing()
    if why is not None:
        print(f"left out: {why}", file=sys.stderr)
        return 1
    tree = _tree()
    inside = tree / "project"
    shutil.rmtree(inside, ignore_errors=True)
    for part in PARTS:
        shutil.copytree(ROOT / part, inside / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        "PATH": f"{os.defpath}:/usr/sbin:/sbin",
        "PYTHONPATH": "/project:/wheels",
        "OPENBLAS_NUM_THREADS": "1",
        "HOME": "/",
    }
    command = ["chroot", str(tree), "/usr/bin/python3", "-m", module, *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def _tree() -> Path:
    tree = ROOT / ".cache" / "arm64" / SUITE
    if not tree.is_dir():
        unfinished = tree.with_name(f"{SUITE}.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        packages = "--include=python3-minimal,libpython3-stdlib"
        words = ["mmdebstrap", "--quiet", "--arch=arm64", "--variant=minbase", packages, SUITE, str(unfinished)]
        subprocess.run(words, check=True)
        _unpack_wheels(unfinished)
        unfinished.rename(tree)
    return tree


def _unpack_wheels(tree: Path) -> None:
    folder = tree / "root" / "wheels"
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps", *platforms,
         "--python-version", PYTHON, "--dest", str(folder), *WHEELS],
        check=True,
    )  # fmt: skip
    for wheel in folder.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree / "wheels")


def _registered() -> bool:
    """Whether the kernel runs arm64 programs; a container has to mount the registry, and Debian registers at boot."""
    if not REGISTERED.parent.joinpath("status").exists():
        mount = ["mount", "-t", "binfmt_misc", "binfmt_misc", str(REGISTERED.parent)]
        subprocess.run(mount, check=False, capture_output=True)
    if not REGISTERED.exists() and shutil.which("update-binfmts"):
        subprocess.run(["update-binfmts", "--enable", "qemu-aarch64"], check=False, capture_output=True)
    return REGISTERED.exists()
