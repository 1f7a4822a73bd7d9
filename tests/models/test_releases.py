"""What every line's folder promises: digests, sizes, specs that open the components, small deltas."""

from __future__ import annotations

import tomllib
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import zstandard
from ai_edge_litert.interpreter import Interpreter

from models.digests import digests

LINES = ("digits", "parts", "vibration")
RELEASES = [(line, version) for line in LINES for version in ("1.0.0", "1.1.0")]


@pytest.mark.parametrize("line", LINES)
def test_the_recipe_names_the_digest_of_every_built_file(line: str, models_folder: Path) -> None:
    recipe = tomllib.loads((models_folder / line / "recipe.toml").read_text())
    assert recipe["digests"] == digests(models_folder / line)
    assert {f"{v}/int8.{kind}" for v in ("1.0.0", "1.1.0") for kind in ("tflite", "onnx")} <= set(recipe["digests"])


@pytest.mark.parametrize(("line", "version"), RELEASES)
def test_a_spec_names_its_release_and_files_that_exist(line: str, version: str, models_folder: Path) -> None:
    folder = models_folder / line / version
    spec = tomllib.loads((folder / "spec.toml").read_text())
    assert (spec["line"], spec["version"], spec["licence"]) == (line, version, "Apache-2.0")
    for name in spec["golden"]["images"]:
        if name.endswith(".npy"):
            window = np.load(folder / name)
            assert (window.dtype, window.shape) == (np.float32, (1024, 3))
        else:
            assert cv2.imread(str(folder / name)) is not None
    for component in spec["component"]:
        assert 0 < (folder / component["file"]).stat().st_size < 1_000_000


@pytest.mark.parametrize(("line", "version"), RELEASES)
def test_the_tflite_component_takes_int8_shares_and_has_the_outputs_of_the_spec(
    line: str, version: str, models_folder: Path
) -> None:
    folder = models_folder / line / version
    spec = tomllib.loads((folder / "spec.toml").read_text())
    interpreter = Interpreter(str(folder / "int8.tflite"))
    (source,) = interpreter.get_input_details()
    scale, zero_point = source["quantization"]
    assert scale == pytest.approx(1 / 255, rel=1e-6)
    assert zero_point == -128
    shapes = {d["name"]: tuple(d["shape"]) for d in interpreter.get_output_details()}
    found = [shapes[name] for name in spec["component"][0]["outputs"]]
    wanted = {"parts": [(1, 30, 40, 3), (1, 30, 40, 4)], "digits": [(1, 10)], "vibration": [(1, 1, 1, 195)]}
    assert found == wanted[line]


@pytest.mark.parametrize(("line", "version"), RELEASES)
def test_the_onnx_component_takes_floats_and_has_the_outputs_of_the_spec(
    line: str, version: str, models_folder: Path
) -> None:
    import onnxruntime

    folder = models_folder / line / version
    spec = tomllib.loads((folder / "spec.toml").read_text())
    session = onnxruntime.InferenceSession(str(folder / "int8.onnx"), providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    assert source.type == "tensor(float)"
    assert source.shape == {"parts": [1, 3, 240, 320], "digits": [1, 1, 8, 8], "vibration": [1, 195, 1, 1]}[line]
    shapes = {o.name: o.shape for o in session.get_outputs()}
    found = [shapes[name] for name in spec["component"][1]["outputs"]]
    wanted = {"parts": [[1, 30, 40, 3], [1, 30, 40, 4]], "digits": [[1, 10]], "vibration": [[1, 1, 1, 195]]}
    assert found == wanted[line]


@pytest.mark.parametrize("line", LINES)
def test_an_update_changes_no_weight_bias_or_scale_outside_the_layers_its_recipe_tunes(
    line: str, models_folder: Path
) -> None:
    tuned = tuple(tomllib.loads((models_folder / line / "recipe.toml").read_text())["release"]["1.1.0"]["tuned"])
    old, new = (
        {
            tensor.name: tensor.SerializeToString()
            for tensor in onnx.load(models_folder / line / version / "int8.onnx").graph.initializer
        }
        for version in ("1.0.0", "1.1.0")
    )
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name] != new[name]}
    assert changed
    assert {name for name in changed if not name.startswith(tuned)} == set()
    assert len(changed) < len(old)


@pytest.mark.parametrize(("line", "limit"), [("parts", 0.40), ("digits", 0.45), ("vibration", 0.53)])
@pytest.mark.parametrize("name", ["int8.tflite", "int8.onnx"])
def test_the_update_is_small_beside_the_full_file_because_the_backbone_kept_its_bytes(
    line: str, limit: float, name: str, models_folder: Path
) -> None:
    old, new = ((models_folder / line / version / name).read_bytes() for version in ("1.0.0", "1.1.0"))
    full = zstandard.ZstdCompressor(level=19).compress(new)
    dictionary = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    delta = zstandard.ZstdCompressor(level=19, dict_data=dictionary).compress(new)
    assert old != new
    assert len(delta) < limit * len(full)
