"""Source and model in one process: every frame answered once, the gap of a swap told, faults laid where they belong."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tomllib
from pathlib import Path

import pytest

from agent import config
from agent.daemon.selection import Verdict
from agent.errors import AgentError, ConfigError, Reason
from ota.client.ports import Candidate
from tests.agent.daemon.rig import LIMITS, Rig, run

TWO_LINES = """\
[[source]]
name = "belt"
kind = "video"
path = "clip.avi"
[[line]]
name = "parts"
source = "belt"
fused = true
[[line]]
name = "other"
source = "belt"
"""
NETWORK = """\
[[source]]
name = "belt"
kind = "rtsp"
url = "rtsp://camera/1"
[[line]]
name = "parts"
source = "belt"
fused = true
"""


def gaps(rig: Rig) -> list[object]:
    return [facts["gap_ms"] for kind, facts in zip(rig.events, rig.facts, strict=True) if kind == "served_again"]


def test_one_process_reads_the_source_and_answers_every_frame_once_and_in_order(clip: Path, parts: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames(40)
        assert rig.workers("fused") == [rig.pid]
        assert rig.workers("source") == rig.workers("model") == []
        assert rig.source.pid == rig.pid
        await rig.until(lambda: rig.source.state == "streaming" and rig.source.frames > 0)

    rig = run(body, clip, policy="every", fused=True)
    assert [result.seq for result in rig.results] == list(range(len(rig.results)))
    rig.account()


def test_a_swap_stops_the_old_worker_first_and_tells_the_gap(clip: Path, parts: Candidate, newer: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        old = rig.pid
        await rig.serve(newer)
        assert not os.path.exists(f"/proc/{old}")
        await rig.frames()
        assert rig.workers("fused") == [rig.pid]
        assert rig.line.serving is not None
        assert rig.line.serving.candidate is newer
        (gap,) = gaps(rig)
        assert isinstance(gap, int)
        assert gap > 0
        assert rig.line.tally.crashes == 0

    run(body, clip, fused=True)


def test_a_killed_worker_is_a_crash_of_the_model_and_comes_back_with_its_source(clip: Path, parts: Candidate) -> None:
    seen: list[Reason] = []

    async def body(rig: Rig) -> None:
        rig.on_crash = lambda line, candidate, reason: seen.append(reason)
        await rig.serve(parts)
        await rig.frames()
        victim = rig.pid
        os.kill(victim, signal.SIGSEGV)
        await rig.until(lambda: rig.pid not in (0, victim))
        await rig.frames()

    run(body, clip, fused=True)
    assert seen == [Reason.WORKER_CRASHED]


def test_a_source_that_comes_late_is_waited_for_and_blames_no_model(
    clip: Path, parts: Candidate, tmp_path: Path
) -> None:
    late = tmp_path / "late.avi"
    seen: list[Reason] = []

    async def body(rig: Rig) -> None:
        rig.on_crash = lambda line, candidate, reason: seen.append(reason)
        serving = asyncio.create_task(rig.serve(parts))
        await rig.until(lambda: rig.source.reason == Reason.SOURCE_MISSING.value)
        assert rig.source.state == "reconnecting"
        shutil.copy(clip, tmp_path / "part")
        (tmp_path / "part").rename(late)
        await serving
        await rig.frames()
        assert not seen

    run(body, late, fused=True)


def test_a_model_that_does_not_load_is_refused_as_ever(clip: Path, parts: Candidate) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(AgentError) as caught:
            await rig.line.serve(parts, Verdict(parts.component.name, "litert:nowhere"))
        assert caught.value.reason is Reason.UNKNOWN_DELEGATE
        await rig.serve(parts)
        await rig.frames()

    run(body, clip, LIMITS, fused=True)


@pytest.mark.parametrize("text", [TWO_LINES, NETWORK], ids=["two lines", "network"])
def test_fused_is_refused_where_it_cannot_be_with_what_to_do(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(tomllib.loads(text), tmp_path / "agent.toml")
    assert caught.value.reason is Reason.BAD_CONFIG
    assert "fused needs a local source that no other line looks at" in caught.value.message
    assert "leave fused out" in caught.value.hint


def test_a_profiles_wish_holds_for_the_sources_that_can_be_fused_alone(tmp_path: Path) -> None:
    parsed = config.parse(tomllib.loads(TWO_LINES.replace("fused = true", "")), tmp_path / "agent.toml")
    assert not config.fuses(parsed, parsed.sources[0], True)
    single = config.parse(tomllib.loads(TWO_LINES.rsplit("[[line]]", 1)[0]), tmp_path / "agent.toml")
    assert config.fuses(single, single.sources[0], False)
    wished = config.parse(tomllib.loads(TWO_LINES.rsplit("[[line]]", 1)[0].replace("fused = true", "")), tmp_path / "a")
    assert config.fuses(wished, wished.sources[0], True)
    assert not config.fuses(wished, wished.sources[0], False)
