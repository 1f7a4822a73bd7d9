"""Which delegates the contract is run over here, and how a test loads a model on one."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path

import pytest

from agent import memfd
from agent.errors import ModelError
from agent.worker.delegates import DELEGATES, Delegate, Options, Session
from ota.publisher.ovir import pack

DIGITS = Path(__file__).resolve().parents[2] / "models" / "digits"


def installed() -> tuple[list[tuple[str, str]], list[str]]:
    """(delegate, format) pairs that can work here, and the delegates that cannot."""
    pairs, missing = [], []
    for name, load in DELEGATES.items():
        try:
            pairs += [(name, format) for format in sorted(load().formats)]
        except ModelError:
            missing.append(name)
    return pairs, missing


PAIRS, MISSING = installed()


def over(*formats: str) -> pytest.MarkDecorator:
    """Run a test that takes `subject` over every delegate that is here, with each of `formats`, or with all."""
    pairs = [pair for pair in PAIRS if not formats or pair[1] in formats]
    return pytest.mark.parametrize("subject", pairs, ids="-".join, indirect=True)


def load(delegate: Delegate, data: bytes, format: str, options: Options | None = None) -> Session:
    """Load it as a worker does: the descriptor is closed at once."""
    fd = memfd.of_bytes("model", data)
    try:
        return delegate.load(fd, format, options or Options())
    finally:
        os.close(fd)


def model(format: str, version: str = "1.0.0") -> bytes:
    """The shipped classifier of digits in one of the formats."""
    if format == "ovir":
        return ovir_of((DIGITS / version / "int8.onnx").read_bytes())
    return (DIGITS / version / f"int8.{format}").read_bytes()


@functools.cache
def ovir_of(onnx: bytes) -> bytes:
    """An ONNX model as OpenVINO writes it, packed as the publisher packs it."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed, which writes .ovir files")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.xml"
        openvino.save_model(openvino.Core().read_model(onnx), path, compress_to_fp16=False)
        return pack(path.read_bytes(), path.with_suffix(".bin").read_bytes())
