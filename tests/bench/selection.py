"""Whether trials choose the delegate that is fastest in truth while the board is busy, how long they take, and what a
wrong choice would cost.

The truth comes first and is shown: for each model the minimum of 200 runs per candidate, nothing else running, in wall
time as it was. Then both cores are loaded by burners, and the same trials that a device makes choose for each model in
turn. A choice is right that is within 5 % of the fastest. `python -m tests.bench.selection --trials 20` runs it alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from agent import memfd, protocol  # noqa: E402
from agent.config import UpdateConfig  # noqa: E402
from agent.daemon.selection import Verdict, quantile, rank  # noqa: E402
from agent.daemon.supervisor import Supervisor, default_host_command  # noqa: E402
from agent.daemon.trial import Subject  # noqa: E402
from agent.daemon.trials import TrialRunner  # noqa: E402
from agent.workbench import DEFAULT_GRAPH, LIMITS  # noqa: E402
from ota.release import Budgets  # noqa: E402
from tests.bench.setting import DATA, PARTS, Pressure, Setting  # noqa: E402

TRIALS = 100
TRUTH_RUNS = 200
TRUTH_ROUNDS = 8
RIGHT = 1.05
LARGE = "10 MB, ONNX"
GOLDEN_VECTORS = 8
BESIDE_S = 10.0
LADDER = {"tflite": ("openvino:cpu", "litert:xnnpack", "litert:cpu"), "onnx": ("onnx:cpu", "openvino:cpu")}
SHIPPED = (("parts", "models/parts/1.0.0"), ("digits", "models/digits/1.0.0"))


@dataclass(frozen=True)
class Case:
    """One model as files of one or more formats, and golden vectors where there are any."""

    name: str
    files: dict[str, Path]
    golden: bytes | None = None
    tolerance: dict[str, Any] | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(file, delegate) of all candidates."""
        return [(name, delegate) for name, path in self.files.items() for delegate in LADDER[path.suffix[1:]]]

    def subject(self) -> Subject:
        """What a trial is given."""

        async def open_file(name: str) -> int:
            return memfd.of_bytes(name, self.files[name].read_bytes())

        async def open_golden() -> int:
            assert self.golden is not None
            return memfd.of_bytes("golden", self.golden)

        opener: Callable[[], Awaitable[int]] | None = open_golden if self.golden is not None else None
        return Subject(self.load, open_file, opener, self.tolerance or {}, Budgets(None, None))

    def load(self, name: str, delegate: str) -> protocol.LoadModel:
        """The message that loads file `name` on `delegate`."""
        return protocol.LoadModel(
            "bench", "0.0.0", name, self.files[name].suffix[1:], delegate, 1, {}, dict(DEFAULT_GRAPH), [], []
        )


def large_model(folder: Path) -> Case:
    """A convolutional network with 10 MB of float32 weights, as a release would bring it: with golden vectors."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from agent.worker import golden

    rng = np.random.default_rng(7)
    nodes, weights, value, channels = [], [], "x", 3
    for number, (wide, size, stride) in enumerate(
        [
            (32, 3, 2),
            (64, 3, 2),
            (128, 3, 2),
            (256, 3, 2),
            (512, 3, 2),
            (256, 1, 1),
            (128, 3, 1),
            (256, 3, 1),
            (128, 1, 1),
        ]
    ):
        kernel = rng.normal(0, (2 / (channels * size * size)) ** 0.5, (wide, channels, size, size)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{number}"))
        pads = [size // 2] * 4
        nodes.append(helper.make_node("Conv", [value, f"w{number}"], [f"c{number}"], strides=[stride] * 2, pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        value, channels = f"r{number}", wide
    dense = rng.normal(0, 0.02, (128 * 7 * 7, 26)).astype(np.float32)
    missing = (10_000_000 - sum(len(w.raw_data) for w in weights)) // 4 // (128 * 7 * 7)
    dense = rng.normal(0, 0.02, (128 * 7 * 7, max(2, missing))).astype(np.float32)
    weights.append(numpy_helper.from_array(dense, "dense"))
    nodes += [helper.make_node("Flatten", [value], ["flat"]), helper.make_node("MatMul", ["flat", "dense"], ["y"])]
    graph = helper.make_graph(
        nodes, "large", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 224, 224])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, dense.shape[1]])], weights,
    )  # fmt: skip
    path = folder / "large.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    vectors = []
    for _ in range(GOLDEN_VECTORS):
        picture = rng.random((1, 3, 224, 224), np.float32)
        (answer,) = session.run(None, {"x": picture})
        vectors.append(golden.Vector(None, (picture,), {path.name: (answer,)}))
    largest = max(float(np.abs(v.expected[path.name][0]).max()) for v in vectors)
    return Case(
        LARGE, {path.name: path}, golden.dump_vectors(vectors),
        {"atol": {path.name: [max(0.01, 0.01 * largest)]}, "margin": 0.1},
    )  # fmt: skip


def cases(folder: Path) -> list[Case]:
    """The 10 MB model, the shipped lines, and the published models where they are."""
    found = [large_model(folder)]
    for name, where in SHIPPED:
        files = {path.name: path for path in sorted((ROOT / where).iterdir()) if path.suffix[1:] in LADDER}
        found.append(Case(name, files))
    if DATA.is_dir():
        wanted = [p for p in sorted(DATA.glob("*/*.tflite")) if p.name != "person_detect.tflite"]
        found += [Case(path.stem, {path.name: path}) for path in wanted]
    else:
        print(f"  no published models at {DATA}: only what is shipped")
    return found


@contextlib.asynccontextmanager
async def workers() -> Any:
    supervisor = Supervisor(listen=None, host_command=default_host_command(), on_lost=lambda: None)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()


@contextlib.contextmanager
def burners(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


async def truth_of(case: Case) -> dict[tuple[str, str], float]:
    """Least wall milliseconds of 200 runs of each candidate that loads, in interleaved rounds, nothing else running."""
    subject, found = case.subject(), {}
    async with workers() as supervisor:
        loaded = []
        for pair in case.pairs:
            worker = await supervisor.spawn("trial")
            fd = await subject.open(pair[0])
            try:
                await worker.request(case.load(*pair), protocol.ModelLoaded, fds=(fd,), timeout_s=LIMITS.load_timeout_s)
                loaded.append((pair, worker))
            except Exception as e:  # noqa: BLE001 - shown, and the candidate left out
                print(f"  {case.name}: {pair[1]} does not load: {str(e)[:80]}")
            finally:
                os.close(fd)
        for _ in range(TRUTH_ROUNDS):
            for pair, worker in loaded:
                packet = await worker.request(
                    protocol.Measure(2, TRUTH_RUNS // TRUTH_ROUNDS), protocol.Measured, timeout_s=120
                )
                least = min(packet.message.runs_ns) / 1e6
                found[pair] = min(found.get(pair, least), least)
    return found


def cpu_s() -> float:
    """CPU seconds of all processes that were started from here and are gone."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def one_trial(case: Case, pairs: Sequence[tuple[str, str]], limits: UpdateConfig) -> tuple[list[Verdict], float]:
    """The verdicts, and the seconds from the first worker asked for to the last one gone."""
    async with workers() as supervisor:
        while supervisor.host is None:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        verdicts = await TrialRunner(supervisor, limits).run(case.subject(), pairs)
        return verdicts, time.monotonic() - began


def show_truth(name: str, truth: dict[tuple[str, str], float]) -> None:
    best = min(truth.values())
    rows = sorted(truth.items(), key=lambda item: item[1])
    print(f"  {name[:34]:34} " + "  ".join(f"{d} {ms:.3f} ms ({ms / best:.2f}x)" for (_, d), ms in rows))


async def beside(setting: Setting) -> dict[str, Any]:
    """A line at 30 frames a second, and the same while trials of the large model run beside it."""
    from ota.publisher import spec
    from tests.agent.daemon.rig import running
    from tests.bench import pipeline

    model = pipeline.candidate(setting.folder / "parts", spec.load(PARTS / "1.0.0" / "spec.toml"))
    large = large_model(setting.folder)
    found: dict[str, Any] = {}
    async with running(setting.clip, LIMITS, fps=30) as rig:
        await rig.serve(model)
        await rig.frames(30)
        trials = TrialRunner(rig.supervisor, LIMITS)
        for kind in ("before", "during"):
            results, dropped = len(rig.results), len(rig.dropped)
            until, count, pressure = time.monotonic() + BESIDE_S, 0, Pressure()
            while time.monotonic() < until:
                if kind == "during":
                    await trials.run(large.subject(), large.pairs)
                    count += 1
                else:
                    await asyncio.sleep(0.2)
            latency = [(r.t_done_ns - r.t_frame_ns) / 1e6 for r in rig.results[results:]]
            found[kind] = {
                "p50_ms": quantile(latency, 0.5), "p95_ms": quantile(latency, 0.95), "results": len(latency),
                "dropped": len(rig.dropped) - dropped, "trials": count, "pressure_percent": pressure.percent,
                "worker_exits": rig.events.count("worker_exit"),
            }  # fmt: skip
    return found


def show_beside(found: dict[str, Any]) -> None:
    print("\nselection: a line at 30 fps, before and while trials of the 10 MB model run beside it")
    for kind, f in found.items():
        lost = f"{f['dropped']} of {f['results'] + f['dropped']} frames dropped, {f['worker_exits']} ends of the worker"
        times = f"p50 {f['p50_ms']:6.2f} ms  p95 {f['p95_ms']:6.2f} ms"
        print(f"  {kind:7} {times}  {lost}, {f['trials']} trials, CPU pressure {f['pressure_percent']:.0f} %")


def bench(setting: Setting, trials: int = TRIALS) -> dict[str, Any]:
    """Measure, print, and return what build/bench.json keeps."""
    cores = os.cpu_count() or 1
    quiet = Pressure()
    print(f"\nselection: truth, least of {TRUTH_RUNS} quiet runs per candidate")
    chosen_from = cases(setting.folder)
    truths = {case.name: asyncio.run(truth_of(case)) for case in chosen_from}
    for name, truth in truths.items():
        show_truth(name, truth)
    print(f"  CPU pressure {quiet.percent:.0f} %")
    seconds = {"quiet": [asyncio.run(one_trial(chosen_from[0], list(truths[LARGE]), LIMITS))[1] for _ in range(3)]}
    told, busy = [], Pressure()
    with burners(cores):
        for number in range(trials):
            case = chosen_from[number % len(chosen_from)]
            truth = truths[case.name]
            verdicts, took = asyncio.run(one_trial(case, list(truth), LIMITS))
            best = rank(verdicts)[0]
            ratio = truth[best.component, best.requested] / min(truth.values())
            told.append({"case": case.name, "chosen": best.requested, "ratio": ratio, "seconds": took,
                         "verdicts": [v.to_json() for v in verdicts]})  # fmt: skip
        seconds["loaded"] = [t["seconds"] for t in told if t["case"] == LARGE] or [
            asyncio.run(one_trial(chosen_from[0], list(truths[LARGE]), LIMITS))[1]
        ]
    right = sum(t["ratio"] <= RIGHT for t in told)
    alarms = [v for t in told for v in t["verdicts"] if v["reason"]]
    print(f"\nselection: {trials} trials with {cores} burners on {cores} cores, CPU pressure {busy.percent:.0f} %")
    print(f"  within {RIGHT - 1:.0%} of the truth          {right} of {trials}")
    print(f"  healthy candidates refused       {len(alarms)} of {sum(len(t['verdicts']) for t in told)}")
    for kind, values in seconds.items():
        spread = f"{min(values):.2f} s at best, {max(values):.2f} s at worst of {len(values)}"
        print(f"  a trial of the {LARGE}, {kind:7} {spread}")
    for t in told:
        if t["ratio"] > RIGHT:
            print(f"  wrong: {t['case']}: {t['chosen']}, {t['ratio']:.2f}x")
    print("\n  cost of the wrong choice, slowest over fastest delegate")
    for name, truth in truths.items():
        print(f"  {name[:34]:34} {max(truth.values()) / min(truth.values()):6.1f}x")
    serving = asyncio.run(beside(setting))
    show_beside(serving)
    readable = {name: {f"{c} on {d}": ms for (c, d), ms in truth.items()} for name, truth in truths.items()}
    return {
        "truth_ms": readable, "beside": serving, "trials": told, "right": right, "alarms": len(alarms),
        "seconds": seconds,
        "pressure_percent": {"quiet": quiet.percent, "loaded": busy.percent},
    }  # fmt: skip


def main() -> int:
    """This section alone; prints, and keeps build/selection.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=TRIALS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as name:
        kept = bench(Setting(Path(name), Path(name), 1, 1.0), args.trials)
    out = ROOT / "build" / "selection.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\n  every trial is in {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
