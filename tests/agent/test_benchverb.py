"""`edge-agent bench`: the best for the objective stands first, what failed says why, the picture is one."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from agent import benchverb
from agent.daemon.selection import Verdict
from agent.lineconfig import OBJECTIVES

FAST = Verdict("m.tflite", "litert:xnnpack", "litert:xnnpack", 0.94, "litert 2", min_ms=1.0, p50_ms=1.1, p95_ms=1.2,
               p99_ms=3.0, cpu_ms=1.0, load_ms=40, rss_bytes=60_000_000)  # fmt: skip
SLOW = Verdict("m.tflite", "openvino:cpu", "openvino:cpu", 1.0, "openvino 2026", min_ms=40.0, p50_ms=41.0, p95_ms=44.0,
               p99_ms=50.0, cpu_ms=0.5, load_ms=400, rss_bytes=150_000_000)  # fmt: skip
BROKEN = Verdict(
    "m.tflite", "litert:vx", reason="delegate_broken", stage="load", message="no <device> & no \x1b[2Jdriver"
)


def test_the_best_stands_first_and_a_bar_too_long_is_cut_off() -> None:
    head, first, second, failed, *_ = benchverb.table([SLOW, BROKEN, FAST], "latency")
    assert head.split()[:2] == ["delegate", "min"]
    assert first.startswith("litert:xnnpack")
    assert first.endswith("██ fastest")
    assert second.endswith("▶ 40.0x")
    assert failed.startswith("litert:vx        delegate_broken at load: no <device>")
    assert "\x1b" not in failed


def test_another_objective_has_another_order_and_names_its_stand_in() -> None:
    lines = benchverb.table([FAST, SLOW], "power")
    assert lines[1].startswith("openvino:cpu")
    assert "no power sensor" in lines[-1]


def test_nothing_that_runs_is_still_a_table() -> None:
    assert len(benchverb.table([BROKEN], "latency")) == 2


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("verdicts", [[FAST, SLOW, BROKEN], [BROKEN], [Verdict("m", "zero", "zero")]])
def test_the_picture_is_well_formed_and_everything_lies_inside_it(objective: str, verdicts: list[Verdict]) -> None:
    root = ElementTree.fromstring(benchverb.picture(verdicts, objective, "a <model> & more"))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert texts[0] == "a <model> & more"
    assert ("a frame" in texts[1]) == (objective != "memory")
    assert all(any(v.requested in text for text in texts) for v in verdicts)
    for element in root.iter():
        for key in ("x", "x1", "x2"):
            assert 0 <= float(element.attrib.get(key, 0)) <= width
        right = float(element.attrib.get("x", 0)) + float(element.attrib.get("width", 0))
        assert right <= width
        for key in ("y", "y1", "y2"):
            assert 0 <= float(element.attrib.get(key, 0)) <= height


def test_what_does_not_fit_into_the_picture_says_that_it_was_cut() -> None:
    late = replace(FAST, p99_ms=900.0)
    broken = replace(BROKEN, message="no device " * 30)
    drawn = ElementTree.fromstring(benchverb.picture([late, broken], "latency", "model" * 40))
    title, *_, failed = [element.text or "" for element in drawn.iter() if element.tag.endswith("text")]
    assert title.endswith("…")
    assert failed.endswith("…")
    # the line to p95 and no tick: it would stand where p99 is not
    assert len([element for element in drawn.iter() if element.tag.endswith("line")]) == 1
