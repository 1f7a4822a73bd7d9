"""Pictures of a folder as frames: their order, what is skipped, and how they are fitted into one size."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from workerdriver import Camera, Daemon, Reader

from agent import protocol
from agent.errors import Reason, SourceError
from agent.worker.sources import folder
from agent.worker.sources.folder import Folder, open_folder
from tests.fakes.mjpegserver import picture

GREY = 114


def fill(path: Path, names: list[str], size: tuple[int, int] = (160, 120)) -> Path:
    for number, name in enumerate(names):
        (path / name).write_bytes(picture(number, size))
    return path


def slot_of(source: Folder) -> np.ndarray:
    return np.zeros(source.shape, np.uint8)


def test_pictures_come_in_the_order_of_their_names_and_end_the_source(daemon: Daemon, tmp_path: Path) -> None:
    for number, name in [(2, "c.jpg"), (0, "a.jpg"), (1, "b.jpg")]:
        (tmp_path / name).write_bytes(picture(number, (160, 120)))
    camera = Camera.open(daemon, {"path": str(tmp_path)}, "folder")
    reader = Reader(camera, 1)
    reader.ask()
    assert [number for _, _, number in reader.run(3)] == [0, 1, 2]
    while (told := camera.expect(protocol.SourceState)).state != "ended":
        pass
    assert told.frames == 3


def test_a_loop_begins_again_and_a_rate_paces_it(daemon: Daemon, tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg", "b.jpg"])
    camera = Camera.open(
        daemon, {"path": str(tmp_path), "loop": True, "fps": 50, "policy": "live", "queue_frames": 64}, "folder"
    )
    assert camera.opened.fps == 50
    reader = Reader(camera, 1)
    reader.ask()
    answered = reader.run(7)
    assert [number for _, _, number in answered] == [0, 1] * 3 + [0]
    # the source itself may once have been kept waiting
    assert np.median(np.diff([t_ns for _, t_ns, _ in answered])) == 20e6


def test_what_is_no_picture_is_skipped_and_counted(tmp_path: Path) -> None:
    fill(tmp_path, ["b.jpg", "d.jpg"])
    (tmp_path / "a.txt").write_text("no picture")
    (tmp_path / "c.jpg").write_bytes(picture(9, (160, 120))[:30])
    (tmp_path / "e.jpg").write_bytes(picture(9, (80, 60)))
    (tmp_path / ".hidden.jpg").write_bytes(picture(9, (160, 120)))
    os.symlink("/nonexistent", tmp_path / "f.jpg")
    (tmp_path / "g").mkdir()
    source = open_folder({"path": str(tmp_path)})
    slot = slot_of(source)
    assert [source.read_into(slot), source.read_into(slot), source.read_into(slot)] == [True, True, False]
    assert source.detail == "3 skipped, the last e.jpg: 80x60 pixels"


@pytest.mark.parametrize("becomes", ["fifo", "device"])
def test_a_name_that_is_no_file_any_more_is_skipped_and_never_waited_for(tmp_path: Path, becomes: str) -> None:
    fill(tmp_path, ["a.jpg", "b.jpg"])
    source = open_folder({"path": str(tmp_path)})
    (tmp_path / "b.jpg").unlink()
    if becomes == "fifo":
        os.mkfifo(tmp_path / "b.jpg")
    else:
        os.symlink("/dev/zero", tmp_path / "b.jpg")
    slot = slot_of(source)
    assert [source.read_into(slot), source.read_into(slot)] == [True, False]
    assert source.detail == "1 skipped, the last b.jpg: no file any more"


def test_a_file_that_is_too_large_is_skipped_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, ["b.jpg"])
    (tmp_path / "a.jpg").write_bytes(picture(1, (160, 120)) + bytes(1 << 20))
    monkeypatch.setattr("agent.worker.images.MAX_IMAGE_BYTES", 1 << 19)
    monkeypatch.setattr(folder, "MAX_IMAGE_BYTES", 1 << 19)
    source = open_folder({"path": str(tmp_path)})
    assert source.read_into(slot_of(source))
    assert source.detail.startswith("1 skipped, the last a.jpg")


@pytest.mark.parametrize(("width", "height"), [(320, 120), (97, 201), (160, 120), (31, 7)])
def test_pictures_are_fitted_into_a_given_size_undistorted_with_a_grey_border(
    tmp_path: Path, width: int, height: int
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((120, 160, 3), 255, np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), np.full((60, 20, 3), 255, np.uint8))
    source = open_folder({"path": str(tmp_path), "size": f"{width}x{height}"})
    assert source.shape == (height, width, 3)
    for ratio in (160 / 120, 20 / 60):
        slot = slot_of(source)
        assert source.read_into(slot)
        assert set(np.unique(slot)) <= {GREY, 255}
        rows, columns = np.nonzero(slot[:, :, 0] == 255)
        inner = (columns.max() - columns.min() + 1, rows.max() - rows.min() + 1)
        assert inner[0] == width or inner[1] == height
        scale = min(width / (ratio * 60), height / 60)
        assert abs(inner[0] - ratio * 60 * scale) <= 1
        assert abs(inner[1] - 60 * scale) <= 1
        assert abs(columns.min() - (width - 1 - columns.max())) <= 1
        assert abs(rows.min() - (height - 1 - rows.max())) <= 1


def test_a_folder_without_a_picture_or_with_too_many_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, reason in [
        (tmp_path / "nowhere", Reason.SOURCE_MISSING),
        (tmp_path, Reason.SOURCE_UNREADABLE),
    ]:
        with pytest.raises(SourceError) as caught:
            open_folder({"path": str(path)})
        assert caught.value.reason is reason
    fill(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    monkeypatch.setattr(folder, "MAX_NAMES", 2)
    with pytest.raises(SourceError, match="more than 2 files"):
        open_folder({"path": str(tmp_path)})
