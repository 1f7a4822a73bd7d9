"""What the ledger of `generic-aarch64` may say was run under emulation: recognition, and each delegate of the ladder.

    python -m tests.bench.arm64delegates

In a Debian arm64 tree under qemu (see `tests.bench.arm64`; another 120 MB of wheels, /proc/cpuinfo of a real arm64
board) the profile is recognised, and each delegate runs the shipped classifier on seeded input. Its outputs are
compared with what the same delegate gives on this host: they may differ by a few steps, never more. Exit status 1
when something fails that the ledger says was run under emulation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROFILE = "generic-aarch64"
MODELS = Path("models") / "digits" / "1.0.0"
CPUINFO = ROOT / "tests" / "vectors" / "boards" / PROFILE / "proc" / "cpuinfo"
WHEELS = ("numpy", "opencv-python-headless", "ai-edge-litert", "onnxruntime", "openvino")
PLATFORMS = (
    *("manylinux_2_34_aarch64", "manylinux_2_31_aarch64", "manylinux_2_28_aarch64", "manylinux_2_27_aarch64"),
    *("manylinux_2_17_aarch64", "manylinux2014_aarch64"),
)
PARTS = ("agent", "device-profiles", "ota", "tests/bench", "models/digits")
# runtimes and CPUs differ by a step or two of an output's quantization
MAX_STEPS = 6.0
TIMEOUT_S = 150.0


def answers(delegate: str) -> dict[str, Any]:
    """What `delegate` makes of seeded input, in real values, for the first model format of ours that it takes."""
    import numpy as np

    from agent import memfd
    from agent.errors import ModelError
    from agent.worker.delegates import DELEGATES, Options

    try:
        loaded = DELEGATES[delegate]()
        form = next(f for f in ("tflite", "onnx") if f in loaded.formats)
        fd = memfd.of_bytes("model", (ROOT / MODELS / f"int8.{form}").read_bytes())
        try:
            session = loaded.load(fd, form, Options())
        finally:
            os.close(fd)
    except ModelError as e:
        return {"delegate": delegate, "failed": f"{e.reason.value}: {e.message}"}
    random = np.random.default_rng(1)
    for tensor in session.tensors:
        whole = np.issubdtype(tensor.dtype, np.integer)
        info = np.iinfo(tensor.dtype) if whole else None
        tensor[...] = random.integers(info.min, info.max + 1, tensor.shape) if info else random.random(tensor.shape)
    outputs = [spec.real(values).ravel().tolist() for spec, values in zip(session.outputs, session.run(), strict=True)]
    steps = [spec.scale or 0.01 for spec in session.outputs]
    return {
        "delegate": delegate,
        "runtime": loaded.runtime,
        "actual": session.actual,
        "outputs": outputs,
        "steps": steps,
    }


def inside(delegate: str) -> int:
    """In the tree: recognise the board, and run one delegate."""
    from agent import profile

    found = profile.here("auto")
    told = {"profile": found.profile.name, "evidence": found.evidence}
    print(json.dumps({**told, **(answers(delegate) if delegate else {})}))
    return 0


def main() -> int:
    """Run everything and print a table; the exit status."""
    from agent import profile
    from tests.bench import arm64

    why = arm64.missing()
    if why is not None:
        print(f"left out: {why}", file=sys.stderr)
        return 1
    tree = _tree(arm64._tree())
    chosen = profile.load_all()[PROFILE]
    claimed = {line.claim for line in chosen.ledger if line.run == "emulation"}
    good = True
    for delegate in chosen.delegates:
        told = _ask(tree, delegate)
        here = json.loads(_own(delegate))
        verdict = _verdict(told, here)
        good = good and (delegate not in claimed or verdict.startswith("as here"))
        recognised = f"{told.get('profile', '?')} ({told.get('evidence', told.get('failed', ''))})"
        print(f"{delegate:<16} {told.get('runtime', ''):<24} recognised {recognised:<36} {verdict}", flush=True)
    return 0 if good else 1


def _verdict(told: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    for where, answer in (("under emulation", told), ("here", here)):
        if "failed" in answer:
            return f"{where}: {answer['failed']}"
    if told["profile"] != PROFILE:
        return f"recognised as {told['profile']}"
    worst = max(
        abs(a - b) / step
        for mine, others, step in zip(told["outputs"], here["outputs"], here["steps"], strict=True)
        for a, b in zip(mine, others, strict=True)
    )
    return f"as here within {worst:.2f} steps" if worst <= MAX_STEPS else f"differs by {worst:.1f} steps"


def _own(delegate: str) -> str:
    """A process of its own on this host, as the tree has one."""
    code = "import json, sys; from tests.bench import arm64delegates as a; print(json.dumps(a.answers(sys.argv[1])))"
    return subprocess.run(
        [sys.executable, "-c", code, delegate], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def _ask(tree: Path, delegate: str) -> dict[str, Any]:
    """Run `inside` in the tree, in a mount namespace with a /proc that shows an arm64 processor."""
    shown = f'mount -t proc proc "$1/proc" && mount --bind "{CPUINFO}" "$1/proc/cpuinfo" && shift && exec "$@"'
    environment = {
        "PATH": f"{os.defpath}:/usr/sbin:/sbin",
        "PYTHONPATH": "/checked:/delegate-wheels",
        "OPENBLAS_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "HOME": "/",
    }
    command = ["chroot", str(tree), "/usr/bin/python3", "-m", "tests.bench.arm64delegates", "inside", delegate]
    isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", shown, "sh", str(tree), *command]
    try:
        done = subprocess.run(isolated, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"nothing within {TIMEOUT_S:g} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"failed": f"exit status {done.returncode} {last}"}
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _tree(tree: Path) -> Path:
    """The tree with the runtimes and the present state of this checkout in it."""
    wheels = tree / "delegate-wheels"
    if not wheels.is_dir():
        folder = tree / "root" / "delegate-wheels"
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps"]
        subprocess.run([*pip, *platforms, "--python-version", "3.11", "--dest", str(folder), *WHEELS], check=True)
        unfinished = tree / "delegate-wheels.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unfinished)
        unfinished.rename(wheels)
    checked = tree / "checked"
    shutil.rmtree(checked, ignore_errors=True)
    for part in PARTS:
        shutil.copytree(ROOT / part, checked / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "proc").mkdir(exist_ok=True)
    return tree


if __name__ == "__main__":
    sys.exit(inside(sys.argv[2]) if sys.argv[1:2] == ["inside"] else main())
