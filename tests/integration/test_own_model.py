"""A user's own model on the first day: measured, tried on a picture, released with ten lines of TOML, served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from agent import profile
from ota.publisher.repository import Repository
from tests.demo.fleet import PARTS, Fleet
from tests.demo.observer import Observer
from tests.fakes.broker import Broker
from tests.integration.console import Device, did, refused, run, watching
from tests.integration.models import branching, classifier

PICTURE = PARTS / "golden" / "day.jpg"
SPEC = """\
line = "own"
version = "{version}"
task = "classification"
labels = {labels}
licence = "proprietary"
[preprocess]
mean = {mean}
std = {std}
[postprocess]
softmax = {softmax}
"""
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Own:
    """A model file, what its owner knows of it, and the delegates that take its format."""

    file: Path
    version: str
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    softmax: bool
    delegates: set[str]

    def spec(self, folder: Path) -> Path:
        """Its spec.toml in `folder`."""
        lists = {"labels": self.labels, "mean": self.mean, "std": self.std}
        text = {key: json.dumps(value) for key, value in {**lists, "softmax": self.softmax}.items()}
        path = folder / f"{self.file.stem}.toml"
        path.write_text(SPEC.format(version=self.version, **text))
        return path


def exported(folder: Path, seed: int = 1, version: str = "1.0.0") -> Own:
    """A small network, exported to ONNX."""
    model = classifier(folder / f"own-{seed}.onnx", size=32, classes=4, seed=seed)
    labels, mean, std = ("cat", "dog", "cow", "owl"), (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
    return Own(model, version, labels, mean, std, True, {"onnx:cpu", "openvino:cpu"})


def arithmetic(own: Own, image: np.ndarray) -> np.ndarray:
    """What the network itself answers to a picture, BGR as OpenCV reads it: its logits, from ONNX's own definition."""
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_LINEAR)[:, :, ::-1]
    tensor = ((small - np.array(own.mean)) / np.array(own.std)).astype(np.float32).transpose(2, 0, 1)[None]
    logits: np.ndarray = ReferenceEvaluator(onnx.load(str(own.file))).run(None, {"x": tensor})[0][0]
    return logits


@pytest.fixture(scope="module", params=["onnx", "tflite"])
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Own:
    """An ONNX classifier, as a training script would export it, or a published quantized one."""
    if request.param == "onnx":
        return exported(tmp_path_factory.mktemp("own"))
    data: Path = request.getfixturevalue("shared_data")
    model = data / "mlperf-tiny" / "pretrainedResnet_quant.tflite"
    return Own(model, "2.0.0", CIFAR, (0.0,), (1.0,), False, {"litert:xnnpack", "openvino:cpu"})


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Iterator[Device]:
    """Its daemon runs; nothing was ever released."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    made = Device(fleet, clip, line="own", delegates=())
    try:
        fleet.make_repository()
        fleet.start_broker()
        fleet.enroll(made.configure())
        fleet.start_server()
        made.start()
        yield made
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def observer(device: Device) -> Iterator[Observer]:
    """Hears what the device says."""
    with watching(device.fleet) as seen:
        yield seen


def test_bench_measures_every_delegate_that_takes_the_file(own: Own, tmp_path: Path) -> None:
    rows = {
        row["requested"]: row for row in json.loads(did("edge-agent", "bench", own.file, "--json", folder=tmp_path))
    }
    assert own.delegates <= rows.keys()
    for delegate in own.delegates:
        assert (rows[delegate]["reason"], rows[delegate]["actual"]) == ("", delegate)
        assert 0 < rows[delegate]["min_ms"] <= rows[delegate]["p50_ms"] <= rows[delegate]["p95_ms"]
    told = did("edge-agent", "bench", own.file, "--spec", own.spec(tmp_path), folder=tmp_path)
    assert told.count("fastest") == 1
    assert not [line for line in told.splitlines() if "model_shape" in line]


def test_infer_shows_tensors_without_a_spec_and_labels_with_one(own: Own, tmp_path: Path) -> None:
    asked = ("edge-agent", "infer", own.file, PICTURE)
    plain = did(*asked, folder=tmp_path)
    assert f"shape [1, {len(own.labels)}]" in plain
    said = {}
    for delegate in sorted(own.delegates):
        words = (*asked, "--spec", own.spec(tmp_path), "--delegate", delegate, "--json")
        answer = json.loads(did(*words, folder=tmp_path))
        (item,) = answer["items"]
        assert answer["delegate"] == delegate
        assert item["label"] in own.labels
        assert 0 < item["score"] <= 1
        said[delegate] = item
    assert len({item["label"] for item in said.values()}) == 1, said


def test_infer_gives_what_the_models_own_arithmetic_gives(tmp_path: Path) -> None:
    own = exported(tmp_path)
    logits = arithmetic(own, cv2.imread(str(PICTURE)))
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    words = ("edge-agent", "infer", own.file, PICTURE, "--spec", own.spec(tmp_path), "--json")
    (item,) = json.loads(did(*words, folder=tmp_path))["items"]
    assert item["label"] == own.labels[int(shares.argmax())]
    assert item["score"] == pytest.approx(float(shares.max()), abs=2e-3)


def test_infer_names_the_delegate_that_refuses_a_model_and_goes_on_with_the_next(tmp_path: Path) -> None:
    model = branching(tmp_path / "branching.tflite")
    done = run("edge-agent", "infer", model, PICTURE, folder=tmp_path)
    assert done.code == 0, done.err
    assert done.out.startswith("litert:xnnpack: ")
    assert "shape [1, 2, 2, 3]" in done.out
    ladder = profile.recognise("auto", profile.load_all()).delegates
    passed_over = [line for line in done.err.splitlines() if line.startswith("note: not on openvino:cpu: ")]
    assert len(passed_over) == (ladder.index("openvino:cpu") < ladder.index("litert:xnnpack"))
    assert all(line.endswith(" [model_unloadable]") for line in passed_over)
    told = refused("edge-agent", "infer", model, PICTURE, "--delegate", "openvino:cpu", folder=tmp_path)
    assert told.reason == "model_unloadable"
    assert "fastest" in did("edge-agent", "bench", model, folder=tmp_path)


def test_ten_lines_of_toml_bring_it_to_the_device(device: Device, observer: Observer, own: Own, tmp_path: Path) -> None:
    fleet = device.fleet
    spec = own.spec(tmp_path)
    assert len(spec.read_text().splitlines()) == 10
    built = did("edge-ota", "release", "repo", "--from", own.file, "--spec", spec, folder=fleet.folder)
    assert f"own {own.version} built" in built
    assert "generated inputs" in built
    first = observer.last_seq()
    end = device.install(observer, own.version)
    assert end["outcome"] == "committed", end
    assert end["delegate"] in own.delegates
    until_seq = observer.last_seq() + 10
    observer.wait("results", lambda: observer.last_seq() >= until_seq, 60)
    line = device.serving()
    assert (line["version"], line["component"], line["delegate"]) == (
        own.version,
        own.file.name.lower(),
        end["delegate"],
    )
    labels = {item["label"] for seq, (_, items) in observer.results.items() if seq > until_seq - 5 for item in items}
    assert labels
    assert labels <= set(own.labels)
    assert observer.last_seq() > first


def test_generated_golden_inputs_tell_models_apart(device: Device, tmp_path: Path) -> None:
    """Vectors that every network answers alike would pass every trial."""
    folder = device.fleet.folder
    own, other = (exported(tmp_path, seed, "7.0.0") for seed in (1, 2))
    did("edge-ota", "release", "repo", "--from", own.file, "--spec", own.spec(tmp_path), folder=folder)
    release = next(r for r in Repository.open(folder / "repo").releases("own") if r.version == "7.0.0")
    golden = np.load(folder / "repo" / "vault" / "plain" / release.golden.plain_sha256)
    (atol,) = release.graph["golden"]["atol"][own.file.name]
    for i in range(4):
        image = cv2.imdecode(golden[f"image_{i}"], cv2.IMREAD_COLOR)
        recorded = golden[f"{own.file.name}/{i}/0"][0].astype(np.float32)
        assert np.abs(arithmetic(own, image) - recorded).max() <= atol
        assert np.abs(arithmetic(other, image) - recorded).max() > 2 * atol


def test_a_spec_with_one_label_too_few_is_refused_before_anything_is_built(
    device: Device, own: Own, tmp_path: Path
) -> None:
    spec = own.spec(tmp_path)
    spec.write_text(spec.read_text().replace(f'"{own.labels[-1]}"', "").replace(", ]", "]").replace('1.0.0"', '9.0.0"')
                    .replace('2.0.0"', '9.0.0"'))  # fmt: skip
    told = refused("edge-ota", "release", "repo", "--from", own.file, "--spec", spec, folder=device.fleet.folder)
    assert told.reason == "bad_spec"
    assert f"answers {len(own.labels)} classes, the spec has {len(own.labels) - 1} labels" in told.message
