"""Command: SIGKILL of a real updating process, again and again, and what became of the device each time.

    python tests/crash/kills.py [--count 1000] [--seed 1] [--power 0] [--folder DIRECTORY]

The processes are those of `oneshot`, which says what is real about them. They are killed in turn
- at every fsync, every rename, every write and every unlink of an update, one by one (strace delivers SIGKILL as the
  process enters the N-th call), of an update in full and of one by a delta;
- then, up to --count, at random moments; a quarter of the processes started again are killed once more.
After each kill the process is started again: it must serve the old release or the new one (the new one if it had
reported so), complete the update, quarantine nothing, fetch at most a window and what was not flushed again, and leave
not a file too many. --power N adds cuts of a whole file system: an ext4 on a loop device is shut down under the process
(EXT4_IOC_SHUTDOWN without flushing its log) and mounted again; needs root. Exit status 1 when anything was violated.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.release import LEAF_BYTES
from tests.crash.oneshot import FLUSH_BLOCKS, KEPT_FOLDERS, NEW, OLD, Process, Told, World, make_world
from tests.crash.scene import LIMITS

CALLS = {
    "fsync": "fsync",
    "rename": "rename,renameat,renameat2",
    "write": "pwrite64",
    "unlink": "unlink,unlinkat",
}
AGAIN = 0.25
LEAVES = 6
_EXT4_IOC_SHUTDOWN = 2 << 30 | 4 << 16 | ord("X") << 8 | 125
_NO_LOG_FLUSH = 2
_CLONE_NEWNS = 0x20000


@dataclass
class Campaign:
    """Counts of everything that happened; `violations` must stay empty."""

    kills: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    recovery_s: list[float] = field(default_factory=list)
    twice_bytes: list[int] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Processes killed."""
        return self.kills.total()

    def report(self) -> str:
        """What is printed at the end."""
        spent = sorted(1000 * s for s in self.recovery_s) or [0.0]
        twice = sorted(self.twice_bytes) or [0]
        return "\n".join(
            [
                f"kills       {self.count}: " + ", ".join(f"{n} at {kind}" for kind, n in self.kills.items()),
                "outcomes    " + ", ".join(f"{n} {what}" for what, n in self.outcomes.most_common()),
                f"violations  {len(self.violations)}",
                f"recovery    median {statistics.median(spent):.1f} ms, max {spent[-1]:.1f} ms (from the start of the "
                "process, without the interpreter's, until the committed release serves)",
                f"fetched     twice: median {statistics.median(twice):.0f} bytes, max {twice[-1]} bytes",
                *self.violations[:20],
            ]
        )


Killer = Callable[[World, Path], tuple[Told, bool]]
"""Runs a process on a state directory and kills it; tells what it told and whether it died of that."""


def killed_at(call: str, number: int) -> Killer:
    """Kill as the process enters its `number`-th call of a kind of `CALLS`."""

    def kill(world: World, state: Path) -> tuple[Told, bool]:
        process = Process(world, state, stopped=True)
        names = CALLS[call]
        arguments = ["-f", "-o", "/dev/null", "-e", f"trace={names}"]
        arguments += ["-e", f"inject={names}:signal=KILL:when={number}", "-p", str(process.pid)]
        with subprocess.Popen(["strace", *arguments], stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            if "attached" not in line:
                process.kill()
                raise RuntimeError(f"strace: {line.strip()}")
            process.proceed()
            return process.wait()

    return kill


def killed_after(seconds: float) -> Killer:
    """Kill after a time, wherever the process is then."""

    def kill(world: World, state: Path) -> tuple[Told, bool]:
        process = Process(world, state)
        time.sleep(seconds)
        process.kill()
        return process.wait()

    return kill


def kill_once(
    world: World, base: Path, folder: Path, kinds: Sequence[tuple[str, Killer]], campaign: Campaign, *, name: str
) -> bool:
    """Kill processes one after the other on a fresh copy of `base`, then let one end; False when the first of them
    ended before its death."""
    state = folder / "run"
    shutil.rmtree(state, ignore_errors=True)
    shutil.copytree(base, state)
    return judged(world, state, kinds, campaign, name=name)


def judged(world: World, state: Path, kinds: Sequence[tuple[str, Killer]], campaign: Campaign, *, name: str) -> bool:
    """As `kill_once`, on a state directory that lies ready."""
    committed, fetched, kills = False, 0, 0
    for kind, kill in kinds:
        told, died = kill(world, state)
        fetched += told.fetched_bytes
        if committed and told.serving not in (NEW, None):
            campaign.violations.append(f"{name}: {NEW} was reported, {told.serving or 'nothing'} served then")
        committed = committed or told.committed
        if not died:
            break
        campaign.kills[kind] += 1
        kills += 1
    if not kills:
        return False
    told, died = Process(world, state).wait()
    problems = problems_of(told, died, committed, state)
    twice = fetched + told.fetched_bytes - world.payload_bytes
    if twice > kills * (LIMITS.window_blocks + FLUSH_BLOCKS) * LEAF_BYTES:
        problems.append(f"{twice} bytes were fetched twice")
    campaign.violations += [f"{name}: {problem}" for problem in problems]
    resumed = 0 < told.fetched_bytes < world.payload_bytes or (fetched and not told.fetched_bytes)
    retried = "resumed" if resumed else "afresh"
    campaign.outcomes["new serves" if told.serving == NEW else f"old serves, retry {retried}"] += 1
    if told.recovery_s is not None:
        campaign.recovery_s.append(told.recovery_s)
    campaign.twice_bytes.append(max(0, twice))
    return True


def problems_of(told: Told, died: bool, committed: bool, state: Path) -> list[str]:
    """What is wrong with a process that was started again after kills, and with what it left."""
    if died or told.ended is None:
        return ["the process started again did not end by itself"]
    problems = []
    if told.serving not in ((NEW,) if committed else (OLD, NEW)):
        problems.append(f"{told.serving or 'nothing'} serves after the restart")
    if told.ended != NEW or not told.committed:
        problems.append(f"the retry does not complete: {told.ended or 'nothing'} serves")
    if told.quarantine:
        problems.append(f"quarantined: {told.quarantine}")
    needed = {"state/record.a", "state/record.b", "state/record.committed"}
    for item in Journal(Fs(state)).references():
        needed |= {f"store/{item.plain_sha256}.cbs", f"store/{item.golden_sha256}.cbs"}
        needed.add(f"releases/{item.release_sha256}.json")
    present = {str(path.relative_to(state)) for path in state.rglob("*") if path.is_file()}
    ours = {path for path in present if path.partition("/")[0] in KEPT_FOLDERS or path.endswith(".tmp")}
    if ours != needed:
        problems.append(f"not needed: {sorted(ours - needed)}, missing: {sorted(needed - ours)}")
    return problems


def at_every_call(world: World, folder: Path, campaign: Campaign, what: str, *, every: int = 1) -> None:
    """Kill at every (`every`-th) call of each kind."""
    for call in CALLS:
        number = 1
        while True:
            killer, name = killed_at(call, number), f"{what}, {call} number {number}"
            if not kill_once(world, world.state, folder, [(call, killer)], campaign, name=name):
                break
            number += every


def at_random(world: World, folder: Path, campaign: Campaign, what: str, count: int, rng: random.Random) -> None:
    """Kill at random moments until the campaign has `count` kills."""
    state = folder / "undisturbed"
    shutil.copytree(world.state, state)
    started = time.monotonic()
    Process(world, state).wait()
    lasts = time.monotonic() - started
    while campaign.count < count:
        killers = [("a random moment", killed_after(rng.uniform(0, 1.1 * lasts)))]
        if rng.random() < AGAIN:
            killers.append(("a random moment after a restart", killed_after(rng.uniform(0, 1.1 * lasts))))
        kill_once(world, world.state, folder, killers, campaign, name=f"{what}, kill {campaign.count}")


# -- power cuts of a real file system ----------------------------------------------------------------------------------


def own_mounts() -> None:
    """From here on nobody else sees what this process mounts: a copy of a mount in another namespace would keep a file
    system that was shut down from going away.

    Raises:
        OSError: not root.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_CLONE_NEWNS) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@contextlib.contextmanager
def loop_disk(folder: Path) -> Iterator[Path]:
    """An ext4 of 64 MiB on a loop device, mounted; needs root.

    Raises:
        CalledProcessError: this machine cannot.
    """
    image, mount = folder / "disk.img", folder / "disk"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def powered_off(folder: Path, seconds: float) -> Killer:
    """After a time shut the mounted file system down, without flushing anything; kill the process; mount again."""

    def kill(world: World, state: Path) -> tuple[Told, bool]:
        process = Process(world, state)
        time.sleep(seconds)
        fd = os.open(folder / "disk", os.O_RDONLY)
        fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        os.close(fd)
        process.kill()
        told, _ = process.wait()
        subprocess.run(["umount", folder / "disk"], check=True)
        subprocess.run(["mount", "-o", "loop", folder / "disk.img", folder / "disk"], check=True)
        return told, True

    return kill


def power_cuts(world: World, folder: Path, campaign: Campaign, what: str, count: int, rng: random.Random) -> None:
    """Cut the power of a real file system `count` times at random moments."""
    with loop_disk(folder) as mount:
        state, lasts = mount / "run", 0.0
        for number in range(count + 1):
            if state.exists():
                shutil.rmtree(state)
            shutil.copytree(world.state, state)
            os.sync()
            if number == 0:  # how long an undisturbed one takes
                started = time.monotonic()
                Process(world, state).wait()
                lasts = time.monotonic() - started
                continue
            killer = powered_off(folder, rng.uniform(0, 1.1 * lasts))
            judged(world, state, [("a power cut", killer)], campaign, name=f"{what}, power cut {number}")


# ----------------------------------------------------------------------------------------------------------------------


def worlds(folder: Path) -> dict[str, World]:
    """The update in full and the one by a delta."""
    return {
        "full": make_world(folder / "full", delta=False, leaves=LEAVES),
        "delta": make_world(folder / "delta", delta=True, leaves=LEAVES),
    }


def _start_s() -> float:
    """How long an interpreter takes to start and to import the updater."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import ota.client.updater"], check=True, cwd=Path(__file__).parents[2])
    return time.monotonic() - started


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="kills in all; every call comes first (about 400)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--power", type=int, default=0, help="power cuts of a real ext4 besides")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary directory otherwise")
    arguments = parser.parse_args()
    rng, campaign, cuts = random.Random(arguments.seed), Campaign(), Campaign()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        made = worlds(folder)
        if arguments.count:
            for number, (what, world) in enumerate(made.items()):
                work = folder / f"work-{what}"
                work.mkdir()
                if shutil.which("strace"):
                    at_every_call(world, work, campaign, what)
                at_random(world, work, campaign, what, arguments.count // 2 * (number + 1), rng)
            print(campaign.report())
            spent_s = min(_start_s() for _ in range(5))
            print(f"interpreter {1000 * spent_s:.0f} ms more, when it has to start", flush=True)
        if arguments.power:
            own_mounts()
            for what, world in made.items():
                work = folder / f"power-{what}"
                work.mkdir()
                power_cuts(world, work, cuts, what, arguments.power // 2, rng)
            print(f"power cuts of a real ext4\n{cuts.report()}")
    print(f"took        {time.monotonic() - started:.0f} s")
    return 1 if campaign.violations or cuts.violations else 0


if __name__ == "__main__":
    sys.exit(main())
