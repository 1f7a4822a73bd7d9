"""The two commands as a person meets them, and the control socket for tests that ask a running daemon often."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import client, config
from agent.errors import AgentError
from ota.publisher import director
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from tests.demo.fleet import BIN, Fleet
from tests.demo.observer import Observer
from tests.workerpython import configured

ERROR = re.compile(r"error: (?P<message>.+) \[(?P<reason>[a-z_]+)\]")
CONFIG = """\
state_dir = "state"
run_dir = "run"
[[source]]
name = "belt"
kind = "video"
path = "{clip}"
policy = "live"
loop = true
[[line]]
name = "{line}"
source = "belt"
explore = "never"
{delegates}
[telemetry]
interval_s = 0.1
[update]
{update}
"""
# a trial of all that this machine has takes more than a second of a core; tests of the choice take all, which is none
TWO_RUNGS = ("litert:xnnpack", "onnx:cpu")
# seconds and results of probation are 600 and 900 times this
QUICK = "probation_scale = 0.001\nrun_timeout_s = 3"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Refusal:
    """What a refused command told its user."""

    message: str
    reason: str
    hint: str
    done: Done


def run(program: str, *words: object, folder: Path, timeout_s: float = 60) -> Done:
    """One command, to its end."""
    done = subprocess.run(
        [str(BIN / program), *map(str, words)],
        cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout_s,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def did(program: str, *words: object, folder: Path) -> str:
    """One command that must succeed; its stdout."""
    done = run(program, *words, folder=folder)
    assert done.code == 0, done.err
    return done.out


def refused(program: str, *words: object, folder: Path) -> Refusal:
    """One command that must be refused the way every command is: one line of error that ends in its reason, one line
    that says what to do next, an exit code of sysexits, and nothing that looks like a fault of the program."""
    return refusal(run(program, *words, folder=folder))


def refusal(done: Done) -> Refusal:
    """What a command that ended was refused with; see `refused`."""
    said = [line for line in done.err.splitlines() if not line.startswith(("note: ", "warning: "))]
    assert len(said) == 2, f"not an error and a hint:\n{done.err}"
    error = ERROR.fullmatch(said[0])
    assert error, done.err
    assert said[1].removeprefix("hint: ") != said[1], done.err
    assert 64 <= done.code <= 78, done
    return Refusal(error["message"], error["reason"], said[1].removeprefix("hint: "), done)


def tree(*folders: Path) -> dict[str, str]:
    """Mode and content of every file below `folders`, but for the empty ones that only carry a lock."""
    return {
        str(path): f"{path.stat().st_mode:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("lock", ".lock")
    }


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """No file below `folders` is made, changed or removed."""
    before = tree(*folders)
    yield
    assert tree(*folders) == before


def until(what: str, ready: Callable[[], Any], timeout_s: float = 90) -> Any:
    """The first true value of `ready`."""
    deadline = time.monotonic() + timeout_s
    while not (value := ready()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(0.05)
    return value


class Device:
    """The fleet's one device, as the tests handle it: its daemon starts and stops, its status is asked often."""

    def __init__(self, fleet: Fleet, clip: Path, *, line: str = "parts", delegates: Sequence[str] = TWO_RUNGS) -> None:
        self.fleet = fleet
        self.delegates = list(delegates)
        self.line = line
        self.clip = clip
        self.state = fleet.folder / "state"

    @property
    def config(self) -> Path:
        """Its agent.toml."""
        return self.fleet.folder / "agent.toml"

    def configure(self, update: str = QUICK, *, clip: Path | None = None) -> str:
        """Write agent.toml; returns its text."""
        rungs = f"delegates = {json.dumps(self.delegates)}" if self.delegates else ""
        text = configured(CONFIG.format(clip=clip or self.clip, line=self.line, delegates=rungs, update=update))
        self.config.write_text(text)
        return text

    def ask(self, path: str = "/status") -> Any:
        """What the daemon answers on its control socket, None while there is no daemon."""
        try:
            return client.ask(config.load(self.config), "GET", path)
        except AgentError:
            return None

    def serving(self) -> Any:
        """What the status says of the line."""
        status = self.ask()
        return status["lines"][self.line] if status else None

    def condition(self, kind: str, reason: str = "") -> Any:
        """The condition of that type, and of that reason where one is named, None while the status shows none."""
        found = [c for c in self.ask()["conditions"] if c["type"] == kind]
        return next((c for c in found if reason in ("", c["reason"])), None)

    def start(self, version: str = "") -> int:
        """Start the daemon and wait until it answers, and serves `version` where one is named; its process id."""
        agent = self.fleet.start_agent()
        until("an answer of the daemon", lambda: agent.poll() is not None or self.ask())
        assert agent.poll() is None, self.fleet.log()
        if version:
            until(f"serving {version}", lambda: self.serving()["version"] == version and self.serving()["results"])
        return agent.pid

    def stop(self) -> int:
        """Stop the daemon gracefully; its exit code."""
        assert self.fleet.agent is not None
        self.fleet.agent.terminate()
        return self.fleet.agent.wait(20)

    def install(self, observer: Observer, version: str) -> dict[str, Any]:
        """Publish and grant a built release; how its update ended."""
        publish(self.repository(), [(self.line, version)])
        return self.grant(observer, version)

    def grant(self, observer: Observer, version: str) -> dict[str, Any]:
        """Grant a published release and wait for the end of its update."""
        seen = len(observer.events)
        self.assign(version)
        return ended(observer, version, seen)

    def assign(self, version: str) -> None:
        """Grant a published release and let the daemon look."""
        # without a hint: the daemon holds hints back that come as fast as tests
        director.grant(self.repository(), self.fleet.device, self.line, version)
        self.look()

    def repository(self) -> Repository:
        """The operator's repository."""
        return Repository.open(self.fleet.folder / "repo")

    def payloads(self, version: str) -> list[str]:
        """Names of every payload of the first component of a built release."""
        release = next(r for r in self.repository().releases(self.line) if r.version == version)
        component = release.components[0]
        return [component.full.sha256, *(delta.payload.sha256 for delta in component.deltas)]

    def look(self) -> None:
        """Let the running daemon look for releases, as `edge-agent update` does."""
        client.ask(config.load(self.config), "POST", "/check")

    def enroll_another(self, name: str) -> None:
        """Enrol a device of that name, in a folder of that name beside agent.toml: one that exists on paper alone."""
        folder = self.fleet.folder / name
        folder.mkdir()
        shutil.copy(self.config, folder)
        did("edge-agent", "enroll", "--config", "agent.toml", "--device", name, "--out", "request.json", folder=folder)
        words = ("enroll", self.fleet.folder / "repo", "request.json", "--broker", "127.0.0.1", "--out", "bundle.json")
        did("edge-ota", *words, folder=folder)

    def twin(self, folder: Path) -> Device:
        """A device below `folder` with a copy of this one's configuration and state, and no daemon yet."""
        shutil.copytree(self.state, folder / "state", ignore=shutil.ignore_patterns("lock"))
        shutil.copy(self.config, folder)
        return Device(Fleet(folder), self.clip, line=self.line, delegates=self.delegates)


def ended(observer: Observer, version: str, seen: int, timeout_s: float = 60) -> dict[str, Any]:
    """The end of an update to `version` that was told after the first `seen` events."""

    def found() -> Any:
        return next((e for e in observer.events[seen:] if is_end(e) and e.get("version") == version), None)

    event: dict[str, Any] = observer.wait(f"the end of the update to {version}", found, timeout_s)
    return event


def is_end(event: dict[str, Any]) -> bool:
    """Whether an event is the end of an update."""
    return event["kind"] == "update" and event.get("outcome") not in (None, "up_to_date")


def flip_one_bit(payload: Path) -> None:
    """Damage a file in its middle."""
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(data)


def make_fleet(folder: Path, repository: Path, clip: Path, *, update: str = QUICK) -> tuple[Fleet, Device]:
    """A copy of the repository, broker and block server up, the device enrolled, nothing granted, no daemon."""
    shutil.copytree(repository, folder, dirs_exist_ok=True)
    fleet = Fleet(folder)
    device = Device(fleet, clip)
    fleet.start_broker()
    fleet.enroll(device.configure(update))
    fleet.start_server()
    return fleet, device


@contextmanager
def watching(fleet: Fleet) -> Iterator[Observer]:
    """An observer of the fleet's device, for a while."""
    assert fleet.broker is not None
    seen = Observer(fleet.keys, fleet.broker.port, fleet.tenant, fleet.device)
    try:
        yield seen
    finally:
        seen.close()
