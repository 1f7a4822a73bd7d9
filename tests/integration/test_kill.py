"""SIGKILL of the daemon in the middle of a transfer, again and again, costs at most a window each time."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ota.client.limits import Limits
from ota.publisher.repository import Repository
from ota.release import LEAF_BYTES, Payload
from tests.demo.fleet import Fleet, command
from tests.demo.observer import Observer

SPEC = """\
line = "parts"
version = "2.0.0"
task = "raw"
licence = "Apache-2.0"
[preprocess]
resize = "stretch"
interpolation = "linear"
color = "rgb"
mean = [0.0, 0.0, 0.0]
std = [255.0, 255.0, 255.0]
[postprocess]
kind = "raw"
[golden]
images = ["{image}"]
"""
KILLS = 5


def large_model(path: Path, columns: int) -> None:
    """A valid ONNX model of 768 x `columns` random weights, which no codec makes smaller."""
    weights = np.random.default_rng(7).standard_normal((768, columns), dtype=np.float32)
    nodes = [
        helper.make_node("Reshape", ["image", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["wide"]),
        helper.make_node("ReduceMax", ["wide"], ["scores"], axes=[1], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1, 768]), "shape")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))


def claimed_blocks(fleet: Fleet, payload: Payload) -> int:
    """Blocks that the inbox's map claims."""
    try:
        data = (fleet.folder / "state" / "inbox" / f"{payload.sha256}.map").read_bytes()
    except FileNotFoundError:
        return 0
    size = (len(payload.leaves) + 7) // 8
    return sum(byte.bit_count() for byte in data[-size:])


@pytest.mark.fault("F25")
def test_an_update_completes_over_five_kills_for_at_most_a_window_each(
    fleet: Fleet, observer: Observer, tmp_path: Path
) -> None:
    model = tmp_path / "large.onnx"
    large_model(model, 4096)
    spec = tmp_path / "large.toml"
    spec.write_text(SPEC.format(image=Path(__file__).parents[2] / "models/parts/golden/day.jpg"))
    command("edge-ota", "release", "repo", "--from", model, "--spec", spec, folder=fleet.folder)
    fleet.publish("parts", "2.0.0")
    payload = next(r for r in Repository.open(fleet.folder / "repo").releases("parts") if r.version == "2.0.0")
    full = payload.components[0].full
    total = len(full.leaves)

    fleet.grant("parts", "2.0.0")
    rng = random.Random(25)
    seen: list[int] = []
    for kill_at in sorted(rng.randrange(total // 10, total * 9 // 10) for _ in range(KILLS)):
        agent = fleet.start_agent()
        deadline = time.monotonic() + 60
        while (got := claimed_blocks(fleet, full)) < kill_at:
            assert agent.poll() is None, fleet.log()
            assert time.monotonic() < deadline, f"stuck at {got} of {total} blocks\n{fleet.log()}"
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        seen.append(claimed_blocks(fleet, full))
    assert seen[-1] < total, f"no kill hit the transfer: {seen} of {total}"
    assert seen == sorted(seen)
    assert len(set(seen)) == KILLS, f"a kill made no progress between: {seen}"

    fleet.start_agent()
    ended = observer.update_ended("2.0.0", 60)
    assert ended["outcome"] == "committed", ended["message"]
    fleet.stop()
    sent = sum(int(n) for n in re.findall(r"stopped: \d+ answers, (\d+) bytes", fleet.log()))
    window = Limits().window_blocks * LEAF_BYTES
    other = sum(c.full.length for c in (payload.golden,)) + (KILLS + 1) * 2 * ended["traffic"]["metadata_bytes"]
    other += (KILLS + 1) * len(payload.raw) + 64 * 1024
    print(f"killed at blocks {seen} of {total}; server sent {sent} bytes for {full.length} + {other} others")
    assert sent <= full.length + other + KILLS * window
    assert sent >= full.length
