"""A model file tried by hand: the same workers, loads and measurements as on a device, without daemon, keys or release.

Behind `edge-agent bench` and `edge-agent infer`, and what the release builder asks for tensor specs and golden vectors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent import memfd, protocol
from agent.config import UpdateConfig
from agent.daemon.interpreter import check_interpreter
from agent.daemon.selection import Verdict, failure
from agent.daemon.supervisor import Supervisor, default_host_command
from agent.daemon.trial import Subject
from agent.daemon.trials import TrialRunner
from agent.daemon.worker import Worker
from agent.errors import AgentError, ModelError, Reason
from agent.profile import DELEGATES
from agent.sourceconfig import SourceConfig
from agent.sourcesecret import with_secrets
from ota import strictjson
from ota.errors import OtaError
from ota.release import Budgets

MAX_FAULT_BYTES = 16 * 1024

_Specs = tuple[list[Any], list[Any]]
LIMITS = UpdateConfig(
    poll_s=3600, probation_s=0, probation_results=1, probation_scale=1, load_timeout_s=60, run_timeout_s=30,
    crash_limit=5, crash_window_s=600, settings_probation_s=120, trial_memory_mb=4096, metered=False,
)  # fmt: skip
# what one delegate makes of a model says nothing about the next
ANOTHER_MAY_RUN_IT = (
    Reason.RUNTIME_MISSING,
    Reason.MODEL_UNLOADABLE,
    Reason.WORKER_CRASHED,
    Reason.WORKER_OUT_OF_MEMORY,
    Reason.DELEGATE_FELL_BACK,
)
_OTHERS = "leave --delegate out to try all that take this format"
DEFAULT_GRAPH: dict[str, Any] = {
    "task": "raw",
    "labels": [],
    "preprocess": {
        "resize": "stretch", "interpolation": "linear", "color": "rgb", "mean": [0.0] * 3, "std": [255.0] * 3,
    },
    "postprocess": {"kind": "raw"},
}  # fmt: skip


def format_of(model: Path) -> str:
    """`tflite`, `onnx` or `ovir`, by the file's name.

    Raises:
        ModelError: `model_missing`, `unknown_format`.
    """
    if not model.is_file():
        raise ModelError(Reason.MODEL_MISSING, f"{model} does not exist", hint="name a .tflite, .onnx or .ovir file")
    suffix = model.suffix.lstrip(".").lower()
    if suffix not in ("tflite", "onnx", "ovir"):
        raise ModelError(
            Reason.UNKNOWN_FORMAT, f"{model} is neither .tflite, .onnx nor .ovir", hint="convert it, or rename the file"
        )
    return suffix


def delegates_for(model_format: str, ladder: Sequence[str]) -> list[str]:
    """The delegates of `ladder` that take files of `model_format`."""
    return [name for name in ladder if model_format in DELEGATES[name]]


async def bench(
    model: Path,
    ladder: Sequence[str],
    graph: Mapping[str, Any],
    outputs: Sequence[str],
    python: Path | None = None,
) -> list[Verdict]:
    """Measure `model` on every delegate of `ladder` that takes its format, interleaved, in workers under `python`.

    Raises:
        ModelError: the file is missing or of an unknown format.
        AgentError: `no_delegate` when none of `ladder` takes its format; no worker can be started.
    """
    model_format = format_of(model)
    delegates = delegates_for(model_format, ladder)
    if not delegates:
        raise none_runs(model, ())
    async with _supervisor(python) as supervisor:
        specs = await _specs(supervisor, model, outputs)
        subject = Subject(
            load=lambda component, delegate: _load_message(component, model_format, delegate, graph, specs),
            open=lambda _: asyncio.to_thread(_open, model),
            golden=None,
            tolerance={},
            budgets=Budgets(None, None),
        )
        return await TrialRunner(supervisor, LIMITS).run(subject, [(model.name, name) for name in delegates])


async def probe(source: SourceConfig, base: Path, python: Path | None = None) -> protocol.SourceOpened:
    """Open `source` once in a process of its own, as the daemon would; names of secrets are taken from folder `base`.

    Raises:
        AgentError: whatever the source's process refuses, the name of the source in front.
    """
    async with _supervisor(python) as supervisor:
        worker = await supervisor.spawn("source")
        try:
            message = protocol.OpenSource(source.name, source.kind, with_secrets(source, base, os.environ))
            packet = await worker.request(message, protocol.SourceOpened, timeout_s=LIMITS.load_timeout_s)
        except AgentError as e:
            raise type(e)(e.reason, f"source {source.name}: {e.message}", hint=e.hint) from e
        opened: protocol.SourceOpened = packet.message
        packet.close()
        return opened


async def infer(
    model: Path,
    image: Path,
    delegate: str,
    graph: Mapping[str, Any],
    outputs: Sequence[str],
    python: Path | None = None,
) -> tuple[protocol.ModelLoaded, protocol.Result]:
    """Run `model` once on the picture `image`, in a worker under `python`.

    Raises:
        ModelError: the model or the picture is missing.
        AgentError: whatever the worker refuses.
    """
    model_format = format_of(model)
    if not image.is_file():
        raise ModelError(Reason.IMAGE_UNREADABLE, f"{image} does not exist", hint="name a PNG or JPEG file")
    async with _supervisor(python) as supervisor:
        specs = await _specs(supervisor, model, outputs)
        worker = await supervisor.spawn("model")
        loaded = await _load(worker, model, _load_message(model.name, model_format, delegate, graph, specs))
        with _closing(os.open(image, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            packet = await worker.request(
                protocol.RunImage(), protocol.Result, fds=(fd,), timeout_s=LIMITS.run_timeout_s
            )
        return loaded, packet.message


def describe(
    models: Mapping[str, Path],
    outputs: Mapping[str, Sequence[str]],
    graph: Mapping[str, Any],
    images: Sequence[bytes] | None,
) -> Path:
    """Run the describing worker on `models`; returns the folder with facts.json, golden.npz and tolerance.json.

    None for `images` loads the models without running them and records nothing; an empty list records seeded noise.
    The caller removes the folder.

    Raises:
        ModelError: `model_unloadable` and the like, as the worker says.
    """
    folder = Path(tempfile.mkdtemp(prefix="edge-describe-"))
    try:
        _describe(folder, models, outputs, graph, images)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def _describe(
    folder: Path,
    models: Mapping[str, Path],
    outputs: Mapping[str, Sequence[str]],
    graph: Mapping[str, Any],
    images: Sequence[bytes] | None,
) -> None:
    paths = []
    for number, image in enumerate(images or ()):
        path = folder / f"image_{number}"
        path.write_bytes(image)
        paths.append(str(path))
    request: dict[str, Any] = {
        "models": {name: str(path.absolute()) for name, path in models.items()},
        "outputs": {name: list(names) for name, names in outputs.items()},
        "graph": dict(graph),
    }
    if images is not None:
        request["images"] = paths
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "agent.worker.main", "describe"]
    names, limit_s = ", ".join(models), LIMITS.load_timeout_s * max(1, len(models))
    try:
        done = subprocess.run(
            [*command, "--request", str(folder / "request.json"), "--out", str(folder)],
            capture_output=True, text=True, errors="replace", timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise ModelError(
            Reason.WORKER_HUNG, f"{names}: no answer of the runtime in {limit_s:g} s", hint="check the file's export"
        ) from e
    if done.returncode != 0:
        raise _describe_error(done, names)


def _describe_error(done: subprocess.CompletedProcess[str], names: str) -> ModelError:
    """The fault that the describing worker printed as JSON on its last line, or how it died."""
    last = (done.stderr.strip().splitlines() or [""])[-1]
    try:
        # the runtime may have been taken over by the model that it loaded
        fault = strictjson.loads(last.encode(), max_bytes=MAX_FAULT_BYTES, what="fault")
        return ModelError(Reason(fault["reason"]), str(fault["message"]), hint=str(fault["hint"]))
    except (OtaError, ValueError, KeyError, TypeError):
        how = f"died with signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        return ModelError(
            Reason.MODEL_UNLOADABLE,
            f"{names}: the runtime {how}",
            hint=f"check the file's export; the runtime's last words: {last[:200]}",
        )


@contextlib.asynccontextmanager
async def _supervisor(python: Path | None = None) -> AsyncIterator[Supervisor]:
    if python is not None:
        check_interpreter(python)
    supervisor = Supervisor(listen=None, host_command=default_host_command(python), on_lost=lambda: None)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _open(model: Path) -> int:
    try:
        data = model.read_bytes()
    except OSError as e:
        raise ModelError(Reason.MODEL_MISSING, f"{model}: {e.strerror}") from e
    return memfd.of_bytes("model", data)


async def _load(worker: Worker, model: Path, message: protocol.LoadModel) -> protocol.ModelLoaded:
    with _closing(_open(model)) as fd:
        packet = await worker.request(message, protocol.ModelLoaded, fds=(fd,), timeout_s=LIMITS.load_timeout_s)
    loaded = packet.message
    assert isinstance(loaded, protocol.ModelLoaded)
    return loaded


async def _specs(supervisor: Supervisor, model: Path, outputs: Sequence[str]) -> _Specs:
    """Tensor specs with the outputs in the order of `outputs`, or the model's own, from the first runtime that loads
    it. Like a release they come from the one that knows the format best: OpenVINO hides what an int8 tensor stands for.
    Nothing where none loads it; whoever runs it will say why."""
    for delegate in delegates_for(format_of(model), tuple(DELEGATES)):
        worker = await supervisor.spawn("trial")
        try:
            message = _load_message(model.name, format_of(model), delegate, DEFAULT_GRAPH, ([], []))
            loaded = await _load(worker, model, message)
        except AgentError as e:
            if e.reason in ANOTHER_MAY_RUN_IT:
                continue
            raise
        finally:
            worker.kill()
        by_name = {spec["name"]: spec for spec in loaded.outputs}
        missing = [name for name in outputs if name not in by_name]
        if missing:
            raise ModelError(
                Reason.MODEL_SHAPE, f"{model.name} has no output {missing[0]!r}", hint=f"it has {', '.join(by_name)}"
            )
        return loaded.inputs, [by_name[name] for name in outputs] if outputs else loaded.outputs
    return [], []


def _load_message(
    component: str, model_format: str, delegate: str, graph: Mapping[str, Any], specs: _Specs
) -> protocol.LoadModel:
    return protocol.LoadModel(
        line="workbench",
        version="0.0.0",
        component=component,
        format=model_format,
        delegate=delegate,
        threads=1,
        options={},
        graph=dict(graph),
        inputs=specs[0],
        outputs=specs[1],
    )


def none_runs(model: Path, errors: Sequence[AgentError]) -> AgentError:
    """Why no delegate ran `model`: the first error that is about the model, not about a missing runtime."""
    if not errors:
        return AgentError(Reason.NO_DELEGATE, f"the delegate asked for takes no {model.suffix} files", hint=_OTHERS)
    return next((error for error in errors if error.reason is not Reason.RUNTIME_MISSING), errors[0])


def best_delegate(verdicts: Sequence[Verdict]) -> str:
    """The fastest that passed.

    Raises:
        AgentError: `no_delegate`, with the first failure.
    """
    passed = [v for v in verdicts if v.passed]
    if not passed:
        missing = all(v.reason == Reason.RUNTIME_MISSING.value for v in verdicts)
        raise AgentError(
            Reason.NO_DELEGATE,
            f"no delegate runs this model: {failure(verdicts).message}",
            hint="pip install 'edge-runtime-agent[all]'" if missing else "check how the file was exported",
        )
    return min(passed, key=lambda v: v.min_ms).requested
