"""`make bench-peers`: the same clip and the same model in what a user would pick instead, in environments of their own.

Each peer is installed as its own documentation says, by pip and nothing else, into build/peers/NAME; that takes
gigabytes, once. Frames a second, CPU per frame, memory, time from start to first answer and size on disk stand beside
those of this project, as ratios to it. Minima and maxima of interleaved rounds; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PEERS = ROOT / "build" / "peers"
sys.path.insert(0, str(ROOT))

from tests.bench.setting import Pressure, Setting  # noqa: E402


@dataclass(frozen=True, slots=True)
class Peer:
    """A package, what pip is asked for, and the script that a user would write with it."""

    name: str
    packages: tuple[str, ...]
    script: str


ULTRALYTICS = Peer("ultralytics", ("ultralytics", "onnx", "onnxruntime"), "peer_ultralytics.py")
THEIRS = (
    Peer("openvino-model-api", ("openvino-model-api[onnx]",), "peer_modelapi.py"),
    ULTRALYTICS,
    Peer("inference", ("inference",), "peer_inference.py"),
)
OURS = ("onnx:cpu", "openvino:cpu")


def main() -> int:
    """Install, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    args = parser.parse_args()
    PEERS.mkdir(parents=True, exist_ok=True)
    missing = {peer.name: why for peer in THEIRS if (why := _install(peer))}
    model = PEERS / "yolo11n-320.onnx"
    if not model.exists():
        subprocess.run([_python(ULTRALYTICS), str(HERE / ULTRALYTICS.script), "export", str(model)], check=True)
    cores = os.cpu_count() or 1
    commands = {
        f"ours {delegate}, {threads} thread{'s' * (threads > 1)}": [
            sys.executable, str(HERE / "peer_ours.py"), delegate, str(threads)
        ]
        for delegate in OURS
        for threads in dict.fromkeys((1, cores))
    }  # fmt: skip
    commands |= {p.name: [_python(p), str(HERE / p.script)] for p in THEIRS if p.name not in missing}
    with tempfile.TemporaryDirectory(prefix="edge-peers-") as name:
        clip = Setting(Path(name), Path(name), args.rounds, args.seconds).clip
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        pressure = Pressure()
        for _ in range(args.rounds):
            for title, (python, script, *more) in commands.items():
                rounds[title].append(_once([python, script, str(model), str(clip), str(args.seconds), *more]))
    sizes = {peer.name: _size_mb(PEERS / peer.name) for peer in THEIRS if peer.name not in missing}
    sizes |= dict.fromkeys((title for title in commands if title.startswith("ours")), _own_size_mb())
    _show(rounds, sizes, missing, pressure.percent)
    kept = {"cpu_pressure_percent": pressure.percent, "install_mb": sizes, "rounds": rounds, "missing": missing}
    (ROOT / "build" / "peers.json").write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def _install(peer: Peer) -> str:
    """Make the peer's environment unless it is there; what pip said when that failed."""
    stamp = PEERS / peer.name / "installed"
    if stamp.exists():
        return ""
    print(f"installing {', '.join(peer.packages)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(PEERS / peer.name)], check=True)
    command = [_python(peer), "-m", "pip", "install", "--quiet", *peer.packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip failed"])[-1][:200]
    stamp.touch()
    return ""


def _python(peer: Peer) -> str:
    return str(PEERS / peer.name / "bin" / "python")


def _once(command: Sequence[str]) -> dict[str, float]:
    """One run: what it says of itself, and how long its first answer took from the start of the process."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        first, last = 0.0, ""
        for line in process.stdout:
            if line.strip() == "first":
                first = time.perf_counter() - began
            last = line
    if process.returncode:
        raise RuntimeError(f"{command[1]} ended with {process.returncode}")
    found: dict[str, float] = {**json.loads(last), "first_s": first}
    return found


def _show(
    rounds: dict[str, list[dict[str, float]]], sizes: dict[str, float], missing: dict[str, str], pressure: float
) -> None:
    best = {title: _best(found) for title, found in rounds.items()}
    base = max((title for title in best if title.startswith("ours")), key=lambda title: best[title]["fps"])
    print(f"\nYOLO11n at 320 pixels, 640x480 MJPEG, as fast as it goes; CPU pressure {pressure:.0f} %")
    print(f"ratios to `{base}`; more is better for frames a second, less for all else")
    print(f"{'':28s}{'frames/s':>16s}{'CPU ms/frame':>18s}{'memory MB':>18s}{'first answer s':>18s}{'on disk MB':>18s}")
    for title, figures in best.items():
        cells = [
            f"{figures[key]:9.1f} {figures[key] / best[base][key]:5.2f}x" for key in ("fps", "cpu_ms", "mb", "first_s")
        ]
        cells.append(f"{sizes[title]:9.0f} {sizes[title] / sizes[base]:5.2f}x")
        print(f"{title:28s}" + "".join(f"{cell:>18s}" for cell in cells))
    for name, why in missing.items():
        print(f"{name:28s}not installed: {why}")


def _best(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        "fps": max(one["frames"] / one["wall_s"] for one in found),
        "cpu_ms": min(1000 * one["cpu_s"] / one["frames"] for one in found),
        "mb": min(one["peak_rss_mb"] for one in found),
        "first_s": min(one["first_s"] for one in found),
    }


def _size_mb(folder: Path) -> float:
    """What is on disk below `folder`, links not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def _own_size_mb() -> float:
    """An environment with this project, its worker's packages and the two runtimes of the comparison."""
    own = PEERS / "ours"
    if not (own / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(own)], check=True)
        wanted = f"{ROOT}[onnx,openvino]"
        subprocess.run([str(own / "bin/python"), "-m", "pip", "install", "--quiet", wanted], check=True)
        (own / "installed").touch()
    return _size_mb(own)


if __name__ == "__main__":
    raise SystemExit(main())
