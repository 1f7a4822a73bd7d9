"""Vendors' TFLite delegates: which libraries there are, how each that cannot serve is told apart, and what share is
enough. No accelerator is needed here; a delegate compiled for the purpose is with the tests of selection."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.errors import ModelError, Reason
from agent.worker.delegates.external import LIBRARIES, MIN_SHARE, ExternalDelegate, Library, check_share

EDGETPU, VX = LIBRARIES["litert:edgetpu"], LIBRARIES["litert:vx"]


@pytest.mark.fault("F71")
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_is_a_name_for_the_linker_or_an_absolute_path(name: str) -> None:
    path = LIBRARIES[name].path
    assert path.startswith("/usr/lib/") or "/" not in path


@pytest.mark.parametrize("path", ["/nowhere/libvendor.so", "libnobodyhasthis.so.9"])
def test_an_absent_library_is_a_missing_runtime_and_names_who_brings_it(path: str) -> None:
    with pytest.raises(ModelError) as caught:
        ExternalDelegate("litert:vx", Library(path, "the vendor's package"))
    assert caught.value.reason is Reason.RUNTIME_MISSING
    assert "the vendor's package" in caught.value.hint


def test_a_library_that_the_linker_refuses_is_broken_not_missing(tmp_path: Path) -> None:
    library = tmp_path / "libvendor.so"
    library.write_bytes(b"\x7fELF and no more")
    with pytest.raises(ModelError) as caught:
        ExternalDelegate("litert:vx", Library(str(library), "the vendor's package"))
    assert caught.value.reason is Reason.DELEGATE_BROKEN


def test_a_library_without_the_interface_of_a_delegate_is_broken() -> None:
    with pytest.raises(ModelError) as caught:
        ExternalDelegate("litert:vx", Library("libc.so.6", "the vendor's package"))
    assert caught.value.reason is Reason.DELEGATE_BROKEN
    assert "libc.so.6" in caught.value.message


@pytest.mark.parametrize("share", [0.0, 0.2, MIN_SHARE - 0.01])
def test_a_graph_that_mostly_stays_on_the_processor_is_refused_with_its_share(share: float) -> None:
    with pytest.raises(ModelError) as caught:
        check_share("litert:vx", VX, {"CONV_2D": (round(share * 100), 100)}, share)
    assert caught.value.reason is Reason.DELEGATE_FELL_BACK
    assert f"{share:.0%}" in caught.value.message


@pytest.mark.parametrize("share", [MIN_SHARE, 0.97, 1.0])
def test_a_graph_that_mostly_runs_on_the_accelerator_passes(share: float) -> None:
    check_share("litert:vx", VX, {"CONV_2D": (round(share * 100), 100)}, share)


def test_one_compiled_node_beside_a_few_of_the_processor_s_is_a_whole_network_and_passes() -> None:
    taken = {EDGETPU.own_op: (1, 1), "QUANTIZE": (0, 1), "TFLite_Detection_PostProcess": (0, 1)}
    check_share("litert:edgetpu", EDGETPU, taken, 1 / 3)


@pytest.mark.parametrize(
    "taken", [{"CONV_2D": (0, 60)}, {}, {EDGETPU.own_op: (0, 1)}, {EDGETPU.own_op: (1, 2), "ADD": (0, 1)}]
)
def test_a_model_that_was_not_compiled_for_it_or_not_taken_whole_is_refused(taken: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(ModelError) as caught:
        check_share("litert:edgetpu", EDGETPU, taken, 0.0)
    assert caught.value.reason is Reason.DELEGATE_FELL_BACK
