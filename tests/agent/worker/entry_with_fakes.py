"""The worker program with fake delegates beside the real ones, for faults that no real model has on demand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from agent.errors import ModelError, Reason
from agent.worker.delegates import DELEGATES
from agent.worker.main import main
from agent.worker.tensor import TensorSpec


class FakeSession:
    """Answers the mean of its input; refuses a black picture."""

    inputs = (TensorSpec("x", "float32", (1, 4, 4, 3)),)
    outputs = (TensorSpec("y", "float32", (1, 2)),)
    coverage = 1.0
    compiled = None

    def __init__(self, actual: str) -> None:
        self.actual = actual
        self.tensors = (self.inputs[0].empty(),)

    def run(self):
        mean = float(self.tensors[0].mean())
        if mean < 1:
            raise ModelError(Reason.MODEL_UNLOADABLE, "fake refuses the dark", hint="switch the light on")
        return (np.asarray([[mean, 255 - mean]], np.float32),)


class FakeDelegate:
    """Loads anything; the file's content names what it claims to be."""

    name = "fake:cpu"
    runtime = "fake 1.0"
    driver = ""
    formats = frozenset({"tflite"})

    def load(self, fd, format, options):
        return FakeSession(Path(f"/proc/self/fd/{fd}").read_text())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], delegates={**DELEGATES, "fake:cpu": FakeDelegate}, entry=(str(Path(__file__)),)))
