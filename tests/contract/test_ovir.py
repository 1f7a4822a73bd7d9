"""`.ovir` files as somebody hostile would write them: refused before OpenVINO sees a byte."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from agent import memfd
from agent.errors import ModelError, Reason
from agent.worker.delegates import DELEGATES, Options, ovir
from ota.publisher import cli
from ota.publisher.ovir import pack
from tests.contract.delegates import PAIRS, load, ovir_of
from tests.contract.graphs import onnx_model

needs_openvino = pytest.mark.skipif(("openvino:cpu", "ovir") not in PAIRS, reason="OpenVINO is not installed")

LAYER = (
    '<layer id="1" name="w" type="Const" version="opset1"><data offset="0" size="{size}" element_type="f32"/></layer>'
)
NET = '<?xml version="1.0"?><net name="n" version="11"><layers>{layers}</layers><rt_info>{info}</rt_info></net>'
WEIGHTS = bytes(range(64))


def net(layers: str = LAYER.format(size=64), info: str = "") -> bytes:
    return NET.format(layers=layers, info=info).encode()


def split(data: bytes) -> tuple[bytes, np.ndarray]:
    return ovir.split(memfd.of_bytes("model", data))


def test_both_parts_come_out_as_they_went_in_and_the_weights_are_no_copy() -> None:
    fd = memfd.of_bytes("model", pack(net(), WEIGHTS))
    xml, weights = ovir.split(fd)
    assert xml == net()
    assert weights.tobytes() == WEIGHTS
    weights[0] = 7  # a private page: the memfd is sealed and stays
    assert split(pack(net(), WEIGHTS))[1].tobytes() == WEIGHTS
    assert ovir.split(fd)[1].tobytes() == WEIGHTS


HOSTILE: dict[str, bytes] = {
    "too short for a header": b"OVB1\0\0",
    "another magic": b"OVB2" + pack(net(), WEIGHTS)[4:],
    "cut": pack(net(), WEIGHTS)[:-1],
    "a byte too many": pack(net(), WEIGHTS) + b"\0",
    "lengths that wrap round": struct.pack("<4sII", b"OVB1", 0xFFFFFFFF, 2) + WEIGHTS,
    "an xml longer than the file": struct.pack("<4sII", b"OVB1", 1 << 31, 0) + net(),
    "no xml": pack(b"", WEIGHTS),
    "no network": pack(b"<other/>", WEIGHTS),
    "not well-formed": pack(net()[:-3], WEIGHTS),
    "binary instead of xml": pack(bytes(64), WEIGHTS),
    "a document type": pack(b'<!DOCTYPE net [<!ENTITY a "b">]>' + net()[21:], WEIGHTS),
    "an entity that reads a file": pack(
        b'<!DOCTYPE net [<!ENTITY a SYSTEM "file:///etc/passwd">]><net>&a;</net>', WEIGHTS
    ),
    "an operator of an extension": pack(net('<layer id="1" name="w" type="Own" version="extension"/>'), WEIGHTS),
    "an operator of no version": pack(net('<layer id="1" name="w" type="Relu"/>'), WEIGHTS),
    "a constant beyond the end": pack(net(LAYER.format(size=65)), WEIGHTS),
    "a constant of a negative size": pack(net(LAYER.format(size=-1)), WEIGHTS),
    "a constant of a huge size": pack(net(LAYER.format(size=10**30)), WEIGHTS),
    "a path of weights": pack(net(info='<__weights_path value="/etc/passwd"/>'), WEIGHTS),
    "a path of weights in an attribute": pack(net(info='<info name="weights_path" value="a"/>'), WEIGHTS),
    "an encoding that nobody knows": pack(net()[:19] + b' encoding="nosuch"' + net()[19:], WEIGHTS),
    "an encoding of several bytes": pack(net()[:19] + b' encoding="utf-7"' + net()[19:], WEIGHTS),
    "nested too deep": pack(net("<body>" * 100 + "</body>" * 100), WEIGHTS),
}


@pytest.mark.fault("F70")
@pytest.mark.parametrize("damage", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(damage: str) -> None:
    with pytest.raises(ModelError) as caught:
        split(HOSTILE[damage])
    assert caught.value.reason is Reason.MODEL_UNLOADABLE
    assert "\n" not in caught.value.message
    assert "edge-ota pack" in caught.value.hint


@needs_openvino
@pytest.mark.parametrize("position", range(12))
def test_no_damage_of_the_header_reaches_openvino_as_another_model(position: int) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    data = bytearray(ovir_of(onnx_model([node], [("x", "float32", (1, 3))], [("y", "float32", (1, 3))])))
    data[position] ^= 0x40
    with pytest.raises(ModelError) as caught:
        load(DELEGATES["openvino:cpu"](), bytes(data), "ovir")
    assert caught.value.reason is Reason.MODEL_UNLOADABLE


@needs_openvino
def test_weights_are_used_where_they_lie_for_as_long_as_the_session_lives() -> None:
    """OpenVINO keeps no reference to memory that it was lent: a session without one would read what came after."""
    weights = np.random.default_rng(3).standard_normal((512, 512)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    data = ovir_of(onnx_model([node], [("x", "float32", (1, 512))], [("y", "float32", (1, 512))], [("w", weights)]))
    sessions = [load(DELEGATES["openvino:cpu"](), data, "ovir") for _ in range(3)]
    x = np.random.default_rng(4).standard_normal((1, 512)).astype(np.float32)
    for session in sessions:
        session.tensors[0][...] = x
        np.testing.assert_allclose(session.run()[0], x @ weights, atol=1e-3)


def written_by_openvino(folder: Path) -> Path:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    weights = [("w", np.asarray([[1, 2, 3]], np.float32))]
    data = onnx_model([node], [("x", "float32", (1, 3))], [("y", "float32", (1, 3))], weights)
    openvino.save_model(openvino.Core().read_model(data), folder / "sum.xml", compress_to_fp16=False)
    return folder / "sum.xml"


@needs_openvino
def test_the_publisher_packs_what_openvino_wrote_and_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written_by_openvino(tmp_path)
    assert cli.main(["pack", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    packed = Path(told["file"])
    assert (packed, told["bytes"]) == (tmp_path / "sum.ovir", packed.stat().st_size)
    session = load(DELEGATES["openvino:cpu"](), packed.read_bytes(), "ovir", Options())
    session.tensors[0][...] = [[10, 20, 30]]
    np.testing.assert_array_equal(session.run()[0], [[11, 22, 33]])


def _without_bin(folder: Path) -> Path:
    (folder / "m.xml").write_bytes(net())
    return folder / "m.xml"


def _no_xml(folder: Path) -> Path:
    (folder / "m.onnx").write_bytes(b"x")
    return folder / "m.onnx"


def _empty_xml(folder: Path) -> Path:
    (folder / "m.bin").write_bytes(WEIGHTS)
    (folder / "m.xml").touch()
    return folder / "m.xml"


def _large_xml(folder: Path) -> Path:
    os.truncate(_empty_xml(folder), ovir.MAX_XML_BYTES + 1)
    return folder / "m.xml"


@pytest.mark.parametrize(
    ("make", "reason"),
    [(_without_bin, "not_found"), (_no_xml, "bad_usage"), (_empty_xml, "bad_usage"), (_large_xml, "unsafe_file")],
    ids=["no .bin", "no .xml", "an empty .xml", "an .xml that no device reads"],
)
def test_packing_something_else_says_what_is_missing(
    make: Callable[[Path], Path], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pack", str(make(tmp_path))]) != 0
    assert f"[{reason}]" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["m.xml", "m.bin"])
def test_packing_never_replaces_what_it_packs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.xml").write_bytes(net())
    (tmp_path / "m.bin").write_bytes(WEIGHTS)
    assert cli.main(["pack", str(tmp_path / "m.xml"), "--out", str(tmp_path / name)]) != 0
    assert "[bad_usage]" in capsys.readouterr().err
    assert ((tmp_path / "m.xml").read_bytes(), (tmp_path / "m.bin").read_bytes()) == (net(), WEIGHTS)


def test_weights_that_only_their_owner_may_read_are_packed_for_their_owner(tmp_path: Path) -> None:
    for name, data in (("m.xml", net()), ("m.bin", WEIGHTS)):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600 if name == "m.bin" else 0o644)
    assert cli.main(["pack", str(tmp_path / "m.xml")]) == 0
    assert (tmp_path / "m.ovir").stat().st_mode & 0o777 == 0o600
