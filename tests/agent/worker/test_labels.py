"""Labels are data: bounded, and never anything else, whatever they look like."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agent.errors import ModelError, Reason
from agent.worker.graph import MAX_LABEL_CHARS, MAX_LABELS, parse_graph
from agent.worker.postprocess import compile_postprocess
from agent.worker.preprocess import Inverse
from agent.worker.tensor import TensorSpec
from ota.release import MAX_RELEASE_BYTES

HOSTILE = ["%s%n%x", "{0.__class__}", "{}", "<script>alert(1)</script>", "'; --", "$(reboot)", "a\nb", "\x1b[31m", ""]


@pytest.mark.fault("F76")
@pytest.mark.parametrize("label", HOSTILE)
def test_a_label_comes_out_as_it_went_in(label: str) -> None:
    graph = parse_graph({"task": "classification", "labels": [label, "other"]})
    scores = TensorSpec("scores", "float32", (1, 2))
    answer = compile_postprocess(graph, (scores,))([np.asarray([[0.9, 0.1]], np.float32)], Inverse(1, 1, 0, 0, 8, 8))
    assert answer[0].to_json()["label"] == label
    assert json.loads(json.dumps(answer[0].to_json()))["label"] == label


@pytest.mark.fault("F76")
def test_a_label_of_ten_megabytes_is_cut_and_a_million_of_them_are_refused() -> None:
    graph = parse_graph({"task": "classification", "labels": ["x" * 10_000_000]})
    assert graph.labels == ("x" * MAX_LABEL_CHARS,)
    assert MAX_RELEASE_BYTES < 10_000_000, "and it does not even get here: a release.json is smaller"
    with pytest.raises(ModelError) as refusal:
        parse_graph({"task": "classification", "labels": ["x"] * (MAX_LABELS + 1)})
    assert refusal.value.reason is Reason.MODEL_UNLOADABLE
    with pytest.raises(ModelError):
        parse_graph({"task": "classification", "labels": [{"name": "x"}]})
