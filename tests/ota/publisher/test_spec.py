"""spec.toml and repo.toml: strict, with defaults filled in, and errors that name what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota.errors import OtaError
from ota.publisher import settings
from ota.publisher.spec import Spec, load, parse
from ota.release import Budgets, Requires
from tests.ota.publisher.conftest import spec_table

HERE = Path("/spec")
MODEL = Path("/models/m.tflite")


def refused(table: dict[str, Any], model: Path | None = MODEL) -> OtaError:
    with pytest.raises(OtaError) as caught:
        parse(table, HERE, model=model)
    assert caught.value.reason.value == "bad_spec"
    return caught.value


def test_defaults_are_filled_in_so_that_the_release_says_everything() -> None:
    spec = parse(spec_table(), HERE, model=MODEL)
    assert spec.graph == {
        "task": "classification",
        "labels": ["no person", "person"],
        "preprocess": {
            "kind": "image",
            "resize": "stretch",
            "interpolation": "linear",
            "color": "rgb",
            "mean": [0.0],
            "std": [255.0],
            "pad": 114,
            "align": "center",
            "roi": [0.0, 0.0, 1.0, 1.0],
            "input": "",
            "constants": {},
        },
        "postprocess": {
            "kind": "classification",
            "softmax": False,
            "sigmoid": False,
            "top_k": 1,
            "threshold": 0.0,
        },
    }
    assert (spec.budgets, spec.requires, spec.metrics) == (Budgets(None, None), Requires("", ()), {})
    assert (spec.components[0].file, spec.images) == (MODEL, (HERE / "image.png",))


def test_a_full_detection_spec_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(
        """
        line = "parts"
        version = "1.4.2"
        task = "detection"
        labels = ["bolt", "nut"]
        licence = "Apache-2.0"
        [preprocess]
        resize = "letterbox"
        color = "gray"
        mean = [127.5]
        std = [127]
        [postprocess]
        kind = "centernet"
        stride = 8
        threshold = 0.35
        [golden]
        images = ["golden/day.jpg"]
        [budgets]
        p95_ms = 20
        rss_mb = 150
        [requires]
        profiles = ["raspberry-pi-5"]
        [metrics]
        map50 = 0.91
        [[component]]
        file = "int8.tflite"
        outputs = ["heat", "box"]
        """
    )
    spec: Spec = load(tmp_path / "spec.toml")
    assert spec.graph["preprocess"] == {
        "kind": "image", "resize": "letterbox", "interpolation": "linear", "color": "gray", "mean": [127.5],
        "std": [127.0], "pad": 114, "align": "center", "roi": [0.0, 0.0, 1.0, 1.0], "input": "", "constants": {},
    }  # fmt: skip
    assert spec.graph["postprocess"] == {
        "kind": "centernet", "stride": 8, "threshold": 0.35, "max_detections": 100, "nms_iou": 0.5,
    }  # fmt: skip
    assert spec.components[0].file == tmp_path / "int8.tflite"
    assert spec.components[0].outputs == ("heat", "box")
    assert spec.budgets == Budgets(20.0, 150_000_000)
    assert (spec.requires.profiles, spec.metrics) == (("raspberry-pi-5",), {"map50": 0.91})


@pytest.mark.parametrize(
    ("changes", "key", "meant"),
    [
        ({"licnce": "MIT"}, "licnce", "licence"),
        ({"preprocess": {"interpolaton": "linear"}}, "interpolaton", "interpolation"),
        ({"postprocess": {"topk": 3}}, "topk", "top_k"),
        ({"golden": {"images": ["a"], "image": "b"}}, "image", "images"),
        ({"budgets": {"p95": 3}}, "p95", "p95_ms"),
        ({"licence": None, "license": "MIT"}, "license", "licence"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(changes: dict[str, Any], key: str, meant: str) -> None:
    error = refused(spec_table(**changes))
    assert f"{key}: unknown key" in error.message
    assert error.hint == f"did you mean {meant!r}?"


def test_an_unknown_key_unlike_any_lists_them_all() -> None:
    assert "known here: " in refused(spec_table(qqqqqq=1)).hint


def test_a_model_that_takes_no_pictures_needs_no_images_and_no_scaling() -> None:
    spec = parse(spec_table(task="raw", labels=None, golden=None, preprocess=None), HERE, model=MODEL)
    assert (spec.images, spec.graph["postprocess"]) == ((), {"kind": "raw"})
    assert (spec.graph["preprocess"]["mean"], spec.graph["preprocess"]["std"]) == ([0.0], [1.0])


def test_a_spec_may_leave_the_golden_pictures_to_the_recorder() -> None:
    assert parse(spec_table(golden=None), HERE, model=MODEL).images == ()


def test_a_key_of_another_postprocess_kind_is_unknown() -> None:
    assert "stride: unknown key" in refused(spec_table(postprocess={"kind": "classification", "stride": 4})).message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"line": "Person"}, "line 'Person' is not allowed"),
        ({"line": "devices"}, "line 'devices' is not allowed"),
        ({"version": "1.4"}, "'1.4' is not three numbers"),
        ({"version": 1}, "version: not a text"),
        ({"task": "reading"}, "'reading' is not one of detection, classification, segmentation, keypoints"),
        ({"labels": []}, "needs at least one label"),
        ({"labels": ["a\x1b[31m"]}, "cannot be printed"),
        ({"labels": ["x" * 81]}, "not a text of 1 to 80"),
        ({"labels": ["x"] * 20_001}, "not a list of 0 to 20000"),
        ({"licence": None}, "licence: missing"),
        ({"golden": {"images": []}}, "not a list of 1 to 64"),
        ({"golden": []}, "golden: not a table"),
        ({"preprocess": None}, "[preprocess]: mean: missing"),
        ({"preprocess": {"mean": [0]}}, "[preprocess]: std: missing"),
        ({"preprocess": {"mean": [0, 0], "std": [1]}}, "mean: not a list of 1 or 3 numbers"),
        ({"preprocess": {"color": "gray", "mean": [0], "std": [1, 1, 1]}}, "std: not a list of 1 numbers"),
        ({"preprocess": {"mean": [0], "std": [0, 1, 1]}}, "std: not from 1e-06"),
        ({"preprocess": {"mean": [float("nan"), 0, 0], "std": [1]}}, "mean: not a number"),
        ({"requires": {"agent": "1.2"}}, "'1.2' is not of the form >=1.2.0"),
        ({"postprocess": {"top_k": 201}}, "top_k: not a whole number from 1 to 200"),
        ({"postprocess": {"softmax": 1}}, "softmax: not true or false"),
        ({"postprocess": {"top_k": True}}, "top_k: not a whole number"),
        ({"postprocess": {"kind": "centernet"}}, "does not answer the task 'classification'"),
        ({"task": "detection", "postprocess": {}}, "stride: missing"),
        ({"metrics": {"top1": "high"}}, "top1: not a number"),
        ({"order": []}, "order: not a table"),
        ({"order": {"raspberry-pi-5": []}}, "raspberry-pi-5: not a list of 1 to 16"),
        ({"order": {"raspberry-pi-5": "int8.tflite"}}, "raspberry-pi-5: not a list"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(changes: dict[str, Any], text: str) -> None:
    assert text in refused(spec_table(**changes)).message


def test_a_model_is_named_once(tmp_path: Path) -> None:
    assert "--from has no place" in refused(spec_table(component=[{"file": "a.tflite"}])).message
    assert "missing: name the model with --from" in refused(spec_table(), model=None).message
    assert "component[0]: file: missing" in refused(spec_table(component=[{}]), model=None).message
    assert "name: 'golden'" in refused(spec_table(component=[{"file": "a", "name": "golden"}]), model=None).message


def test_a_missing_and_a_broken_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(OtaError) as absent:
        load(tmp_path / "spec.toml")
    assert absent.value.reason.value == "not_found"
    (tmp_path / "spec.toml").write_text("line = [")
    with pytest.raises(OtaError, match=r"spec\.toml: ") as broken:
        load(tmp_path / "spec.toml")
    assert broken.value.reason.value == "bad_spec"


TOML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from([*spec_table(), "preprocess", "postprocess", "budgets", "component"]), value=TOML)
def test_no_value_of_any_key_gets_past_as_anything_but_a_spec_or_a_refusal(key: str, value: Any) -> None:
    try:
        spec = parse(spec_table() | {key: value}, HERE, model=MODEL)
    except OtaError as e:
        assert e.reason.value == "bad_spec"  # noqa: PT017 - either ending is right
    else:
        assert isinstance(spec, Spec)


def test_settings_survive_their_own_text() -> None:
    configured = settings.Settings(tenant="factory-7", timestamp_days=3, delta_releases=0)
    assert settings.parse(settings.to_toml(configured)) == configured


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("timestamp_day = 3", "unknown key 'timestamp_day'"),
        ("timestamp_days = 0", "timestamp_days is not from 1"),
        ("timestamp_days = true", "timestamp_days is not a whole number"),
        ('timestamp_days = "7"', "timestamp_days is not a whole number"),
        ("delta_releases = 17", "delta_releases is not from 0 to 16"),
        ('tenant = "a/b"', "tenant 'a/b' is not allowed"),
        ("version = 2", "repository format 2"),
    ],
)
def test_a_wrong_setting_is_named(text: str, error: str) -> None:
    with pytest.raises(OtaError, match=error):
        settings.parse(text.encode())


def test_only_a_component_that_says_so_may_be_computed_in_bfloat16() -> None:
    table = spec_table() | {"component": [{"file": "a.onnx"}, {"file": "b.onnx", "precision": ["bf16"]}]}
    spec = parse(table, HERE)
    assert [component.precision for component in spec.components] == [(), ("bf16",)]


@pytest.mark.parametrize("value", ["bf16", [], ["int4"], ["bf16", "bf16"], [1], True])
def test_another_precision_is_refused(value: object) -> None:
    error = refused(spec_table() | {"component": [{"file": "a.onnx", "precision": value}]}, model=None)
    assert "precision" in error.message


def test_the_order_of_components_is_kept_for_each_profile() -> None:
    order = {"raspberry-pi-5": ["b.onnx", "int8.tflite"], "generic-x86_64": ["int8.tflite"]}
    spec = parse(spec_table(order=order), HERE, model=MODEL)
    assert spec.order == {"raspberry-pi-5": ("b.onnx", "int8.tflite"), "generic-x86_64": ("int8.tflite",)}
    assert parse(spec_table(), HERE, model=MODEL).order == {}
