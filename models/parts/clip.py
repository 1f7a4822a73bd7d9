#!/usr/bin/env python3
"""Write the demo clip: `clip.py OUT [--seconds 20] [--fps 30]`.

OUT becomes a 640x480 Motion-JPEG .avi of parts on a running belt, day light that fades to evening in its second half;
OUT.truth.json holds the true boxes of every frame. The same machine and OpenCV write the same bytes again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.parts import scene
from models.parts.belt import HEIGHT, WIDTH
from models.parts.sprites import LABELS

JPEG_QUALITY = 72
"""Of each frame: sensor noise makes higher values cost far more than they show."""


def write(out: Path, seconds: float, fps: int) -> int:
    """Write the clip and its truth; return the number of frames.

    Raises: OSError when OpenCV cannot write `out`.
    """
    writer = cv2.VideoWriter(str(out), cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter.fourcc(*"MJPG"), fps,
                             (WIDTH, HEIGHT))
    if not writer.isOpened():
        raise OSError(f"cannot write {out}: OpenCV's Motion-JPEG writer needs a writable path that ends in .avi")
    writer.set(cv2.VIDEOWRITER_PROP_QUALITY, JPEG_QUALITY)
    frames = []
    for frame in scene.clip_frames(seconds, fps):
        writer.write(frame.image)
        frames.append([{"label": LABELS[label], "box": [round(v, 2) for v in corners]}
                       for label, *corners in frame.boxes])
    writer.release()
    truth = {"width": WIDTH, "height": HEIGHT, "fps": fps, "labels": LABELS, "frames": frames}
    Path(f"{out}.truth.json").write_text(json.dumps(truth) + "\n")
    return len(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the .avi file to write")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--fps", type=int, default=30)
    arguments = parser.parse_args()
    count = write(arguments.out, arguments.seconds, arguments.fps)
    print(f"{arguments.out}: {count} frames")


if __name__ == "__main__":
    main()
