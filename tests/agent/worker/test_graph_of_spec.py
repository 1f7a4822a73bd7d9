"""What the publisher writes and what the worker reads are the same format: every kind, with every default."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.worker import graph
from ota.errors import OtaError
from ota.publisher import graphspec
from ota.publisher.spec import parse

REQUIRED = {
    "centernet": {"stride": 8},
    "ssd": {"anchors": {"grids": [19, 19, 1, 1]}},
    "yolo_pose": {"key_points": 17},
    "anomaly": {"threshold": 0.5},
}
PLAIN = {"mean": [0.0], "std": [255.0]}
KINDS = [(task, kind) for task, kinds in graph.TASKS.items() for kind in kinds]


def spec(task: str, kind: str, **changes) -> dict:
    labels = [] if task in ("embedding", "anomaly", "raw") else ["a", "b"]
    return {
        "line": "x", "version": "1.0.0", "task": task, "labels": labels, "licence": "MIT",
        "preprocess": PLAIN,
        "postprocess": {"kind": kind, **REQUIRED.get(kind, {})}, **changes,
    }  # fmt: skip


def written(table: dict) -> dict:
    return dict(parse(table, Path("/"), model=Path("/m.onnx")).graph)


def test_both_sides_know_the_same_tasks_and_kinds():
    assert graph.TASKS == graphspec.TASKS


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_what_a_publisher_writes_for_a_kind_is_read_in_full(task, kind):
    table = written(spec(task, kind))
    parsed = graph.parse_graph(table)
    assert table["postprocess"]["kind"] == kind
    # every key that was written means something to the reader: another value gives another plan
    for key, value in table["postprocess"].items():
        if key not in ("kind", "anchors"):
            changed = {**table, "postprocess": {**table["postprocess"], key: other(value)}}
            assert graph.parse_graph(changed).postprocess != parsed.postprocess, key
    assert graph.parse_graph({**table, "postprocess": {"kind": "raw"}}).postprocess == graph.Raw()


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_raw_answers_every_task_and_no_kind_answers_another(task, kind):
    assert written(spec(task, "raw"))["postprocess"] == {"kind": "raw"}
    for other_task, _ in KINDS:
        if kind not in (*graph.TASKS[other_task], "raw"):
            with pytest.raises(OtaError) as caught:
                written(spec(other_task, kind))
            assert caught.value.reason.value == "bad_spec"
            assert "does not answer the task" in caught.value.message


def test_every_key_of_the_way_in_means_something():
    table = written(spec("raw", "raw", preprocess={"constants": {"size": 3}}))
    parsed = graph.parse_graph(table).preprocess
    for key, value in table["preprocess"].items():
        if key != "kind":
            changed = {**table, "preprocess": {**table["preprocess"], key: other(value)}}
            assert graph.parse_graph(changed).preprocess != parsed, key


def test_constants_are_numbers_or_lists_of_them():
    table = written(spec("raw", "raw", preprocess={"constants": {"size": 3, "scale": [1.5, 2]}}))
    assert table["preprocess"]["constants"] == {"size": [3.0], "scale": [1.5, 2.0]}
    assert graph.parse_graph(table).preprocess.constants == (("size", (3.0,)), ("scale", (1.5, 2.0)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"preprocess": {"roi": [0, 0, 0, 1]}}, "roi: not x0, y0, x1, y1"),
        ({"preprocess": {**PLAIN, "constants": {"size": "big"}}}, "size: not a number"),
        ({"preprocess": {**PLAIN, "pad": 300}}, "pad: not a whole number from 0 to 255"),
        ({"postprocess": {"kind": "yolov8", "strid": 4}}, "strid: unknown key"),
        ({"postprocess": {"kind": "ssd"}}, "grids: missing"),
        ({"postprocess": {"kind": "ssd", "anchors": {"grids": [1, 2, 3]}}}, "grids: not rows and columns"),
        ({"postprocess": {"kind": "ssd", "anchors": {"grid": [1, 2]}}}, "grid: unknown key"),
        ({"postprocess": {"kind": "yolo"}}, "'yolo' is not one of"),
        ({"postprocess": {"kind": "yolo_pose", "key_points": 3}}, "does not answer the task 'detection'"),
    ],
)
def test_a_wrong_spec_names_the_key_in_one_line(changes, text):
    with pytest.raises(OtaError) as caught:
        written({**spec("detection", "yolov8"), **changes})
    assert text in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def other(value: object) -> object:
    """Another value of the same type that is in most ranges."""
    words = {
        "stretch": "crop", "linear": "area", "rgb": "bgr", "center": "top_left", "last": "first",
        "sigmoid": "none", "base64": "list", "": "picture",
    }  # fmt: skip
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return words[value]
    if isinstance(value, dict):
        return {"other": [1.0]}
    if isinstance(value, list):
        return [0.25, 0.25, 0.5, 0.5] if len(value) == 4 else [3.0]
    if isinstance(value, int):
        return value + 1 if value < 50 else value // 3
    return value / 2 if value else 0.5
