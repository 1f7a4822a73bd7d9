"""tflite-runtime 2.14: `tflite:cpu`, for boards where nothing newer has wheels. Needs numpy below 2."""

from __future__ import annotations

import numpy as np

from agent.worker.delegates import Options
from agent.worker.delegates.interpreter import INTERPRETER_ERRORS, InterpreterSession, delegated_share
from agent.worker.delegates.model import (
    check_sealed,
    check_tflite,
    import_runtime,
    missing,
    path_of,
    refused,
    version_of,
)


class TFLiteRuntime:
    """tflite-runtime on the CPU.

    Raises:
        ModelError: `runtime_missing`, also under numpy 2, where it imports but makes no interpreter.
    """

    name = "tflite:cpu"
    formats = frozenset({"tflite"})
    driver = ""

    def __init__(self) -> None:
        if int(np.__version__.split(".", 1)[0]) >= 2:
            raise missing("tflite_runtime", "tflite", f"it needs numpy below 2, here is {np.__version__}")
        self._module = import_runtime("tflite_runtime.interpreter", "tflite")
        self.runtime = f"tflite-runtime {version_of('tflite-runtime')}"

    def load(self, fd: int, format: str, options: Options) -> InterpreterSession:
        """See `Delegate.load`. `coverage` is the share that stays with the interpreter's own kernels."""
        check_sealed(fd)
        check_tflite(fd)
        try:
            interpreter = self._module.Interpreter(model_path=path_of(fd), num_threads=options.threads)
        except INTERPRETER_ERRORS as e:
            raise refused(self.runtime, e) from e
        session = InterpreterSession(interpreter, self.name, self.runtime)
        session.coverage = 1.0 - delegated_share(interpreter)
        return session
