"""Takes a guard out of a copy of the product and looks whether the tests notice. The working tree is never touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.meta.claims import ROOT
from tests.meta.rows import Guard

# what the tests need; virtual environments and build outputs are not among it
_COPIED = (
    *("agent", "ota", "tests", "device-profiles", "models", "packaging", "docs"),
    *("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"),
)
_TIMEOUT_S = 180
_NO_FAILURE, _FAILURES = 0, 1


@dataclass(frozen=True)
class Verdict:
    """`outcome`: killed, survived, or invalid with the reason in `detail`."""

    guard: Guard
    outcome: str
    detail: str
    seconds: float


class Copy:
    """A copy of the checkout below `folder`, in which one guard at a time is missing."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "copy"
        for name in _COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis")
                shutil.copytree(source, self.root / name, symlinks=True, ignore=ignored)
            elif source.exists():
                self.root.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, self.root / name)
        self._touched_s = time.time()
        loaded = self._python("-c", "import agent, ota; print(agent.__file__, ota.__file__)").stdout.split()
        if not all(Path(path).is_relative_to(self.root) for path in loaded) or len(loaded) != 2:
            raise RuntimeError(f"the copy's tests would import {loaded}")

    def passes(self, tests: Iterable[str]) -> str:
        """Empty when all tests pass in the unchanged copy, else their output."""
        done = self._pytest(tuple(dict.fromkeys(tests)))
        return "" if done.returncode == _NO_FAILURE else done.stdout[-4000:]

    def judge(self, guard: Guard) -> Verdict:
        """Run the guard's tests without the guard."""
        start_s = time.monotonic()
        path = self.root / guard.file
        text = path.read_text()
        if text.count(guard.find) != 1:
            return Verdict(guard, "invalid", f"the text stands {text.count(guard.find)} times in the file", 0.0)
        if guard.find == guard.replace:
            return Verdict(guard, "invalid", "it is replaced by itself", 0.0)
        self._write(path, text.replace(guard.find, guard.replace))
        try:
            compile(path.read_text(), str(path), "exec")
            code, detail = self._ended(guard)
        except SyntaxError as e:
            code, detail = "invalid", str(e)
        finally:
            self._write(path, text)
        return Verdict(guard, code, detail, time.monotonic() - start_s)

    def _ended(self, guard: Guard) -> tuple[str, str]:
        try:
            done = self._pytest(guard.tests)
        except subprocess.TimeoutExpired:
            return "invalid", f"the tests did not end within {_TIMEOUT_S} s"
        if done.returncode == _FAILURES:
            return "killed", ""
        if done.returncode == _NO_FAILURE:
            skipped = "skipped" in done.stdout and "passed" not in done.stdout
            return ("invalid", "its tests were skipped") if skipped else ("survived", "")
        return "invalid", f"pytest ended with {done.returncode}: {done.stdout[-500:]}"

    def _pytest(self, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return self._python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests)

    def _python(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        return subprocess.run(
            [sys.executable, *words],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )

    def _write(self, path: Path, text: str) -> None:
        """Each time with another time stamp, because compiled files are told apart by it, in whole seconds."""
        path.write_text(text)
        self._touched_s += 2
        os.utime(path, (self._touched_s, self._touched_s))
