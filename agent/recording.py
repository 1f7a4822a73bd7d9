"""The release builder's port to the runtimes: tensor specs and golden vectors from a throw-away worker.

Implements `ota.publisher.recorder.Recorder`. `ota` must not know how models run, so `agent.app` hands this in.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent import workbench
from agent.errors import AgentError
from ota import strictjson
from ota.errors import PublishError, Reason
from ota.publisher.recorder import ModelFacts, Recording

MAX_DOCUMENT_BYTES = 16 << 20


class WorkerRecorder:
    """Loads each model in a process of its own; a file that kills its runtime is an error, not the end."""

    def describe(self, model: Path, outputs: Sequence[str]) -> ModelFacts:
        """See `Recorder.describe`."""
        folder = _describe({model.name: model}, {model.name: outputs}, workbench.DEFAULT_GRAPH, None)
        try:
            fact: Any = _document(folder, "facts.json").get(model.name)
        finally:
            shutil.rmtree(folder)
        try:
            return ModelFacts(
                format=fact["format"],
                delegates=tuple(fact["delegates"]),
                inputs=tuple(fact["inputs"]),
                outputs=tuple(fact["outputs"]),
            )
        except (KeyError, TypeError) as e:
            raise PublishError(Reason.MODEL_UNLOADABLE, f"{model.name}: its runtime says nothing about it") from e

    def record(
        self,
        models: Mapping[str, Path],
        facts: Mapping[str, ModelFacts],
        graph: Mapping[str, Any],
        images: Sequence[bytes],
    ) -> Recording:
        """See `Recorder.record`."""
        outputs = {name: [str(spec["name"]) for spec in fact.outputs] for name, fact in facts.items()}
        folder = _describe(models, outputs, graph, images)
        try:
            golden = (folder / "golden.npz").read_bytes()
            tolerance = _document(folder, "tolerance.json")
        finally:
            shutil.rmtree(folder)
        return Recording(golden, tolerance)


def _document(folder: Path, name: str) -> dict[str, Any]:
    """An object that the describing process wrote, which a model may have taken over."""
    try:
        with (folder / name).open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as e:
        raise PublishError(Reason.MODEL_UNLOADABLE, f"the describing process left no {name}") from e
    value = strictjson.loads(data, max_bytes=MAX_DOCUMENT_BYTES, what=name)
    if not isinstance(value, dict):
        raise PublishError(Reason.MODEL_UNLOADABLE, f"{name} of the describing process is not an object")
    return value


def _describe(
    models: Mapping[str, Path],
    outputs: Mapping[str, Sequence[str]],
    graph: Mapping[str, Any],
    images: Sequence[bytes] | None,
) -> Path:
    try:
        return workbench.describe(models, outputs, graph, images)
    except AgentError as e:
        raise PublishError(Reason.MODEL_UNLOADABLE, e.message, hint=e.hint) from e
