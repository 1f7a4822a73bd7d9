"""`make demo`: the product's main job on this machine, with real parts, in about a minute.

A camera clip runs through an encrypted detector while its model is replaced over MQTT by a delta; three bad releases,
correctly signed, are refused by the trial; an operator rolls back. Exits with 0 only if all of it happened.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.demo import picture  # noqa: E402
from tests.demo.fleet import PARTS, VECTORS, Fleet, build_bad_release, damaged_copy  # noqa: E402
from tests.demo.observer import Observer  # noqa: E402

FPS = 30
CLIP_SECONDS = 12
CLIP_FRAMES = FPS * CLIP_SECONDS
# the production probation is 600 s and 900 results; a demo of a minute scales both by this, and nothing else
PROBATION_SCALE = 1 / 60
LINE = "parts"

CONFIG = f"""\
state_dir = "state"
run_dir = "run"

[[source]]
name = "belt"
kind = "video"
path = "clip.avi"
policy = "live"
loop = true

[[line]]
name = "{LINE}"
source = "belt"

[update]
probation_scale = {PROBATION_SCALE:.6f}
"""


class Failure(Exception):
    """The demo saw something else than what the product promises."""


def expect(condition: bool, what: str) -> None:
    """Raise unless `condition`."""
    if not condition:
        raise Failure(what)


class Demo:
    """The acts of the demo, in order."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder = folder
        self.out = out
        self.fleet = Fleet(folder)
        self.seen: Observer | None = None
        self.began_s = time.monotonic()
        self.rows: list[tuple[str, str]] = []
        self.outcomes: list[tuple[str, dict[str, Any]]] = []
        # the last frame known to be answered by 1.0.0, and the first known to be answered by 1.1.0
        self.last_old = self.first_new = 0

    def say(self, text: str) -> None:
        """One line with the time since the start."""
        print(f"[{time.monotonic() - self.began_s:5.1f} s] {text}", flush=True)

    @property
    def observer(self) -> Observer:
        """The connected observer."""
        assert self.seen is not None
        return self.seen

    def run(self) -> None:
        """All acts; raises Failure or TimeoutError at the first broken promise."""
        self.prepare()
        self.first_install()
        control = self.control_window()
        swap = self.replace_by_delta()
        self.refuse_bad_releases()
        self.roll_back()
        self.account(control, swap)
        self.draw()
        self.summary()

    # --- acts --------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Clip, repository, releases, broker, enrolment."""
        clip = self.folder / "clip.avi"
        subprocess.run(
            [sys.executable, str(PARTS / "clip.py"), str(clip), "--seconds", str(CLIP_SECONDS), "--fps", str(FPS)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.say(f"rendered the clip: {CLIP_FRAMES} frames of 640x480, day fading to evening")
        self.fleet.make_repository()
        for version in ("1.0.0", "1.1.0"):
            text = self.fleet.release(PARTS / version / "spec.toml")
            first, *rest = text.splitlines()[:-1]
            self.say(first)
            for line in rest:
                print(f"          {line}")
        self.fleet.publish(LINE, "1.0.0")
        port = self.fleet.start_broker()
        self.fleet.enroll(CONFIG)
        self.fleet.start_server()
        self.seen = Observer(self.fleet.keys, port, self.fleet.tenant, self.fleet.device)
        self.say(f"mosquitto with mTLS and ACL on port {port}, block server up, device {self.fleet.device} enrolled")

    def first_install(self) -> None:
        """The device starts empty and gets release 1.0.0."""
        self.fleet.start_agent()
        self.fleet.grant(LINE, "1.0.0")
        ended = self.end_of("1.0.0", "committed")
        self.say(f"1.0.0 committed on {ended['delegate']}; measured on this machine:")
        self.print_verdicts("1.0.0")

    def control_window(self) -> tuple[int, int]:
        """One whole round of the clip without a swap, to compare with."""
        first = (self.observer.last_seq() // CLIP_FRAMES + 1) * CLIP_FRAMES
        self.say(f"control: frames {first} to {first + CLIP_FRAMES - 1}, no update")
        self.observer.answered_through(first + CLIP_FRAMES - 1, 3 * CLIP_SECONDS)
        return first, first + CLIP_FRAMES

    def replace_by_delta(self) -> tuple[int, int]:
        """Release 1.1.0 comes as a delta over MQTT while frames flow."""
        first = (self.observer.last_seq() // CLIP_FRAMES) * CLIP_FRAMES
        self.last_old = self.observer.last_seq()
        published_s = time.monotonic()
        self.fleet.publish(LINE, "1.1.0")
        self.fleet.grant(LINE, "1.1.0")
        self.say("1.1.0 published and granted")
        ended = self.end_of("1.1.0", "committed")
        took_s = time.monotonic() - published_s
        self.first_new = self.observer.last_seq() + 1
        traffic = ended["traffic"]
        expect(traffic["delta_bytes"] > 0, f"1.1.0 was not installed by delta: {traffic}")
        share = traffic["delta_bytes"] / traffic["full_bytes"]
        self.say(
            f"1.1.0 committed on {ended['delegate']}, {took_s:.1f} s after publishing; fetched "
            f"{traffic['fetched_bytes']} bytes of deltas instead of {traffic['full_bytes']} ({share:.0%})"
        )
        self.rows += [
            ("delta against full", f"{traffic['fetched_bytes']} of {traffic['full_bytes']} bytes ({share:.1%})"),
            ("publish to commit", f"{took_s:.1f} s, of which probation {ended['probation']['seconds']:.1f} s"),
        ]
        # whole rounds of the clip, the last of them seen by 1.1.0 from end to end
        end = max(first + 2 * CLIP_FRAMES, self.first_new + CLIP_FRAMES)
        self.observer.answered_through(end - 1, 3 * CLIP_SECONDS)
        return first, end

    def refuse_bad_releases(self) -> None:
        """Three releases, correctly signed and sealed, that this device must not run."""
        damaged = damaged_copy(PARTS / "1.1.0" / "int8.onnx", self.folder / "damaged.onnx")
        bad = (
            ("1.2.0", damaged, "onnx:cpu", "golden_mismatch", "its weights were damaged before it was signed"),
            ("1.3.0", VECTORS / "crash.tflite", "litert:xnnpack", "worker_crashed", "it kills the runtime"),
            ("1.4.0", VECTORS / "hang.onnx", "onnx:cpu", "worker_hung", "it never ends"),
        )
        for version, model, delegate, reason, why in bad:
            build_bad_release(self.folder / "repo", version, model, delegate)
            self.fleet.publish(LINE, version)
            self.fleet.grant(LINE, version)
            ended = self.end_of(version, "rejected")
            expect(ended["reason"] == reason, f"{version} was refused with {ended['reason']}, not {reason}")
            serving = self.fleet.status()["lines"][LINE]
            expect(serving["version"] == "1.1.0", f"after {version} the device serves {serving['version']}")
            self.say(f"{version} ({why}) refused: {reason}; 1.1.0 serves at {serving['fps']:.0f} fps")

    def roll_back(self) -> None:
        """The operator's word at the device."""
        self.fleet.device_command("rollback", LINE)
        line = self.fleet.status()["lines"][LINE]
        expect(line["version"] == "1.0.0", f"after the roll-back the device serves {line['version']}")
        rolled = self.observer.wait(
            "the report of the roll-back",
            lambda: next((e for e in self.observer.events if e.get("outcome") == "rolled_back"), None), 20,
        )  # fmt: skip
        self.outcomes.append(("1.1.0", rolled))
        self.say("operator's roll-back: 1.0.0 serves again")

    def account(self, control: tuple[int, int], swap: tuple[int, int]) -> None:
        """Every frame exactly once; the swap cost none."""
        last = self.observer.last_seq()
        self.observer.answered_through(last, 20)
        twice = [seq for seq, count in self.observer.answers.items() if count != 1 and seq <= last]
        expect(not twice, f"frames answered more than once: {twice[:10]}")
        in_control = self.observer.drops_between(*control)
        in_swap = self.observer.drops_between(*swap)
        self.say(f"drops in the control window, frames {control[0]} to {control[1] - 1}: {in_control}")
        self.say(f"drops over the swap, frames {swap[0]} to {swap[1] - 1}: {in_swap}")
        places = {seq % CLIP_FRAMES for seq, _ in in_control}
        extra = [seq for seq, _ in in_swap if seq % CLIP_FRAMES not in places]
        expect(not extra, f"the swap dropped frames that the control window did not: {extra}")
        total = self.observer.drops_between(0, last + 1)
        self.rows += [
            ("frames", f"{last + 1}, each answered once or dropped with a reason; dropped {len(total)}"),
            ("drops, control / swap", f"{len(in_control)} / {len(in_swap)}"),
        ]

    def draw(self) -> None:
        """Day and evening under both releases."""
        panels = []
        clip = self.folder / "clip.avi"
        for place, light in ((CLIP_FRAMES // 6, "day"), (CLIP_FRAMES - 15, "evening")):
            frame = picture.frame_at(clip, place)
            for version, seq in self.sequences(place):
                latency_ms, items = self.observer.results[seq]
                title = f"release {version}, {light}: frame {seq}, {len(items)} parts, {latency_ms:.1f} ms"
                panels.append(picture.annotate(frame, items, title))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        picture.mosaic(panels, 2, self.out)
        self.say(f"wrote {self.out}")

    # --- small things ------------------------------------------------------------------------------------------------

    def sequences(self, place: int) -> list[tuple[str, int]]:
        """Frames that show `place` of the clip: the last before 1.1.0 was published, the first after its commit."""
        seen = [seq for seq in sorted(self.observer.results) if seq % CLIP_FRAMES == place]
        old = [seq for seq in seen if seq <= self.last_old]
        new = [seq for seq in seen if seq >= self.first_new]
        expect(bool(old and new), f"place {place} of the clip was not answered by both releases")
        return [("1.0.0", old[-1]), ("1.1.0", new[0])]

    def end_of(self, version: str, outcome: str) -> dict[str, Any]:
        """Wait for the end of an update, which must be `outcome`."""
        ended = self.observer.update_ended(version, 90)
        self.outcomes.append((version, ended))
        expect(ended["outcome"] == outcome, f"{version} ended {ended['outcome']}: {ended.get('message')}")
        return ended

    def print_verdicts(self, version: str) -> None:
        """Which delegate was chosen, and what the others measured."""
        for row in self.observer.verdicts(version):
            if row["reason"]:
                print(f"          {row['delegate']:16} {row['component']:12} {row['reason']}: {row['message'][:80]}")
            else:
                print(
                    f"          {row['delegate']:16} {row['component']:12} min {row['min_ms']:.2f} ms  p50 "
                    f"{row['p50_ms']:.2f}  p95 {row['p95_ms']:.2f}  {row['rss_bytes'] / 1e6:.0f} MB"
                )

    def summary(self) -> None:
        """The table a reader takes away."""
        status = self.fleet.status()
        line = status["lines"][LINE]
        stages = "; ".join(f"{k} {v['p50']:.2f}/{v['p95']:.2f}" for k, v in line["stages_ms"].items())
        flows = "; ".join(f"{k} {v['in']}/{v['out']}" for k, v in sorted(status["link"]["bytes"].items()))
        verdicts = self.observer.verdicts("1.0.0")
        passed = [v for v in verdicts if not v["reason"]]
        best = passed[0]
        others = ", ".join(f"{v['delegate']} {v['component']} {v['min_ms'] / best['min_ms']:.2f}x" for v in passed[1:])
        rows = [
            ("isolation, custody", f"{status['isolation']}, {status['custody']['kind']}"),
            ("delegate", f"{best['delegate']} with {best['component']}, fastest at {best['min_ms']:.2f} ms a frame"),
            ("alternatives measured", others or "none"),
            ("probation scale", f"{PROBATION_SCALE:.4f} of 600 s and 900 results"),
            ("frames per second", f"{line['fps']:.1f} of {FPS}"),
            ("stages p50/p95 ms", stages),
            ("bytes in/out", flows),
            ("daemon resident", f"{status['process']['rss_bytes'] / 1e6:.1f} MB"),
            *self.rows,
            *((f"update to {v}" if e["outcome"] != "rolled_back" else f"roll-back from {v}",
               e["outcome"] + (f": {e['reason']}" if e.get("reason") else "")) for v, e in self.outcomes),
        ]  # fmt: skip
        width = max(len(name) for name, _ in rows)
        print()
        for name, value in rows:
            print(f"  {name:{width}}  {value}")

    def close(self) -> None:
        """Stop every process."""
        if self.seen is not None:
            self.seen.close()
        self.fleet.stop()


def main() -> int:
    """Run the demo; 0 only if everything happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out" / "demo.png", help="the annotated picture")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edge-demo-") as name:
        demo = Demo(Path(name), args.out)
        try:
            demo.run()
        except (Failure, TimeoutError, RuntimeError) as e:
            print(f"\ndemo failed: {e}\n--- processes' log, last lines ---", file=sys.stderr)
            print("\n".join(demo.fleet.log().splitlines()[-40:]), file=sys.stderr)
            return 1
        finally:
            demo.close()
    print(f"\nall of it happened, in {time.monotonic() - demo.began_s:.0f} s; the picture: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
