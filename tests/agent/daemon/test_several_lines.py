"""Several lines on one source: beside each other, and one on what the other finds. Real host, source and workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent import config, memfd
from agent.config import LineConfig
from agent.daemon.lines import LineRuntime
from agent.daemon.selection import Verdict
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import Supervisor
from agent.errors import ConfigError
from agent.lineconfig import MAX_LINES
from agent.protocol import Result
from agent.recording import WorkerRecorder
from agent.sourceconfig import SourceConfig
from agent.worker.dispatch import MAX_READERS
from ota.client.ports import Candidate
from ota.publisher import spec
from ota.publisher.build import build_release
from ota.publisher.create import create
from ota.release import Component
from tests import workerpython
from tests.agent.daemon.rig import LIMITS

DIGITS = Path(__file__).resolve().parents[3] / "models" / "digits"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    """A classifier of small grey pictures."""
    folder = tmp_path_factory.mktemp("digits")
    repository = create(folder / "repo")
    release = build_release(repository, spec.load(DIGITS / "1.1.0" / "spec.toml"), recorder=WorkerRecorder())

    async def open_plain(component: Component) -> int:
        return memfd.of_bytes(component.name, (folder / "repo/vault/plain" / component.plain_sha256).read_bytes())

    first = next(c for c in release.components if "litert:xnnpack" in c.delegates)
    return Candidate(release, first, open_plain)


class Floor:
    """One source and any lines on it; results and drops by line."""

    def __init__(self, clip: Path, policy: str, *lines: LineConfig) -> None:
        self.results: dict[str, list[Result]] = {line.name: [] for line in lines}
        self.dropped: dict[str, list[tuple[int, str]]] = {line.name: [] for line in lines}
        self.on_dropped = self._note_drop
        self.supervisor = Supervisor(listen=None, host_command=workerpython.host_command(), on_lost=lambda: None)
        options = {"path": str(clip), "policy": policy, "loop": True, "queue_frames": 4, "fps": 60}
        self.source = SourceRuntime(
            SourceConfig("belt", "video", options), self.supervisor,
            on_dropped=lambda *dropped: self.on_dropped(*dropped),
            on_restarted=lambda _: [line.source_restarted() for line in self.lines.values()],
            on_state=lambda _: None,
        )  # fmt: skip
        self.lines = {
            line.name: LineRuntime(
                line, self.source, self.supervisor, LIMITS,
                on_result=lambda name, result: self.results[name].append(result), on_event=lambda *_: None,
            )
            for line in lines
        }  # fmt: skip

    def _note_drop(self, line: str, seqs: list[int], why: str) -> None:
        self.dropped[line] += [(seq, why) for seq in seqs]

    async def serve(self, line: str, candidate: Candidate) -> None:
        await self.lines[line].serve(candidate, Verdict(candidate.component.name, "litert:xnnpack"))

    async def frames(self, line: str, count: int) -> None:
        """Wait for `count` more results of a line."""
        wanted = len(self.results[line]) + count
        async with asyncio.timeout(60):
            while len(self.results[line]) < wanted:
                await asyncio.sleep(0.02)

    def kill(self, line: str) -> None:
        serving = self.lines[line].serving
        assert serving is not None
        os.kill(serving.worker.pid, signal.SIGKILL)


def run(body: Callable[[Floor], Awaitable[None]], clip: Path, *lines: LineConfig, policy: str = "live") -> Floor:
    """Run `body` on a fresh floor and stop everything."""
    made: list[Floor] = []

    async def main() -> None:
        floor = Floor(clip, policy, *lines)
        made.append(floor)
        await floor.supervisor.start()
        floor.source.start()
        try:
            await body(floor)
            # what the end of everything drops is another matter
            floor.dropped = {line: list(dropped) for line, dropped in floor.dropped.items()}
            floor.on_dropped = lambda *_: None
        finally:
            for line in floor.lines.values():
                await line.stop()
            await floor.source.stop()
            await floor.supervisor.stop()

    asyncio.run(main())
    return made[0]


TWO = {"source": [{"name": "belt", "kind": "video", "path": "/a"}], "line": [{"name": "parts", "source": "belt"}]}


def test_a_line_on_another_looks_at_the_others_source() -> None:
    table = {**TWO, "line": [*TWO["line"], {"name": "digits", "on": "parts", "only": ["nut"], "boxes": 3}]}
    parsed = config.parse(table, Path("/etc/edge-agent/agent.toml"))
    first, second = parsed.lines
    assert (second.source, second.crops) == ("belt", {"labels": ["nut"], "margin": 0.1, "least_px": 8.0, "most": 3})
    assert first.crops is None
    assert not config.fuses(parsed, parsed.sources[0], True), "the frames of a line that is followed go further"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"name": "digits", "on": "digit"}, "on 'digit' is not among ['parts']"),
        ({"name": "digits", "on": "digits"}, "on 'digits' is not among ['parts']"),
        ({"name": "digits", "on": "parts", "source": "belt"}, "has no source of its own"),
        ({"name": "digits", "on": "parts", "boxes": 0}, "boxes = 0 is not between 1 and 64"),
        ({"name": "digits"}, "source is missing"),
    ],
)
def test_a_line_on_what_is_not_there_is_refused(line: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse({**TWO, "line": [*TWO["line"], line]}, Path("/etc/edge-agent/agent.toml"))
    assert text in caught.value.message
    assert caught.value.hint


def test_more_lines_than_a_source_has_readers_for_are_refused_and_one_seat_is_kept_for_a_swap() -> None:
    assert MAX_LINES == MAX_READERS - 1
    lines = [{"name": f"line-{i}", "source": "belt"} for i in range(MAX_LINES - 1)]
    lines.append({"name": "chained", "on": "line-0"})
    assert len(config.parse({**TWO, "line": lines}, Path("/etc/a.toml")).lines) == MAX_LINES
    with pytest.raises(ConfigError, match="'belt' has 7 lines already"):
        config.parse({**TWO, "line": [*lines, {"name": "more", "source": "belt"}]}, Path("/etc/a.toml"))


def seqs(results: list[Result]) -> list[int]:
    return [result.seq for result in results]


PARTS = LineConfig("parts", "belt", 1, "never", ())
BESIDE = LineConfig("digits", "belt", 1, "never", ())
ON = LineConfig("digits", "belt", 1, "never", (), on="parts", margin=0.1, boxes=4)


def test_two_lines_on_one_source_each_answer_every_frame(clip: Path, parts: Candidate, digits: Candidate) -> None:
    async def body(floor: Floor) -> None:
        await floor.serve("parts", parts)
        await floor.serve("digits", digits)
        await floor.frames("digits", 40)

    floor = run(body, clip, PARTS, BESIDE, policy="every")
    first = floor.results["digits"][0].seq
    for line in ("parts", "digits"):
        answered = [seq for seq in seqs(floor.results[line]) if seq >= first]
        assert answered == list(range(first, first + len(answered))), f"{line} missed a frame"
    assert {item["label"] for result in floor.results["digits"] for item in result.items} <= set("0123456789")
    assert any(result.items for result in floor.results["parts"])


def test_the_end_of_one_lines_worker_is_nothing_to_the_other(clip: Path, parts: Candidate, digits: Candidate) -> None:
    async def body(floor: Floor) -> None:
        await floor.serve("parts", parts)
        await floor.serve("digits", digits)
        await floor.frames("digits", 3)
        before = floor.lines["parts"].serving
        for _ in range(2):
            floor.kill("digits")
            await floor.frames("parts", 5)
            await floor.frames("digits", 3)
        assert floor.lines["parts"].serving is before

    floor = run(body, clip, PARTS, BESIDE)
    assert not [why for _, why in floor.dropped["parts"] if why == "worker_lost"]
    answered = seqs(floor.results["parts"])
    assert answered == sorted(set(answered))


@pytest.mark.parametrize("policy", ["live", "every"])
def test_a_line_on_another_answers_what_that_found(
    clip: Path, parts: Candidate, digits: Candidate, policy: str
) -> None:
    async def body(floor: Floor) -> None:
        await floor.serve("parts", parts)
        await floor.serve("digits", digits)
        await floor.frames("digits", 25)

    floor = run(body, clip, PARTS, ON, policy=policy)
    found = {result.seq: result.items for result in floor.results["parts"]}
    checked = 0
    for result in floor.results["digits"]:
        assert found.get(result.seq), "only frames in which something was found"
        for item in result.items:
            whole = found[result.seq][item["of"]["index"]]
            assert (item["of"]["label"], item["box"]) == (whole["label"], whole["box"])
            assert item["label"] in set("0123456789")
            checked += 1
    assert checked >= 25
    if policy == "every":
        assert not floor.dropped["digits"]
        last = floor.results["digits"][-1].seq
        first = floor.results["digits"][0].seq
        wanted = [seq for seq, items in sorted(found.items()) if items and first <= seq <= last]
        assert seqs(floor.results["digits"]) == wanted, "each frame with something in it, in order"


@pytest.mark.parametrize("victim", ["parts", "digits"])
def test_neither_end_of_a_chain_is_held_up_by_the_death_of_the_other(
    clip: Path, parts: Candidate, digits: Candidate, victim: str
) -> None:
    async def body(floor: Floor) -> None:
        await floor.serve("parts", parts)
        await floor.serve("digits", digits)
        await floor.frames("digits", 3)
        for _ in range(2):
            floor.kill(victim)
            if victim == "digits":
                await floor.frames("parts", 10)
            await floor.frames(victim, 3)
            await floor.frames("digits", 3)

    floor = run(body, clip, PARTS, ON)
    survivor = {"parts": "digits", "digits": "parts"}[victim]
    assert not [why for _, why in floor.dropped[survivor] if why == "worker_lost"]
    for line, results in floor.results.items():
        answered = Counter(seqs(results))
        assert max(answered.values()) == 1, f"{line} answered a frame twice"


def test_a_swap_of_either_end_of_a_chain_goes_on(
    clip: Path, parts: Candidate, newer: Candidate, digits: Candidate
) -> None:
    async def body(floor: Floor) -> None:
        await floor.serve("parts", parts)
        await floor.serve("digits", digits)
        await floor.frames("digits", 3)
        await floor.serve("parts", newer)
        await floor.frames("digits", 5)
        await floor.serve("digits", digits)
        await floor.frames("digits", 5)
        assert floor.lines["parts"].serving is not None
        assert floor.lines["parts"].serving.candidate is newer

    floor = run(body, clip, PARTS, ON)
    assert {why for _, why in floor.dropped["parts"]} <= {"backlog", "stopped"}
    assert {why for _, why in floor.dropped["digits"]} <= {"backlog", "no_reader", "stopped"}


def test_a_follower_that_stands_still_holds_up_nobody(clip: Path, parts: Candidate, digits: Candidate) -> None:
    async def body(floor: Floor) -> None:
        await floor.serve("parts", parts)
        await floor.serve("digits", digits)
        await floor.frames("digits", 3)
        serving = floor.lines["digits"].serving
        assert serving is not None
        os.kill(serving.worker.pid, signal.SIGSTOP)
        try:
            await floor.frames("parts", 30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(serving.worker.pid, signal.SIGCONT)

    floor = run(body, clip, PARTS, ON)
    assert {why for _, why in floor.dropped["digits"]} >= {"backlog"}
