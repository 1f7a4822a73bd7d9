"""LiteRT (`ai_edge_litert`): `litert:xnnpack`, its fast CPU kernels, and `litert:cpu`, its plain ones.

Uses the `Interpreter`: LiteRT's newer compiled-model interface holds the interpreter lock and refuses LSTMs.
"""

from __future__ import annotations

from agent.errors import ModelError, Reason
from agent.worker.delegates import Options
from agent.worker.delegates.interpreter import INTERPRETER_ERRORS, InterpreterSession, delegated_share
from agent.worker.delegates.model import check_sealed, import_runtime, path_of, refused, version_of

XNNPACK = "litert:xnnpack"


class LiteRT:
    """LiteRT on the CPU.

    Args:
        name: `litert:xnnpack` or `litert:cpu`.

    Raises:
        ModelError: `runtime_missing`.
    """

    formats = frozenset({"tflite"})
    driver = ""

    def __init__(self, name: str) -> None:
        self.name = name
        self._module = import_runtime("ai_edge_litert.interpreter", "litert")
        self.runtime = f"litert {version_of('ai-edge-litert')}"

    def load(self, fd: int, format: str, options: Options) -> InterpreterSession:
        """See `Delegate.load`. XNNPACK that takes no node at all is `delegate_fell_back`."""
        check_sealed(fd)
        kinds = self._module.OpResolverType
        resolver = kinds.BUILTIN if self.name == XNNPACK else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            interpreter = self._module.Interpreter(
                model_path=path_of(fd), num_threads=options.threads, experimental_op_resolver_type=resolver
            )
        except INTERPRETER_ERRORS as e:
            raise refused(self.runtime, e) from e
        session = InterpreterSession(interpreter, self.name, self.runtime)
        if self.name == XNNPACK:
            session.coverage = delegated_share(interpreter)
            if session.coverage == 0:
                raise ModelError(
                    Reason.DELEGATE_FELL_BACK,
                    "XNNPACK takes no node of this model",
                    hint="allow litert:cpu in its release",
                )
        return session
