"""What a runtime compiled comes back by export and import: the same answers, faster, and only where it belongs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from agent import memfd
from agent.errors import ModelError
from agent.worker.delegates import DELEGATES, Delegate, Options
from agent.worker.delegates.compiled import binding
from tests.contract.delegates import DIGITS, PAIRS, load, model

DIGEST, OTHER = "a" * 64, "b" * 64


def keeping() -> list[tuple[str, str]]:
    """(delegate, format) whose sessions can be exported."""
    return [
        (name, format)
        for name, format in PAIRS
        if load(DELEGATES[name](), model(format), format, Options(model=DIGEST)).compiled is not None
    ]


KEEPING = keeping()
every_keeping = pytest.mark.parametrize("subject", KEEPING, ids="-".join, indirect=True)


@pytest.fixture
def export(subject: tuple[Delegate, str]) -> Iterator[int]:
    """What the session of the digits' model gives, in a sealed memfd."""
    delegate, format = subject
    compiled = load(delegate, model(format), format, Options(model=DIGEST)).compiled
    assert compiled is not None
    assert not compiled.imported
    fd = compiled.export()
    yield fd
    os.close(fd)


def imported(subject: tuple[Delegate, str], options: Options) -> bool:
    delegate, format = subject
    compiled = load(delegate, model(format), format, options).compiled
    return compiled is not None and compiled.imported


def test_openvino_keeps_what_it_compiles() -> None:
    if not any(name == "openvino:cpu" for name, _ in PAIRS):
        pytest.skip("OpenVINO is not installed")
    assert ("openvino:cpu", "onnx") in KEEPING


@every_keeping
def test_an_imported_session_answers_as_the_one_that_was_compiled(subject: tuple[Delegate, str], export: int) -> None:
    delegate, format = subject
    fresh = load(delegate, model(format), format, Options(model=DIGEST))
    again = load(delegate, model(format), format, Options(model=DIGEST, compiled=export))
    assert again.compiled is not None
    assert again.compiled.imported
    assert (again.inputs, again.outputs, again.actual) == (fresh.inputs, fresh.outputs, fresh.actual)
    for session in (fresh, again):
        session.tensors[0][...] = np.arange(64).reshape(session.tensors[0].shape)
    for one, two in zip(fresh.run(), again.run(), strict=True):
        np.testing.assert_array_equal(one, two)


@every_keeping
def test_an_export_is_sealed_and_what_came_from_it_is_not_exported_again(
    subject: tuple[Delegate, str], export: int
) -> None:
    delegate, format = subject
    assert memfd.is_sealed(export)
    again = load(delegate, model(format), format, Options(model=DIGEST, compiled=export)).compiled
    assert again is not None
    with pytest.raises(ModelError):
        again.export()


@pytest.mark.skipif(not KEEPING, reason="no delegate here keeps what it compiles")
def test_importing_takes_less_of_the_processor_than_compiling() -> None:
    delegate, data = DELEGATES["openvino:cpu"](), (DIGITS.parent / "parts" / "1.0.0" / "int8.onnx").read_bytes()

    def least(options: Options) -> int:
        spent = []
        for _ in range(3):
            begin = time.process_time_ns()
            session = load(delegate, data, "onnx", options)
            spent.append(time.process_time_ns() - begin)
            assert session.compiled is not None
            assert session.compiled.imported == (options.compiled is not None)
        return min(spent)

    compiled = load(delegate, data, "onnx", Options(model=DIGEST)).compiled
    assert compiled is not None
    fd = compiled.export()
    assert least(Options(model=DIGEST, compiled=fd)) < least(Options(model=DIGEST))
    os.close(fd)


@pytest.mark.fault("F77")
@every_keeping
@pytest.mark.parametrize(
    "options",
    [Options(model=OTHER), Options(threads=2, model=DIGEST), Options(bf16=True, model=DIGEST), Options()],
    ids=["another model", "other threads", "other precision", "no model"],
)
def test_an_export_for_something_else_is_not_imported(
    subject: tuple[Delegate, str], export: int, options: Options
) -> None:
    changed = Options(options.threads, options.bf16, options.model, export)
    assert imported(subject, Options(model=DIGEST, compiled=export))
    assert not imported(subject, changed)


@pytest.mark.fault("F77")
@every_keeping
@pytest.mark.parametrize("what", ["runtime", "driver"])
def test_an_export_of_another_version_is_compiled_anew(
    subject: tuple[Delegate, str], export: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delegate, _ = subject
    monkeypatch.setattr(delegate, what, "another 1.0")
    assert not imported(subject, Options(model=DIGEST, compiled=export))


@pytest.mark.fault("F77")
@every_keeping
@pytest.mark.parametrize("damage", ["empty", "text", "cut in its head", "bound to more", "cut", "nothing behind it"])
def test_what_is_no_export_is_compiled_anew(subject: tuple[Delegate, str], export: int, damage: str) -> None:
    delegate, _ = subject
    whole = os.pread(export, os.fstat(export).st_size, 0)
    bound = binding(delegate, Options(model=DIGEST))
    data = {
        "empty": b"",
        "text": b"no compiled model",
        "cut in its head": whole[:20],
        "bound to more": whole.replace(bound, bound[:-1] + b",", 1),
        "cut": whole[: len(whole) // 2],
        "nothing behind it": whole[: whole.index(bound) + len(bound) + 200][:-150],
    }[damage]
    fd = memfd.of_bytes("compiled", data)
    assert not imported(subject, Options(model=DIGEST, compiled=fd))
    os.close(fd)


@every_keeping
def test_an_export_that_could_still_change_is_not_read(subject: tuple[Delegate, str], export: int) -> None:
    data = os.pread(export, os.fstat(export).st_size, 0)
    fd = memfd.create("compiled", len(data))
    os.pwrite(fd, data, 0)
    assert not imported(subject, Options(model=DIGEST, compiled=fd))
    os.close(fd)
