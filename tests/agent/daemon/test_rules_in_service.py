"""Rules, snapshots and the motion gate with a real source process and a real model worker."""

from __future__ import annotations

import asyncio
import base64
import datetime
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent import config
from agent.daemon.captures import FOLDER, Captures
from agent.daemon.ruling import Ruling
from ota import capture
from ota.client.fsops import Fs
from ota.client.ports import Candidate
from tests.agent.daemon.rig import Rig, running

PRIVATE = X25519PrivateKey.generate()
PARTS = Path(__file__).resolve().parents[3] / "models" / "parts"
ALWAYS = {"name": "parts on the belt", "line": "parts", "above": 0.3}


def watched(rig: Rig, root: Path, rules: list[dict[str, object]], **line: object) -> None:
    """Give the rig's line rules, as a device with agent.toml would have them."""
    data = {
        "source": [{"name": "belt", "kind": "video", "path": "/clip.avi"}],
        "line": [{"name": "parts", "source": "belt", **line}],
        "rule": rules,
        "capture": {"operator_key": base64.b64encode(PRIVATE.public_key().public_bytes_raw()).decode()},
    }
    parsed = config.parse(data, root / "agent.toml")
    now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)  # noqa: E731
    captures = Captures(Fs(root), parsed.capture, "cam-1", clock=time.monotonic, now=now)
    rig.line.ruling = Ruling(parsed.lines[0], parsed.rules, captures, rig._note)


def still(folder: Path) -> Path:
    """A video in which nothing moves, from a camera without noise."""
    picture = cv2.imread(str(PARTS / "golden" / "day.jpg"))
    place = folder / "still.avi"
    writer = cv2.VideoWriter(str(place), cv2.VideoWriter_fourcc(*"MJPG"), 30, picture.shape[1::-1])
    for _ in range(30):
        writer.write(picture)
    writer.release()
    return place


def test_an_event_brings_the_picture_with_which_it_began(clip: Path, parts: Candidate, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(clip) as rig:
            watched(rig, tmp_path, [{**ALWAYS, "snapshot": True}])
            await rig.serve(parts)
            await rig.until(lambda: "rule_began" in rig.events)
            facts = rig.facts[rig.events.index("rule_began")]
            assert facts["line"] == "parts"
            assert facts["label"] in parts.release.graph["labels"]
            [path] = (tmp_path / FOLDER).iterdir()
            assert path.stem == facts["capture"]
            _, picture = capture.open_with(path.read_bytes(), PRIVATE)
            assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape == (480, 640, 3)
            await rig.frames(5)
            assert rig.line.ruling is not None
            assert rig.line.ruling.lasting() == {"parts on the belt": path.stem}

    asyncio.run(main())


def test_a_swap_ends_what_lasts_and_its_successor_begins_anew(clip: Path, parts: Candidate, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(clip) as rig:
            watched(rig, tmp_path, [ALWAYS])
            await rig.serve(parts)
            await rig.until(lambda: rig.events.count("rule_began") == 1)
            await rig.serve(parts)
            await rig.until(lambda: rig.events.count("rule_began") == 2)
            told = [kind for kind in rig.events if kind.startswith("rule_")]
            assert told == ["rule_began", "rule_ended", "rule_began"]
            await rig.one_model()
        rig.account()

    asyncio.run(main())


def test_frames_that_show_nothing_new_are_accounted_for_without_an_inference(parts: Candidate, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(still(tmp_path)) as rig:
            watched(rig, tmp_path, [ALWAYS], motion=0.005, refresh_s=1.0)
            await rig.serve(parts)
            await rig.until(lambda: rig.line.unchanged >= 150 and len(rig.results) >= 3)
            assert len(rig.results) < rig.line.unchanged / 10
            # the last answer stands: the event goes on through all of them
            assert rig.events.count("rule_began") == 1
            assert "rule_ended" not in rig.events
            assert not [why for _, why in rig.dropped if why == "worker_lost"]
            assert rig.line.restarts == 0

    asyncio.run(main())


def test_source_and_model_in_one_process_keep_the_rules_too(clip: Path, parts: Candidate, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(clip, fused=True) as rig:
            watched(rig, tmp_path, [ALWAYS])
            await rig.serve(parts)
            await rig.until(lambda: "rule_began" in rig.events)

    asyncio.run(main())
