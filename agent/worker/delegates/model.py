"""What every delegate does before and around its runtime: check the memfd, name the runtime, word a refusal."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Sequence
from types import ModuleType

from agent import memfd
from agent.errors import ModelError, Reason

MAX_MODEL_BYTES = 1 << 31
_NO_MEMORY = ("bad_alloc", "failed to allocate memory", "out of memory")


def check_sealed(fd: int) -> int:
    """Length of the model in `fd`.

    Raises:
        ModelError: `bad_message` when it could still change, `model_unloadable` when it is empty or too large.
    """
    if not memfd.is_sealed(fd):
        raise ModelError(
            Reason.BAD_MESSAGE,
            "the model's memfd is not sealed",
            hint="only the daemon hands out models, after its checks",
        )
    length = os.fstat(fd).st_size
    if not 0 < length <= MAX_MODEL_BYTES:
        raise ModelError(Reason.MODEL_UNLOADABLE, f"a model of {length} bytes", hint="fetch the release again")
    return length


def check_tflite(fd: int) -> None:
    """Pass a file that begins as a TFLite model.

    Raises:
        ModelError: `model_unloadable`. For runtimes that would read something else, or anything at all, without a word.
    """
    if os.pread(fd, 4, 4) != b"TFL3":
        raise ModelError(Reason.MODEL_UNLOADABLE, "the file is not a TFLite model", hint="check the exported file")


def path_of(fd: int) -> str:
    """A path that opens the memfd; runtimes map it instead of holding a second copy in their heap."""
    return f"/proc/self/fd/{fd}"


def import_runtime(module: str, extra: str) -> ModuleType:
    """Import a runtime's module.

    Raises:
        ModelError: `runtime_missing`, naming the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, SystemError, AttributeError) as e:  # the last two: built for another numpy
        raise missing(module, extra, str(e)) from e


def missing(module: str, extra: str, why: str) -> ModelError:
    """The error of a runtime that is not there, or cannot work here."""
    return ModelError(
        Reason.RUNTIME_MISSING,
        f"{module.split('.')[0]} cannot be used: {why}"[:300],
        hint=f"pip install 'edge-runtime-agent[{extra}]'",
    )


def device_missing(why: str, brought_by: str) -> ModelError:
    """The error of a runtime that is here, without the hardware, driver or vendor's part that it needs."""
    return ModelError(Reason.RUNTIME_MISSING, why[:300], hint=f"it comes with {brought_by}")


def version_of(distribution: str) -> str:
    """Installed version of a package, or `unknown` where a vendor shipped the module without its metadata."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def first_line(paths: Sequence[str]) -> str:
    """What the first of `paths` that can be read begins with; empty for none."""
    for path in paths:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.readline(300).strip()
        except OSError:
            continue
    return ""


def refused(runtime: str, error: Exception, *, line: int = 0) -> ModelError:
    """The error of a model that `runtime` does not take, with the line of its complaint that says most."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    said = (lines or [type(error).__name__])[line][:300]
    if any(words in said.lower() for words in _NO_MEMORY):
        return ModelError(Reason.WORKER_OUT_OF_MEMORY, f"{runtime} got no memory: {said}")
    return ModelError(
        Reason.MODEL_UNLOADABLE,
        f"{runtime} refuses the model: {said}",
        hint="check that the file is whole and its operators are supported",
    )
