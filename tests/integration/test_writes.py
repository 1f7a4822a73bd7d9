"""What an updating process does to the disk, seen by strace and the interpreter: nothing but the recipes of fsops; and
what becomes of the device when it is killed there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ota.client.fsops import TEMPORARY_SUFFIX
from ota.publisher.publish import publish
from tests.crash.audited import FSOPS
from tests.crash.traced import TRACED, broken_recipes, calls_of, changed
from tests.demo.fleet import BIN
from tests.fakes.broker import Broker
from tests.integration.console import Device, did, make_fleet

AUDITED = Path(__file__).parents[1] / "crash" / "audited.py"
# what the updater owns; `keys` is the ring alone; `audit`, `verdicts.json` and `compiled` (written where a delegate
# that compiles won its trial) are the daemon's, by the same recipes
OWNED = re.compile(
    r"(state|trust|store|inbox|releases|config|audit|compiled)(/.*)?|keys(/ring(\.copy)?\.cbs(\.tmp)?)?"
    r"|verdicts\.json(\.tmp)?"
)
# not by fsops, and not the updater's: the lock of the state directory, opened and never written
OTHERS = {"lock"}
# Python's tempfile tries whether a directory can be written, with a name of its own
TRIAL = re.compile(r"/tmp/[a-z0-9_]{8}")
IN_PLACE = re.compile(r".*/inbox/[0-9a-f]{64}\.(part|map)")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, repository: Path, clip: Path) -> Iterator[Device]:
    """A device with 1.0.0 from a stick, which tests copy, and a stick with 1.1.0 besides."""
    for program in ("strace", "mosquitto"):
        found = Broker.available() if program == "mosquitto" else shutil.which(program)
        if not found:
            assert not os.environ.get("CI"), f"{program} is not installed"
            pytest.skip(f"{program} is not installed")
    fleet, made = make_fleet(tmp_path_factory.mktemp("writes"), repository, clip)
    try:
        publish(made.repository(), [("parts", "1.1.0")])
        did("edge-agent", "sideload", _stick(made, "1.0.0"), "--config", "agent.toml", folder=fleet.folder)
        _stick(made, "1.1.0")
        yield made
    finally:
        fleet.stop()


def _stick(device: Device, version: str) -> Path:
    folder, to = device.fleet.folder, _stick_folder(device, version)
    did("edge-ota", "grant", "repo", device.fleet.device, "parts", version, folder=folder)
    did("edge-ota", "bundle", "repo", device.fleet.device, to, folder=folder)
    return to


def _stick_folder(device: Device, version: str) -> Path:
    return device.fleet.folder / f"stick-{version}"


@pytest.fixture
def twin(device: Device, tmp_path: Path) -> Iterator[Device]:
    """A copy of the device, for one test to change."""
    made = device.twin(tmp_path)
    yield made
    made.fleet.stop()


@pytest.mark.slow
def test_the_updating_process_writes_by_the_recipes_of_fsops_and_in_no_other_way(device: Device, twin: Device) -> None:
    """An update by delta in the one-shot process of `edge-agent sideload`, with its real workers beside it."""
    folder = twin.fleet.folder
    words = ["sideload", str(_stick_folder(device, "1.1.0")), "--config", "agent.toml"]
    command = ["strace", "-f", "-y", "--seccomp-bpf", "-s", "4096", "-o", "trace", "-e", f"trace={TRACED}"]
    command += [sys.executable, "-B", str(AUDITED), "audit.jsonl", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1.1.0 committed" in done.stdout

    state = str((folder / "state").resolve())
    calls = calls_of((folder / "trace").read_text().splitlines(), str(folder.resolve()))
    paths = {path for path in changed(calls) if not path.startswith(("/dev/", "/proc/", "/memfd:", "/tmp/edge-"))}
    paths = {path for path in paths if not TRIAL.fullmatch(path)} - {str((folder / "audit.jsonl").resolve())}
    outside = {path for path in paths if not path.startswith(state + "/")}
    assert not outside, f"outside of its state directory: {outside}"
    inside = {path.removeprefix(state + "/") for path in paths}
    assert {path for path in inside if not OWNED.fullmatch(path)} <= OTHERS
    kinds = {path.partition("/")[0] for path in inside}
    assert kinds >= {"state", "trust", "store", "releases", "inbox"}, "the update was not seen"
    assert not [call for call in calls if call.path == f"{state}/lock" and call.name != "open"]
    assert not broken_recipes(calls, state, TEMPORARY_SUFFIX, [IN_PLACE])
    renamed = [call for call in calls if call.name == "rename" and call.path.startswith(state)]
    assert len(renamed) > 20

    said = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    ours = [entry for entry in said if entry["path"].startswith(state + "/")]
    others = {(entry["module"], Path(entry["path"]).name) for entry in ours if entry["module"] != FSOPS}
    assert others <= {("agent.daemon.lock", "lock")}
    recipes = {entry["function"] for entry in ours if entry["module"] == FSOPS}
    assert recipes >= {"write_atomic", "write_at", "remove"}
    print(f"\n{len(calls)} calls that change files, {len(renamed)} renames, {len(ours)} of Python's; recipes {recipes}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [9, 33])
def test_the_updating_process_killed_as_it_enters_an_fsync_completes_when_it_is_started_again(
    number: int, device: Device, twin: Device
) -> None:
    """The whole process with its workers, of which the campaign in `tests/crash` kills a smaller one more often."""
    folder, stick = twin.fleet.folder, _stick_folder(device, "1.1.0")
    words = [str(BIN / "edge-agent"), "sideload", str(stick), "--config", "agent.toml"]
    tracer = ["strace", "-f", "-o", "/dev/null", "-e", "trace=fsync", "-e", f"inject=fsync:signal=KILL:when={number}"]
    died = subprocess.run([*tracer, *words], cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert died.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), died.stderr
    assert "committed" not in died.stdout
    assert did("edge-agent", *words[1:], folder=folder) == "parts: 1.1.0 committed\n"
    left = [path for path in (folder / "state").rglob("*") if path.name.endswith(TEMPORARY_SUFFIX)]
    assert not left
    assert not list((folder / "state" / "inbox").iterdir())
