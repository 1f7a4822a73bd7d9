"""The benchmark compares like with like: its hand-written calls fill the same tensor and find the same things."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from tests.bench import prepost


@pytest.mark.parametrize("make", [prepost.classifier, prepost.centres, prepost.yolo])
def test_both_sides_of_a_case_answer_alike(make):
    cv2.setNumThreads(1)
    case = make()
    for fill, _ in (case.shipped, case.fastest):
        fill()
    ours, theirs = case.shipped[1](), case.fastest[1]()
    assert [i["label"] for i in ours] == [i["label"] for i in theirs]
    np.testing.assert_allclose([i["score"] for i in ours], [i["score"] for i in theirs], atol=1e-4)
    assert len(ours) >= (1 if make is prepost.classifier else prepost.THINGS // 2)
    for mine, other in zip(ours, theirs, strict=True):
        if "box" in mine:
            clipped = np.clip(other["box"], 0, (640, 480, 640, 480))
            np.testing.assert_allclose(mine["box"], clipped, atol=0.02)


@pytest.mark.parametrize("make", [prepost.classifier, prepost.centres, prepost.yolo])
def test_both_sides_of_a_case_fill_the_same_tensor(make, monkeypatch):
    filled = []
    empty, zeros = np.empty, np.zeros
    monkeypatch.setattr(np, "empty", lambda *a, **k: filled.append(empty(*a, **k)) or filled[-1])
    monkeypatch.setattr(np, "zeros", lambda *a, **k: filled.append(zeros(*a, **k)) or filled[-1])
    case = make()
    case.shipped[0]()
    case.fastest[0]()
    size = 96 * 96 * 3 if make is prepost.classifier else 320 * 320 * 3
    dtype = np.float32 if make is prepost.yolo else np.int8
    ours, theirs = (array.reshape(-1) for array in filled if array.size == size and array.dtype == dtype)
    np.testing.assert_array_equal(ours, theirs)
