"""`make vm`: devices that were away for long in a machine whose clock really moves, and power that is really cut.

Every scenario starts from the same disk: broker, block server and enrolment listener of one publisher, and one enrolled
device under the shipped units, all in one machine without a network. Prints a table of what came out and how long it
took; exit status 1 when anything failed. Needs root, qemu-system-x86, linux-image-amd64, dosfstools and what the system
tests need; about half an hour, because the processor is emulated.

    run.py [--folder DIR] [--rebuild] [--cuts N] [SCENARIO …]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.system import tree
from tests.vm.image import Kernel, build
from tests.vm.machine import Machine, MachineError

INSIDE = "sh /opt/source/tests/vm/inside.sh"
AGENT = "/opt/edge-agent/bin/edge-agent"
CAMERA = "/opt/source/tests/vm/camera.py"
VIVID = "/sys/bus/platform/drivers/vivid"
# as udev's rules do, which the tree has not
GROUP = "chgrp video /dev/video0; chmod 660 /dev/video0"
PROGRAMS = ("qemu-system-x86_64", "qemu-img", "mkfs.vfat", "mke2fs", "depmod", "mkinitramfs")
SLOW_S = 2400.0
DAY_S = 86400
STICK_BYTES = 64 << 20


@dataclass
class Story:
    """What happened in one scenario."""

    name: str
    steps: list[tuple[str, float, str]] = field(default_factory=list)
    failure: str = ""

    def tell(self, what: str, seconds: float, outcome: str) -> None:
        """Note a step and show it at once."""
        self.steps.append((what, seconds, outcome))
        print(f"  {what:58} {seconds:7.1f} s  {outcome}", flush=True)


class Device:
    """The machine as the scenarios handle it; every act is a line of the story."""

    def __init__(self, machine: Machine, story: Story) -> None:
        self.machine = machine
        self.story = story

    def do(self, what: str, command: str, shown: str = "") -> str:
        """A command that must succeed; the last line it prints, or the last that `shown` finds, is its outcome."""
        done = self.machine.run(command, timeout_s=SLOW_S)
        found = re.findall(shown, done.out) if shown else done.out.splitlines()
        self.story.tell(what, done.seconds, found[-1].strip()[:60] if found else "done")
        return done.out

    def until_serves(self, version: str, how: str) -> None:
        """Wait until the daemon serves that version, committed."""
        # a candidate that was refused for good will not be served however long one waits
        asked = f"{INSIDE} serves {version} || grep -q \"'reason': 'quarantined'\" /run/version"
        seconds = self.machine.until(f"{version} is served", asked, SLOW_S)
        self.machine.run(f"{INSIDE} serves {version}")
        self.story.tell(f"{how}: {version}", seconds, "committed")

    def until_says(self, what: str, words: str) -> None:
        """Wait until the status says so."""
        seconds = self.machine.until(words, f"{AGENT} status | grep -q '{words}'", SLOW_S)
        self.story.tell(what, seconds, words)

    def until_logs(self, what: str, words: str, times: int) -> None:
        """Wait until the camera's log has these words so often."""
        seconds = self.machine.until(
            words, f"test $(grep -c '{words}' /tmp/camera.log) -ge {times} || {{ systemctl status watch; false; }}", 600
        )
        self.story.tell(what, seconds, words)

    def date(self) -> int:
        """Seconds since 1970 by the machine's clock."""
        return int(self.machine.run("date +%s").out)

    def move_clock(self, days: int) -> None:
        """Move the clock of the machine, which nobody keeps."""
        to = self.date() + days * DAY_S
        self.do(f"the clock is moved by {days:+} days", f"date -u -s @{to} +%F", r"\d{4}-\d\d-\d\d")


def off_for_400_days(device: Device) -> None:
    """Away for more than a year, its own certificate expired, everything re-issued twice: back by network alone."""
    device.do("broker, block server and listener start", f"{INSIDE} broker && {INSIDE} servers", "")
    device.do("the agent starts", "systemctl start edge-agent")
    device.until_serves("1.0.0", "over the network")
    device.do("the agent stops", "systemctl stop edge-agent")
    device.move_clock(400)
    device.do("roots, roles, lines, sticks and broker are re-issued", f"{INSIDE} reissue", r"root \d+ is in force")
    device.do("1.1.0 is published and granted", f"{INSIDE} newest")
    device.do("broker and servers start with new certificates", f"{INSIDE} broker && {INSIDE} servers", "")
    device.do("the agent starts", "systemctl start edge-agent")
    device.until_serves("1.1.0", "over the network")
    device.until_says("the link", "link       connected")
    device.do("its certificate, which had expired", f"{AGENT} status | grep ^identity", r"until [^,]*")


def clock_300_days_behind(device: Device) -> None:
    """Without the clock service no certificate is valid yet; with it the clock is raised and the update installs."""
    device.do("broker, block server and listener start", f"{INSIDE} broker && {INSIDE} servers", "")
    device.do("the agent starts", "systemctl start edge-agent")
    device.until_serves("1.0.0", "over the network")
    signed = device.date()
    device.do("1.1.0 is published and granted", f"{INSIDE} newest")
    device.do("the agent stops", "systemctl stop edge-agent")
    device.move_clock(-300)
    device.do(
        "without the clock service the agent starts",
        "systemctl mask --runtime edge-agent-clock 2>/dev/null; systemctl start edge-agent",
    )
    device.until_says("what it waits for", "ClockWait True")
    behind = device.date()
    device.do("the agent stops", "systemctl stop edge-agent; systemctl unmask --runtime edge-agent-clock 2>/dev/null")
    device.do(
        "with the clock service it starts",
        f"systemctl start edge-agent; {INSIDE} clock_verdict",
        "verdict: .*",
    )
    raised = device.date() - behind
    if abs(device.date() - signed) > DAY_S or raised < 299 * DAY_S:
        raise MachineError(f"the clock was raised by {raised} s only")
    device.story.tell("the clock was raised by", 0.0, f"{raised / DAY_S:.1f} days")
    device.until_serves("1.1.0", "over the network")
    # a clock that something keeps is left alone, even behind the floor
    device.do("the stop of the agent", "systemctl stop edge-agent")
    device.do("a clock that is kept in step is not touched", f"{INSIDE} kept_clock_stays", "verdict: .*")


def by_stick_after_400_days(device: Device) -> None:
    """The same absence without any network: a vfat stick with a zip."""
    _served_from_stick(device)
    device.do("the agent stops", "systemctl stop edge-agent")
    device.move_clock(400)
    device.do("roots, roles, lines, sticks and broker are re-issued", f"{INSIDE} reissue", r"root \d+ is in force")
    device.do("1.1.0 is published and granted", f"{INSIDE} newest")
    device.do("a stick with a zip is written", f"{INSIDE} stick new.zip", "usable until .*")
    device.do("the agent starts", f"{INSIDE} plug; systemctl start edge-agent")
    device.do("the stick is installed beside the daemon", f"{AGENT} sideload /media/stick/new.zip", "digits: .*")
    device.until_serves("1.1.0", "from the stick")


def by_stick_with_a_clock_behind(device: Device) -> None:
    """A clock that is 300 days behind and stays there: the signed floor judges the stick. The daemon is dead."""
    _served_from_stick(device)
    device.do("1.1.0 is published and granted", f"{INSIDE} newest")
    device.do("a stick with a directory is written", f"{INSIDE} stick new", "usable until .*")
    device.do("the agent stops", "systemctl stop edge-agent")
    device.move_clock(-300)
    device.do(
        "the stick is installed beside a dead daemon", f"{INSIDE} plug; {AGENT} sideload /media/stick/new", "digits: .*"
    )
    device.do("what the audit kept", "tail -1 /var/lib/edge-agent/audit/records.jsonl", '"outcome": "[^"]*"')
    device.do("the agent starts", "systemctl mask --runtime edge-agent-clock 2>/dev/null; systemctl start edge-agent")
    device.until_serves("1.1.0", "from the stick")


def _served_from_stick(device: Device) -> None:
    device.do("a stick with a directory is written", f"{INSIDE} stick first", "usable until .*")
    device.do("the agent starts", f"{INSIDE} plug; systemctl start edge-agent")
    device.do("the stick is installed beside the daemon", f"{AGENT} sideload /media/stick/first", "digits: .*")
    device.until_serves("1.0.0", "from the stick")
    device.do("the stick is pulled", "umount /media/stick")


def camera_unplugged(device: Device) -> None:
    """A V4L2 camera (the kernel's vivid) that is absent, forbidden, busy, unplugged while it streams, and back."""
    probe = 'printf \'[[source]]\\nname = "cam"\\nkind = "camera"\\ndevice = "/dev/video0"\\n\' >/run/cam.toml'
    device.do("a configuration with a camera is written", f"{probe}; chmod 644 /run/cam.toml")
    check = f"{AGENT} config check --config /run/cam.toml"
    device.do("config check without the camera", f"! {check}", "error: .*")
    device.do("the camera is plugged in", f"modprobe vivid n_devs=1 node_types=0x1; {GROUP}; ls -l /dev/video0")
    device.do("config check as a user without the group", f"! runuser -u nobody -- {check}", "error: .*")
    device.do("config check as the worker's user", f"runuser -u edge-worker -- {check}", "source cam: .*")
    watch = f"runuser -u edge-worker -- /opt/edge-agent/bin/python {CAMERA} /tmp/camera.log /dev/video0"
    device.do("a source process reads it", f"systemd-run --quiet --unit=watch {watch}")
    device.until_logs("frames come", '"state": "streaming"', 1)
    device.do("config check while another has it", f"! runuser -u edge-worker -- {check}", "error: .*")
    device.do("the camera is unplugged", f"echo vivid.0 >{VIVID}/unbind; ! ls /dev/video0 2>&1", "cannot access.*")
    device.until_logs("that is noticed", '"state": "reconnecting", "reason": "source_missing"', 1)
    device.do("the camera is plugged in again", f"sleep 3; echo vivid.0 >{VIVID}/bind; {GROUP}; ls -l /dev/video0")
    device.until_logs("the first frame after that", '"reconnects": 1', 1)
    device.do("what the source said", "cat /tmp/camera.log; systemctl stop watch", '"frame".*')
    print(device.machine.run("cat /tmp/camera.log").out, flush=True)


SCENARIOS: dict[str, Callable[[Device], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        off_for_400_days,
        clock_300_days_behind,
        by_stick_after_400_days,
        by_stick_with_a_clock_behind,
        camera_unplugged,
    )
}


def cut_power(folder: Path, disk: Path, kernel: Kernel, stick: Path, cuts: int) -> Story:
    """Kill the machine at moments of an update, boot what is left of its disk, and look what it serves."""
    story = Story(f"{cuts} power cuts during an update")
    machine = Machine(folder, disk, kernel, stick=stick, layer="cuts")
    device = Device(machine, story)
    try:
        machine.boot()
        device.do(
            "servers start",
            f"{INSIDE} broker && {INSIDE} servers; systemctl enable -q edge-agent; systemctl start edge-agent",
        )
        device.until_serves("1.0.0", "over the network")
        device.do("1.1.0 is published and granted", f"{INSIDE} newest; sync")
        for number in range(cuts):
            machine.run(f"sh -c '{AGENT} update >/dev/null 2>&1 &'")
            time.sleep(1 + 7 * number)
            machine.kill()
            booted = machine.boot()
            seconds = machine.until("an answer", f"{INSIDE} version | grep -E '^1.[01].0'", SLOW_S)
            version = machine.run(f"{INSIDE} version", check=False).out.partition(" ")[0]
            story.tell(f"cut {number + 1}, {1 + 7 * number} s into it", booted + seconds, f"serves {version}")
            device.do("servers start again", f"{INSIDE} broker && {INSIDE} servers", "")
        device.until_serves("1.1.0", "after the last cut, over the network")
    except (MachineError, AssertionError) as e:
        story.failure = str(e)
    finally:
        machine.discard()
    return story


def play(name: str, folder: Path, disk: Path, kernel: Kernel, stick: Path) -> Story:
    """One scenario from a fresh boot."""
    scenario = SCENARIOS[name]
    story = Story(name)
    print(f"\n{name}: {(scenario.__doc__ or '').splitlines()[0]}", flush=True)
    machine = Machine(folder, disk, kernel, stick=stick)
    try:
        story.tell("boot", machine.boot(), "running")
        scenario(Device(machine, story))
    except (MachineError, AssertionError) as e:
        story.failure = str(e)
        print(f"  FAILED: {e}", flush=True)
        print(machine.run("journalctl --no-pager -n 60 -o cat", check=False).out if machine.up else "", flush=True)
    finally:
        machine.discard()
    return story


def missing() -> str | None:
    """Why no machine can be made here, or None."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return tree.missing() or (f"not installed: {', '.join(absent)}" if absent else None)


def main() -> int:
    """Build what is not there, play the scenarios, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=tree.ROOT / ".cache" / "vm")
    parser.add_argument("--rebuild", action="store_true", help="make the disk anew")
    parser.add_argument("--cuts", type=int, default=4, metavar="N", help="power cuts (default: %(default)s)")
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, "power-cuts", []], metavar="SCENARIO")
    arguments = parser.parse_args()
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if (reason := missing()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 69
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    os.umask(0o022)
    kernel, disk, stick = Kernel(), folder / "disk.img", folder / "stick.img"
    kernel.shrink_initrd(folder)
    if arguments.rebuild or not disk.exists():
        began = time.monotonic()
        build(folder, kernel)
        print(f"disk made in {time.monotonic() - began:.0f} s", flush=True)
    stick.unlink(missing_ok=True)
    with stick.open("wb") as file:
        file.truncate(STICK_BYTES)
    subprocess.run(["mkfs.vfat", "-n", "STICK", str(stick)], check=True, stdout=subprocess.DEVNULL)
    wanted = arguments.scenarios or [*SCENARIOS, "power-cuts"]
    stories = [play(name, folder, disk, kernel, stick) for name in wanted if name != "power-cuts"]
    if "power-cuts" in wanted and arguments.cuts:
        stories.append(cut_power(folder, disk, kernel, stick, arguments.cuts))
    print(f"\n{'scenario':36} {'outcome':10} {'steps':>5} {'seconds':>8}")
    for story in stories:
        seconds = sum(step[1] for step in story.steps)
        print(f"{story.name:36} {'FAILED' if story.failure else 'passed':10} {len(story.steps):5} {seconds:8.0f}")
    return 1 if any(story.failure for story in stories) else 0


if __name__ == "__main__":
    sys.exit(main())
