"""What models are and what they answer, for the publisher: a throw-away process beside its command.

Reads a request (JSON: `models` {component: path}, `outputs` {component: [names]}, `graph`, `images` [paths]) and writes
`facts.json` into the out folder; with an `images` key also `golden.npz` and `tolerance.json`, on seeded noise when the
list is empty. A refusal is one JSON object {reason, message, hint}, the last line of stderr, and an exit status.
Invariant: the formats' own parsers run here and nowhere else on the publisher's side.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from agent import memfd
from agent.errors import AgentError, ModelError, Reason, exit_code
from agent.worker import golden
from agent.worker.delegates import FORMATS as DELEGATE_FORMATS
from agent.worker.delegates import Delegate, DelegateLoader, Options
from agent.worker.graph import Graph, Preprocess, parse_graph
from agent.worker.pipeline import Pipeline
from agent.worker.preprocess import image_layout
from agent.worker.tensor import TensorSpec
from agent.worker.windowfile import decode_frame, encode_window

FORMATS = {".tflite": "tflite", ".onnx": "onnx", ".ovir": "ovir"}
EXTRAS = {"tflite": "litert", "onnx": "onnx", "ovir": "openvino"}
NOISE_VECTORS = 4
EXTREME_STRIDE = 8
NOISE_SEED = 20240426
NOISE_SIZE = (480, 640)


@dataclass(frozen=True)
class _Loaded:
    """A component on every delegate that takes it; the answers of the first become the golden vectors."""

    format: str
    delegates: tuple[str, ...]
    runtime: str
    pipelines: tuple[Pipeline, ...]

    @property
    def pipeline(self) -> Pipeline:
        return self.pipelines[0]


def run(request: str, out: str, delegates: Mapping[str, DelegateLoader]) -> int:
    """Answer the request file; the exit status."""
    cv2.setNumThreads(1)
    try:
        _answer(_read_request(Path(request)), Path(out), delegates)
    except AgentError as e:
        print(json.dumps({"reason": e.reason.value, "message": e.message, "hint": e.hint}), file=sys.stderr)
        return exit_code(e.reason)
    return 0


def _answer(request: Mapping[str, Any], folder: Path, delegates: Mapping[str, DelegateLoader]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    graph = parse_graph(request.get("graph", {}))
    usable = _usable(delegates)
    loaded = {
        name: _load(name, Path(path), request.get("outputs", {}).get(name, []), graph, usable)
        for name, path in request["models"].items()
    }
    _write(
        folder / "facts.json",
        {
            name: {
                "format": model.format,
                "delegates": [*model.delegates, *_elsewhere(model.format, delegates, usable)],
                "inputs": [spec.to_json() for spec in model.pipeline.inputs],
                "outputs": [spec.to_json() for spec in model.pipeline.outputs],
            }
            for name, model in loaded.items()
        },
    )
    if "images" in request:
        vectors, tolerance = _record(loaded, graph, [Path(path) for path in request["images"]])
        (folder / "golden.npz").write_bytes(golden.dump_vectors(vectors))
        _write(folder / "tolerance.json", tolerance)


def _read_request(path: Path) -> Mapping[str, Any]:
    try:
        request = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise AgentError(Reason.BAD_USAGE, f"request {path}: {e}", hint="give a JSON file") from e
    models = request.get("models") if isinstance(request, dict) else None
    if not isinstance(models, dict) or not models or not all(isinstance(v, str) for v in models.values()):
        raise AgentError(Reason.BAD_USAGE, f"request {path} names no models", hint='give {"models": {name: path}}')
    images = request.get("images", [])
    if not isinstance(images, list) or not all(isinstance(v, str) for v in images):
        raise AgentError(Reason.BAD_USAGE, f"request {path}: images is not a list of paths", hint="give paths")
    return dict(request)


def _usable(delegates: Mapping[str, DelegateLoader]) -> list[Delegate]:
    """Delegates whose runtime works here, in the table's order."""
    found = []
    for load in delegates.values():
        try:
            found.append(load())
        except ModelError:
            continue  # not installed: the facts simply do not list it
    return found


def _elsewhere(format: str, delegates: Mapping[str, DelegateLoader], usable: Sequence[Delegate]) -> list[str]:
    """Delegates of that format whose hardware or runtime is not here: none of them said no to the model, and a device
    that has one proves it by the golden vectors before it serves."""
    here = {delegate.name for delegate in usable}
    return [name for name in delegates if name not in here and format in DELEGATE_FORMATS.get(name, ())]


def _load(name: str, path: Path, outputs: Sequence[str], graph: Graph, usable: Sequence[Delegate]) -> _Loaded:
    """Load one component on every delegate that takes its format."""
    format = FORMATS.get(path.suffix)
    if format is None:
        raise ModelError(
            Reason.UNKNOWN_FORMAT, f"{path.name} is of no known format", hint=f"known: {', '.join(FORMATS)}"
        )
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ModelError(Reason.MODEL_MISSING, f"cannot read {path}: {e.strerror}", hint="check the path") from e
    candidates = [delegate for delegate in usable if format in delegate.formats]
    if not candidates:
        raise ModelError(
            Reason.RUNTIME_MISSING,
            f"no installed runtime reads {path.suffix}",
            hint=f"pip install 'edge-runtime-agent[{EXTRAS[format]}]'",
        )
    fd = memfd.of_bytes(name, data)
    takers: list[Delegate] = []
    pipelines: list[Pipeline] = []
    refusal: ModelError | None = None
    try:
        for delegate in candidates:
            try:
                session = delegate.load(fd, format, Options())
                if pipelines:  # every delegate listed must see the same tensors; not each knows their scales
                    pipeline = Pipeline(session, graph, pipelines[0].inputs, pipelines[0].outputs)
                else:
                    pipeline = Pipeline(session, graph, session.inputs, _in_order(outputs, session.outputs))
            except ModelError as e:
                refusal = refusal or e
                continue
            takers.append(delegate)
            pipelines.append(pipeline)
    finally:
        os.close(fd)
    if not takers:
        assert refusal is not None
        raise ModelError(refusal.reason, f"{path.name}: {refusal.message}", hint=refusal.hint)
    return _Loaded(format, tuple(delegate.name for delegate in takers), takers[0].runtime, tuple(pipelines))


def _in_order(names: Sequence[str], specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    by_name = {spec.name: spec for spec in specs}
    for name in names:
        if name not in by_name:
            raise ModelError(
                Reason.MODEL_SHAPE,
                f"the model has no output {name[:60]!r}, but {', '.join(sorted(by_name))}",
                hint="correct outputs in the [[component]] table",
            )
    return [by_name[name] for name in names]


def _record(
    loaded: Mapping[str, _Loaded], graph: Graph, images: Sequence[Path]
) -> tuple[list[golden.Vector], dict[str, Any]]:
    """Run every component on every input; the vectors and the tolerance they may be compared with."""
    if images:
        inputs = _pictures(images)
        inputs += _extremes(inputs[0])
    else:
        inputs = _noise(next(iter(loaded.values())).pipeline, graph)
    answers = {name: [_answers(pipeline, inputs) for pipeline in model.pipelines] for name, model in loaded.items()}
    atol: dict[str, list[float]] = {}
    for name, model in loaded.items():
        recorded, *others = answers[name]
        atol[name] = []
        for j, spec in enumerate(model.pipeline.outputs):
            differing = [outputs[j] for other in others for outputs in other]
            limit = golden.default_atol(spec, [outputs[j] for outputs in recorded], differing)
            atol[name].append(float(f"{limit:.6g}"))
    units = {name: golden.units(model.pipeline, graph) for name, model in loaded.items()}
    vectors = [
        golden.Vector(
            vector.image,
            vector.tensors,
            {name: tuple(map(golden.rounded, answers[name][0][i], atol[name], units[name])) for name in loaded},
        )
        for i, vector in enumerate(inputs)
    ]
    recorded_by = {name: model.runtime for name, model in loaded.items()}
    return vectors, {"atol": atol, "margin": golden.DEFAULT_MARGIN, "recorded_by": recorded_by}


def _answers(pipeline: Pipeline, inputs: Sequence[golden.Vector]) -> list[tuple[Any, ...]]:
    return [tuple(output.copy() for output in golden.outputs_of(pipeline, vector)) for vector in inputs]


def _pictures(paths: Sequence[Path]) -> list[golden.Vector]:
    vectors = []
    for path in paths:
        try:
            vectors.append(golden.Vector(path.read_bytes(), (), {}))
        except OSError as e:
            raise AgentError(
                Reason.IMAGE_UNREADABLE, f"cannot read {path}: {e.strerror}", hint="correct images in [golden]"
            ) from e
    return vectors


def _extremes(first: golden.Vector) -> list[golden.Vector]:
    """A black and a white picture of the first one's proportions, small, for they are resized anyway; none for a
    sensor's window.

    A camera sees them too, at night and against the sun, and no collection of pictures has them: they are where narrow
    sums overflow.
    """
    assert first.image is not None
    frame = decode_frame(first.image)
    if frame.dtype != np.uint8:
        return []
    vectors = []
    for value in (0, 255):
        ok, data = cv2.imencode(".png", np.full_like(frame[::EXTREME_STRIDE, ::EXTREME_STRIDE], value))
        assert ok
        vectors.append(golden.Vector(data.tobytes(), (), {}))
    return vectors


def _noise(pipeline: Pipeline, graph: Graph) -> list[golden.Vector]:
    """Seeded inputs: smooth coloured pictures for an image model, windows for a sensor's, else numbers over each
    tensor's range."""
    rng = np.random.default_rng(NOISE_SEED)
    try:
        if isinstance(graph.preprocess, Preprocess):
            image_layout(pipeline.inputs[pipeline.fed])
    except ModelError:
        return [
            golden.Vector(None, tuple(_noise_tensor(spec, rng) for spec in pipeline.inputs), {})
            for _ in range(NOISE_VECTORS)
        ]
    blank = pipeline.blank()  # a declaration that does not fit is refused, not worked around
    if blank.dtype != np.uint8:
        noise = [rng.standard_normal(blank.shape) for _ in range(NOISE_VECTORS)]
        return [golden.Vector(encode_window(window), (), {}) for window in noise]
    vectors = []
    for _ in range(NOISE_VECTORS):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = cv2.resize(coarse, NOISE_SIZE[::-1], interpolation=cv2.INTER_CUBIC)
        ok, data = cv2.imencode(".png", image)
        assert ok
        vectors.append(golden.Vector(data.tobytes(), (), {}))
    return vectors


def _noise_tensor(spec: TensorSpec, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, spec.shape, dtype=dtype, endpoint=True)
    if dtype.kind == "b":
        return rng.integers(0, 2, spec.shape).astype(dtype)
    return rng.standard_normal(spec.shape).astype(dtype)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
