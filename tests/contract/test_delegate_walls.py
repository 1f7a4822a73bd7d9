"""What a runtime leaves outside its process while it loads and runs: no connection, no file, and no needless copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from agent.worker.delegates import Delegate
from tests.contract.delegates import model, over, ovir_of
from tests.contract.graphs import onnx_model
from tests.contract.tflitewriter import Op, T, write

ROOT = Path(__file__).resolve().parents[2]
_RUN = """
import sys
from agent import memfd
from agent.worker.delegates import DELEGATES, Options
name, format, path = sys.argv[1:]
DELEGATES[name]().load(memfd.of_bytes("model", open(path, "rb").read()), format, Options()).run()
"""
# Peak of resident memory over the load and one run, beyond what the runtime's import took, by the size of the model.
_PEAK = """
import os, sys
from agent import memfd
from agent.worker.delegates import DELEGATES, Options
name, format, path = sys.argv[1:]
def status(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
source = os.open(path, os.O_RDONLY)
length, fd, done = os.fstat(source).st_size, memfd.create("model"), 0
while done < length:
    done += os.sendfile(fd, source, done, length - done)
memfd.seal(fd)
delegate = DELEGATES[name]()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
delegate.load(fd, format, Options()).run()
print((status("VmHWM") - before) / length)
"""
# In models: the file's pages where they are mapped, weights packed for the processor, and what a parser needs on the
# way; half of it the runtime's own first session. One more copy of the file in the heap would show in each.
MOST = {"litert": 3.0, "tflite": 3.0, "onnx:cpu": 3.0, "onnx": 9.0, "openvino": 3.7, "reference": 2.5}
_OPENED = re.compile(r'(?:openat\([^,]*, |open\(|creat\()"([^"]*)", ([A-Z_|0-9]+)')


def environment() -> dict[str, str]:
    """A user's, who knows nothing of telemetry switches; Python itself shall write nothing either."""
    kept = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.fault("F75")
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@over()
def test_importing_loading_and_running_opens_no_network_socket_and_writes_no_file(
    subject: tuple[Delegate, str], tmp_path: Path
) -> None:
    delegate, format = subject
    (tmp_path / "model").write_bytes(model(format))
    scratch, trace = tmp_path / "scratch", tmp_path / "trace"
    scratch.mkdir()
    command = ["strace", "-f", "-qq", "-e", "trace=socket,connect,openat,open,creat", "-o", str(trace)]
    script = [sys.executable, "-c", _RUN, delegate.name, format, str(tmp_path / "model")]
    done = subprocess.run(
        [*command, *script], cwd=ROOT, env={**environment(), "TMPDIR": str(scratch)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    if "PTRACE" in done.stderr:
        pytest.skip("tracing is not allowed here")
    assert done.returncode == 0, done.stderr
    text = trace.read_text()
    assert "AF_INET" not in text
    written = [
        path
        for path, flags in _OPENED.findall(text)
        if {"O_WRONLY", "O_RDWR", "O_CREAT"} & set(flags.split("|")) and not path.startswith(("/dev/", "/proc/self/"))
    ]
    # Python tries whether it may write there; where a graph's nodes went is read from a profile, which names them
    allowed = re.compile(rf"{re.escape(str(scratch))}/([a-z0-9_]{{8}}|[^/]*/run[^/]*[.]json)")
    assert [path for path in written if not allowed.fullmatch(path)] == []
    assert list(scratch.iterdir()) == []


def heavy(format: str) -> bytes:
    """A model that is hardly more than 16 MiB of weights."""
    n = 2048
    weights = np.random.default_rng(1).standard_normal((n, n)).astype(np.float32)
    if format == "tflite":
        tensors = [T("float32", (1, n)), T("float32", (n, n), data=weights), T("float32", (1, n))]
        return write(tensors, [Op("FULLY_CONNECTED", [0, 1, -1], [2], "FullyConnectedOptions")], [0], [2])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    data = onnx_model([node], [("x", "float32", (1, n))], [("y", "float32", (1, n))], [("w", weights)])
    return ovir_of(data) if format == "ovir" else data


@over()
def test_a_model_is_not_copied_more_often_than_its_runtime_must(subject: tuple[Delegate, str], tmp_path: Path) -> None:
    delegate, format = subject
    path = tmp_path / "model"
    path.write_bytes(heavy(format))
    command = [sys.executable, "-c", _PEAK, delegate.name, format, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    most = MOST.get(delegate.name) or MOST[delegate.name.partition(":")[0]]
    assert float(done.stdout) < most
