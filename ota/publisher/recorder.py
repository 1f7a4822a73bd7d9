"""The port through which the publisher asks how a model looks and what it answers. Runs no model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a runtime says about one model file.

    `delegates` are those that can load it, best first. A tensor spec has the keys name, dtype, shape, and for
    quantized tensors scale and zero_point; `outputs` are in the order asked for.
    """

    format: str
    delegates: tuple[str, ...]
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """Golden vectors: the bytes of the golden file, and what goes into the release's `graph.golden`."""

    golden: bytes
    tolerance: Mapping[str, Any]


class Recorder(Protocol):
    """Loads models in a process of their own: a file that crashes its runtime must not take the publisher along.

    Both methods raise `OtaError` alone; an adapter maps its own errors, with their hints, onto it.
    """

    def describe(self, model: Path, outputs: Sequence[str]) -> ModelFacts:
        """Facts of the file `model`. `outputs` names its outputs in the order the postprocess expects; empty keeps
        the file's own order."""
        ...

    def record(
        self,
        models: Mapping[str, Path],
        facts: Mapping[str, ModelFacts],
        graph: Mapping[str, Any],
        images: Sequence[bytes],
    ) -> Recording:
        """Run every component on every encoded image (PNG or JPEG) and record what it answers.

        Args:
            models: model file of each component, by component name; `facts` has the same keys.
            graph: task, labels, preprocess and postprocess of the release.
        """
        ...
