"""TFLite external delegates: `litert:edgetpu`, `litert:ethosu`, `litert:vx`, vendors' libraries for their accelerators.

The table of libraries is closed: nothing that comes from outside, no model, release, profile or setting, can name one.
Invariants: of the CPU's kernels only the plain ones are there, so that what XNNPACK would take is not mistaken for the
accelerator's; a graph that mostly stays on the CPU is refused, with the share that was taken.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from agent.errors import ModelError, Reason
from agent.worker.delegates import Options
from agent.worker.delegates.interpreter import INTERPRETER_ERRORS, InterpreterSession, delegated_share, operators
from agent.worker.delegates.model import (
    check_sealed,
    check_tflite,
    device_missing,
    import_runtime,
    path_of,
    refused,
    version_of,
)

# Of all nodes. Below it the CPU is what runs the graph, and the accelerator's name on it would be wrong.
MIN_SHARE = 0.5


@dataclass(frozen=True)
class Library:
    """A vendor's delegate.

    Attributes:
        path: an absolute path, or a name that the system's linker finds.
        brought_by: for people.
        own_op: the custom operator into which the vendor's compiler packs what runs on the accelerator. One such node
            may stand for a whole network, so a share of nodes says little: one must be there, and all be taken. Empty
            for a library that takes models as they are; then `MIN_SHARE` of the nodes must be taken.
        settings: the library's own options.
    """

    path: str
    brought_by: str
    own_op: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


LIBRARIES: Mapping[str, Library] = {
    "litert:edgetpu": Library("libedgetpu.so.1", "Coral's Debian package libedgetpu1-std", own_op="edgetpu-custom-op"),
    "litert:ethosu": Library(
        "/usr/lib/libethosu_delegate.so", "NXP's tflite-ethosu-delegate of the i.MX 93 image", own_op="ethos-u"
    ),
    "litert:vx": Library("/usr/lib/libvx_delegate.so", "NXP's tensorflow-lite-vx-delegate of the i.MX 8M Plus image"),
}


class ExternalDelegate:
    """An accelerator behind a vendor's library.

    Args:
        name: of the delegate.
        library: one of `LIBRARIES`.

    Raises:
        ModelError: `runtime_missing` without the library or without TFLite, `delegate_broken` for a library that the
            linker refuses.
    """

    formats = frozenset({"tflite"})

    def __init__(self, name: str, library: Library) -> None:
        self.name = name
        self._library = library
        self._module, self.runtime = _tflite()
        try:
            found = ctypes.CDLL(library.path)
            _ = found.tflite_plugin_create_delegate, found.tflite_plugin_destroy_delegate
        except AttributeError as e:
            raise ModelError(Reason.DELEGATE_BROKEN, f"{name}: {library.path} is no TFLite delegate: {e}") from e
        except OSError as e:
            if "cannot open shared object file" in str(e):
                raise device_missing(f"{name}: {e}", library.brought_by) from e
            raise ModelError(
                Reason.DELEGATE_BROKEN, f"{name}: {e}", hint=f"install it again: {library.brought_by}"
            ) from e
        # it tells no version; another library of that name is another file
        self.driver = library.path

    def load(self, fd: int, format: str, options: Options) -> InterpreterSession:
        """See `Delegate.load`. The device is opened here and belongs to the session.

        Raises:
            ModelError: also `delegate_broken`: the library finds no device, or none that it can use.
        """
        check_sealed(fd)
        check_tflite(fd)
        library = self._library
        try:
            delegate = self._module.load_delegate(library.path, dict(library.settings))
        except (*INTERPRETER_ERRORS, OSError) as e:
            said = " ".join(str(e).split())
            raise ModelError(
                Reason.DELEGATE_BROKEN,
                f"{self.name} does not start: {said}"[:300],
                hint="is the accelerator plugged in, its driver loaded, and may the worker open it?",
            ) from e
        try:
            interpreter = self._module.Interpreter(
                model_path=path_of(fd),
                num_threads=options.threads,
                experimental_delegates=[delegate],
                experimental_op_resolver_type=self._module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            )
        except INTERPRETER_ERRORS as e:
            raise refused(self.runtime, e) from e
        session = InterpreterSession(interpreter, self.name, self.runtime)
        session.coverage = delegated_share(interpreter)
        check_share(self.name, library, operators(interpreter), session.coverage)
        return session


def check_share(name: str, library: Library, taken: Mapping[str, tuple[int, int]], coverage: float) -> None:
    """Pass a graph that runs on the accelerator in earnest.

    Args:
        name: of the delegate.
        taken: of each operator, how many nodes were taken over, and how many there are.
        coverage: share of all nodes that were taken over.

    Raises:
        ModelError: `delegate_fell_back`, with what was taken.
    """
    why, hint = "", "use litert:cpu"
    got, count = taken.get(library.own_op, (0, 0))
    if not library.own_op:
        if coverage < MIN_SHARE:
            why = f"takes {coverage:.0%} of the nodes, less than {MIN_SHARE:.0%}"
    elif not count:
        why, hint = f"takes 0% of the nodes: none is {library.own_op}", "run the model through the vendor's compiler"
    elif got < count:
        why = f"takes {coverage:.0%} of the nodes, and {got} of {count} that are {library.own_op}"
    if why:
        raise ModelError(Reason.DELEGATE_FELL_BACK, f"{name} {why}", hint=hint)


def _tflite() -> tuple[ModuleType | Any, str]:
    """The interpreter that is here, LiteRT's before the older one, and its version."""
    if importlib.util.find_spec("ai_edge_litert") is None and importlib.util.find_spec("tflite_runtime") is not None:
        return import_runtime("tflite_runtime.interpreter", "tflite"), f"tflite-runtime {version_of('tflite-runtime')}"
    return import_runtime("ai_edge_litert.interpreter", "litert"), f"litert {version_of('ai-edge-litert')}"
