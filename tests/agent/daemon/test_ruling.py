"""What the daemon makes of a worker's words about rules; the worker may have been taken over by a model."""

from __future__ import annotations

import base64
import datetime
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent import config, memfd, protocol
from agent.daemon.captures import FOLDER, Captures
from agent.daemon.ruling import Ruling
from agent.ruleconfig import CaptureConfig
from ota import capture
from ota.client.fsops import Fs

PRIVATE = X25519PrivateKey.generate()
ITEM = {"label": "person", "score": 0.9, "box": [1.0, 2.0, 3.0, 4.0]}


class Bench:
    """A ruling over two rules, and everything it told."""

    def __init__(self, root: Path) -> None:
        key = PRIVATE.public_key().public_bytes_raw()
        self.told: list[tuple[str, dict[str, object]]] = []
        self.folder = root / FOLDER
        data = {
            "source": [{"name": "front", "kind": "video", "path": "/clip.avi"}],
            "line": [{"name": "people", "source": "front", "motion": 0.01}],
            "rule": [
                {"name": "gate", "line": "people", "snapshot": True},
                {"name": "count", "line": "people", "count": 3},
            ],
            "capture": {"operator_key": base64.b64encode(key).decode()},
        }
        parsed = config.parse(data, root / "agent.toml")
        captures = Captures(
            Fs(root), CaptureConfig(key), "cam-1", clock=lambda: 0.0, now=lambda: datetime.datetime.now(datetime.UTC)
        )
        self.ruling = Ruling(
            parsed.lines[0], parsed.rules, captures, lambda kind, facts: self.told.append((kind, facts))
        )

    def hear(self, message: object, picture: bytes | int | None = None, worker: int = 1) -> bool:
        """What a worker says, with a picture or a descriptor that it makes pass for one."""
        fds = [memfd.of_bytes("snapshot", picture)] if isinstance(picture, bytes) else [picture]
        packet = protocol.Packet(message, [] if picture is None else fds)
        try:
            return self.ruling.heard(packet, worker)
        finally:
            packet.close()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def began(rule: str, item: object = ITEM) -> protocol.RuleBegan:
    return protocol.RuleBegan(rule, 7, 1, item)  # type: ignore[arg-type]


def test_an_event_is_told_with_its_item_and_its_sealed_picture(bench: Bench) -> None:
    assert bench.hear(began("gate"), b"jpeg")
    [(kind, facts)] = bench.told
    assert (kind, facts["line"], facts["rule"], facts["score"]) == ("rule_began", "people", "gate", 0.9)
    [path] = bench.folder.iterdir()
    assert path.stem == facts["capture"]
    header, picture = capture.open_with(path.read_bytes(), PRIVATE)
    assert (picture, header["label"]) == (b"jpeg", "person")


def test_an_end_is_told_once_and_only_of_what_began(bench: Bench) -> None:
    bench.hear(protocol.RuleEnded("gate", 7, 1, 2.0))
    bench.hear(began("gate"))
    bench.hear(protocol.RuleEnded("gate", 9, 3, 2.0))
    bench.hear(protocol.RuleEnded("gate", 9, 3, 2.0))
    assert [kind for kind, _ in bench.told] == ["rule_began", "rule_ended"]


def test_the_end_of_the_worker_ends_what_lasts(bench: Bench) -> None:
    bench.hear(began("count"))
    assert bench.ruling.lasting() == {"count": ""}
    bench.ruling.interrupted(2)
    assert bench.ruling.lasting() == {}
    assert bench.told[-1] == ("rule_ended", {"line": "people", "rule": "count", "duration_s": None})


def test_around_a_swap_every_beginning_has_one_end_and_the_successors_event_lasts(bench: Bench) -> None:
    bench.hear(began("count"), worker=1)
    bench.hear(began("count"), worker=2)  # it has frames before the daemon knows that it is in charge
    bench.hear(protocol.RuleEnded("count", 7, 1, 2.0), worker=1)
    bench.ruling.interrupted(2)
    bench.hear(began("gate"), worker=1)  # of the last frame that the old one held
    told = [(kind, facts["rule"]) for kind, facts in bench.told]
    assert told == [("rule_began", "count"), ("rule_ended", "count"), ("rule_began", "count")]
    assert bench.ruling.lasting() == {"count": ""}
    bench.hear(protocol.RuleEnded("count", 9, 3, 2.0), worker=2)
    assert bench.told[-1] == ("rule_ended", {"line": "people", "rule": "count", "duration_s": 2.0})


def test_a_beginning_that_is_told_twice_ends_once_before(bench: Bench) -> None:
    for _ in range(2):
        bench.hear(began("count"))
    assert [kind for kind, _ in bench.told] == ["rule_began", "rule_ended", "rule_began"]


def test_a_descriptor_that_is_no_picture_is_not_kept_and_the_event_is_told(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"jpeg" * 2000)
    shrinks = memfd.create("shrinks", 8000)  # a mapping of it would end the daemon when the worker cuts it
    reading, writing = os.pipe()
    os.close(writing)
    sealed = memfd.of_bytes("sealed", b"jpeg")
    write_only = os.open(f"/proc/self/fd/{sealed}", os.O_WRONLY)
    os.close(sealed)
    for fd in (os.open(tmp_path, os.O_RDONLY), os.open(file, os.O_PATH), os.open(file, os.O_RDONLY), shrinks, reading,
               write_only):  # fmt: skip
        bench.hear(began("gate"), fd)
        assert bench.told[-1][0] == "rule_began"
        assert bench.told[-1][1]["capture"] == ""
    assert not bench.folder.exists()


def test_a_picture_for_a_rule_that_wants_none_is_not_kept(bench: Bench) -> None:
    assert bench.hear(began("count"), b"jpeg")
    assert not bench.folder.exists()


def test_a_rule_that_nobody_set_is_not_heard(bench: Bench) -> None:
    assert not bench.hear(began("made-up"))
    assert not bench.hear(protocol.StopWorker())
    assert bench.told == []


@pytest.mark.parametrize(
    "item",
    [
        {"label": 7, "score": "high", "box": [1, 2]},
        {"label": "a\u001b[31m" * 1000, "score": float("nan"), "box": [float("inf")] * 4},
        {"box": {"x": 1}},
        {"score": 10**400, "box": [10**4000] * 4},
        {},
    ],
)
def test_what_a_worker_makes_up_is_not_repeated(bench: Bench, item: dict[str, object]) -> None:
    bench.hear(began("gate", item), os.urandom(100))
    [(_, facts)] = bench.told
    assert facts.keys() <= {"line", "rule", "label", "capture"}
    assert "\x1b" not in str(facts.get("label", ""))
    assert len(str(facts.get("label", ""))) <= 80
    [path] = bench.folder.iterdir()
    capture.open_with(path.read_bytes(), PRIVATE)


def test_a_line_without_rules_and_gate_asks_its_worker_for_nothing(tmp_path: Path) -> None:
    data = {
        "source": [{"name": "front", "kind": "video", "path": "/clip.avi"}],
        "line": [{"name": "people", "source": "front"}],
    }
    parsed = config.parse(data, tmp_path / "agent.toml")
    assert Ruling(parsed.lines[0], parsed.rules, None, lambda *_: None).wish is None


def test_what_a_worker_is_told_is_what_the_file_says(bench: Bench) -> None:
    wish = bench.ruling.wish
    assert wish is not None
    assert (wish.motion, [rule["name"] for rule in wish.rules]) == (0.01, ["gate", "count"])
    assert wish.rules[1]["count"] == 3
