"""Fakes behind the real class for TFLite external delegates: a library compiled from `external.c` by the tests."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from agent.worker.delegates import Delegate, DelegateLoader
from tests.fakes.delegates import Expected

SOURCE = Path(__file__).with_name("external.c")
_VERSION = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
LIBRARY = SOURCE.parents[2] / "build" / "fakes" / f"external-{_VERSION}.so"


def compile_library() -> None:
    """Make the library, unless it is there. It uses nothing of the C library, so that a bare compiler is enough."""
    if LIBRARY.exists():
        return
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    unfinished = LIBRARY.with_suffix(f".{os.getpid()}")
    flags = ["-shared", "-fPIC", "-O1", "-ffreestanding", "-nostdlib", "-fno-stack-protector"]
    subprocess.run(["gcc", *flags, "-o", str(unfinished), str(SOURCE)], check=True)
    unfinished.rename(LIBRARY)


def _loader(name: str, mode: str) -> DelegateLoader:
    def load() -> Delegate:
        from agent.worker.delegates.external import ExternalDelegate, Library

        return ExternalDelegate(name, Library(str(LIBRARY), "the tests", settings={"mode": mode}))

    return load


FAKES: dict[str, DelegateLoader] = {
    name: _loader(name, mode)
    for name, mode in {
        "cwrong:npu": "wrong", "clittle:npu": "little", "cnothing:npu": "nothing", "crefuses:npu": "refuses",
        "cends:npu": "ends",
    }.items()
}  # fmt: skip
EXPECTED: dict[str, Expected] = {
    "cwrong:npu": Expected("golden_mismatch", "golden"),
    "clittle:npu": Expected("delegate_fell_back", "load"),
    "cnothing:npu": Expected("delegate_fell_back", "load"),
    "crefuses:npu": Expected("delegate_broken", "load"),
    "cends:npu": Expected("worker_crashed", "golden"),
}
