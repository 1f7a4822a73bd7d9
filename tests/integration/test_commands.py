"""Bad input: every command refuses it in one line with a stable reason, and what ran before goes on running."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from tests.demo.fleet import PARTS, VECTORS, build_bad_release
from tests.demo.observer import Observer
from tests.fakes.broker import Authority, Broker
from tests.fakes.ports import free_port
from tests.integration.console import (
    Device,
    Done,
    did,
    ended,
    flip_one_bit,
    make_fleet,
    refusal,
    refused,
    run,
    unchanged,
    until,
    watching,
)
from tests.integration.models import classifier

MODEL = PARTS / "1.0.0" / "int8.tflite"
SPEC = PARTS / "1.0.0" / "spec.toml"
PICTURE = PARTS / "golden" / "day.jpg"
CRASH = VECTORS / "crash.tflite"
OTHER = "belt-02"

Words = tuple[Any, ...]
Case = tuple[Words, str, str, str]
"""Words of a command, the reason it is refused with, a part of its message, a part of its hint."""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, repository: Path, clip: Path) -> Iterator[Device]:
    """Serves parts 1.0.0. The operator knows a second device, which exists on paper alone."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet, made = make_fleet(tmp_path_factory.mktemp("commands"), repository, clip)
    try:
        made.start()
        made.assign("1.0.0")
        made.enroll_another(OTHER)
        did("edge-ota", "grant", "repo", OTHER, "parts", "1.0.0", folder=fleet.folder)
        until("serving 1.0.0", lambda: made.serving()["committed"] == "1.0.0")
        yield made
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def observer(device: Device) -> Iterator[Observer]:
    """Hears what the device says."""
    with watching(device.fleet) as seen:
        yield seen


@pytest.fixture
def untouched(device: Device) -> Iterator[None]:
    """The daemon and what it serves are the same at the end of the test, and results keep coming."""
    kept = ("version", "committed", "component", "delegate", "worker_pid", "restarts")
    before = device.ask()
    yield
    after = device.ask()
    assert after["process"]["pid"] == before["process"]["pid"]
    old, new = before["lines"]["parts"], after["lines"]["parts"]
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}
    until("another result", lambda: device.serving()["results"] > new["results"])


# --- without a daemon ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """Files as a person may have them lying about, most of them wrong."""
    folder = tmp_path_factory.mktemp("desk")
    good = (
        f'state_dir = "state"\nrun_dir = "run"\n[[source]]\nname = "belt"\nkind = "video"\npath = "{clip}"\n'
        '[[line]]\nname = "parts"\nsource = "belt"\n'
    )
    (folder / "text.avi").write_text("this is no video\n" * 100)
    (folder / "text.png").write_text("this is no picture\n")
    for name, old, new in (
        ("good", "", ""),
        ("absent", str(clip), "absent.avi"),
        ("text", str(clip), "text.avi"),
        ("folder", str(clip), "."),
        ("key", "source = ", "sorce = "),
        ("extra", "source = ", "treads = 2\nsource = "),
        ("syntax", "[[line]]", "[[line"),
        ("board", "state_dir", 'profile = "toaster"\nstate_dir'),
        ("delegate", "source = ", 'delegates = ["litert:gpu"]\nsource = '),
    ):
        (folder / f"{name}.toml").write_text(good.replace(old, new))
    spec = SPEC.read_text().replace("../", f"{PARTS}/").replace('file = "', f'file = "{PARTS}/1.0.0/')
    for name, old, new in (
        ("spec", "", ""),
        ("classifier", f'file = "{PARTS}/1.0.0/int8.tflite"\noutputs = ["PartitionedCall:1", "PartitionedCall:0"]',
         'file = "grey.onnx"'),
        ("outputs", "PartitionedCall:1", "nowhere"),
        ("labels", '["bolt", "nut", "washer"]', '["bolt", "nut"]'),
        ("misspelt", "interpolation", "interpolaton"),
        ("crash", f'file = "{PARTS}/1.0.0/int8.tflite"', f'file = "{CRASH}"'),
        ("picture", "day.jpg", "night.jpg"),
    ):  # fmt: skip
        assert old in spec
        (folder / f"spec-{name}.toml").write_text(spec.replace(old, new))
    classifier(folder / "grey.onnx", channels=1)
    (folder / "spec-colour.toml").write_text(COLOUR)
    did("edge-ota", "init", "repo", folder=folder)
    return folder


COLOUR = """\
line = "grey"
version = "1.0.0"
task = "classification"
labels = ["a", "b", "c", "d"]
licence = "proprietary"
[preprocess]
mean = [123.7, 116.3, 103.5]
std = [58.4, 57.1, 57.4]
"""
AGENT: list[Case] = [
    (("config", "check", "--config", "none.toml"), "bad_config", "none.toml does not exist", "config example"),
    (("config", "check", "--config", "absent.toml"), "source_missing", "absent.avi does not exist", "[source]"),
    (("config", "check", "--config", "text.toml"), "source_unreadable", "text.avi", "ffprobe"),
    (("config", "check", "--config", "folder.toml"), "source_missing", "is not a file", "video file"),
    (("config", "check", "--config", "key.toml"), "bad_config", "unknown key 'sorce'", "did you mean 'source'?"),
    (("config", "check", "--config", "extra.toml"), "bad_config", "unknown key 'treads'", "did you mean 'threads'?"),
    (("config", "check", "--config", "syntax.toml"), "bad_config", "line 7", "config check"),
    (("config", "check", "--config", "board.toml"), "bad_profile", "'toaster'", "generic-x86_64"),
    (("config", "check", "--config", "delegate.toml"), "bad_config", "'litert:gpu' is not one of", "litert:cpu"),
    (("status", "--config", "good.toml"), "daemon_unreachable", "no daemon answers", "edge-agent run"),
    (("update", "--config", "good.toml"), "daemon_unreachable", "no daemon answers", "edge-agent run"),
    (("run", "--config", "good.toml"), "not_enrolled", "not enrolled", "edge-agent enroll"),
    (("sideload", "none", "--config", "good.toml"), "bad_usage", "none does not exist", "edge-ota bundle"),
    (("enroll", "--device", "Belt 1", "--config", "good.toml"), "bad_usage", "'Belt 1'", "a-z, 0-9 and -"),
    (("enroll", "--bundle", "none.json", "--config", "good.toml"), "bad_bundle", "none.json", "edge-ota enroll"),
    (("enroll", "--bundle", "text.avi", "--config", "good.toml"), "key_missing", "device.key", "enroll"),
    (("enroll", "--config", "good.toml"), "bad_usage", "--device --bundle --server is required", "enroll --help"),
    (("infer", MODEL), "bad_usage", "IMAGE", "infer --help"),
    (("inferr", MODEL), "bad_usage", "'inferr'", "--help"),
    (("infer", "none.onnx", PICTURE), "model_missing", "none.onnx does not exist", ".onnx"),
    (("infer", "text.avi", PICTURE), "unknown_format", "neither .tflite, .onnx nor .ovir", "convert"),
    (("infer", MODEL, "none.png"), "image_unreadable", "none.png does not exist", "PNG or JPEG"),
    (("infer", MODEL, "text.png"), "image_unreadable", "no image", "PNG or JPEG"),
    (("infer", MODEL, PICTURE, "--delegate", "litert:gpu"), "unknown_delegate", "'litert:gpu'", "litert:xnnpack"),
    (("infer", MODEL, PICTURE, "--delegate", "onnx:cpu"), "no_delegate", "no .tflite", "--delegate"),
    (("infer", MODEL, PICTURE, "--spec", "none.toml"), "not_found", "no spec at none.toml", "--spec"),
    (("infer", "grey.onnx", PICTURE, "--spec", "spec-colour.toml"), "model_shape", "mean has 3 values", "one value"),
    (("infer", "grey.onnx", PICTURE, "--spec", "spec-classifier.toml"), "model_shape", "answers [1, 4]", "in order"),
    (("infer", MODEL, PICTURE, "--spec", "spec-outputs.toml"), "model_shape", "'nowhere'", "PartitionedCall:0"),
    (("infer", MODEL, PICTURE, "--spec", "spec-misspelt.toml"), "bad_spec", "interpolaton", "'interpolation'"),
    (("infer", CRASH, PICTURE, "--delegate", "litert:xnnpack"), "worker_crashed", "SIGSEGV", "its last words"),
    (("bench", "none.onnx"), "model_missing", "none.onnx does not exist", ".onnx"),
]


def name_of(case: Any) -> str | None:
    return " ".join(Path(str(word)).name for word in case) if isinstance(case, tuple) else None


PUBLISHER: list[Case] = [
    (("release", "repo", "--spec", "none.toml"), "not_found", "no spec at none.toml", "--spec"),
    (("release", "repo", "--spec", "spec-labels.toml"), "bad_spec", "3 classes, the spec has 2 labels", "one label"),
    (("release", "repo", "--from", "grey.onnx", "--spec", "spec-colour.toml"), "model_unloadable", "mean has 3", "one"),
    (("release", "repo", "--spec", "spec-classifier.toml"), "bad_spec", "4 classes, the spec has 3 labels", "label"),
    (("release", "repo", "--spec", "spec-outputs.toml"), "model_unloadable", "'nowhere'", "outputs"),
    (("release", "repo", "--spec", "spec-misspelt.toml"), "bad_spec", "interpolaton", "'interpolation'"),
    (("release", "repo", "--spec", "spec-picture.toml"), "not_found", "night.jpg", "spec"),
    (("release", "repo", "--spec", "spec-crash.toml"), "model_unloadable", "crash.tflite", "export"),
    (("release", "none", "--spec", "spec-spec.toml"), "repository_missing", "no repository at none", "edge-ota init"),
    (("grant", "repo", "belt-77", "parts", "1.0.0"), "unknown_device", "belt-77", "edge-ota devices"),
    (("grant", "repo"), "bad_usage", "DEVICE", "grant --help"),
]


@pytest.fixture(scope="module")
def answers(desk: Path) -> dict[Words, Done]:
    """How every command above ended, none of which may change a file. The agent's run side by side, the publisher's
    one after the other, as they lock the repository."""

    def run_all(program: str, cases: Sequence[Case]) -> dict[Words, Done]:
        return {case[0]: run(program, *case[0], folder=desk) for case in cases}

    with unchanged(desk), ThreadPoolExecutor(3) as pool:
        work = [pool.submit(run_all, "edge-ota", PUBLISHER)]
        work += [pool.submit(run_all, "edge-agent", AGENT[first::3]) for first in range(3)]
        return {words: done for each in work for words, done in each.result().items()}


@pytest.mark.parametrize(("words", "reason", "message", "hint"), [*AGENT, *PUBLISHER], ids=name_of)
def test_a_command_refuses_in_one_line_and_changes_nothing(
    answers: dict[Words, Done], words: Words, reason: str, message: str, hint: str
) -> None:
    told = refusal(answers[words])
    assert told.reason == reason
    assert message in told.message
    assert hint in told.hint
    assert told.done.out == ""


def test_config_check_says_what_the_cameras_show(desk: Path) -> None:
    told = did("edge-agent", "config", "check", "--config", "good.toml", folder=desk)
    assert told.splitlines()[0] == "source belt: 640x480 at 30 fps"


def test_a_benchmark_survives_a_model_that_kills_its_runtime_and_says_so(desk: Path) -> None:
    told = refused("edge-agent", "bench", CRASH, folder=desk)
    assert told.reason == "no_delegate"
    rows = {line.split()[0]: line for line in told.done.out.splitlines()}
    assert "worker_crashed at load: the trial worker died with SIGSEGV" in rows["litert:xnnpack"]


def test_a_published_model_that_no_runtime_takes_is_refused_with_the_runtimes_words(
    desk: Path, shared_data: Path
) -> None:
    model, picture = (shared_data / "tflite-micro" / name for name in ("person_detect.tflite", "person.png"))
    told = refused("edge-agent", "infer", model, picture, folder=desk)
    assert told.reason == "model_unloadable"
    assert "Quantization axis" in told.message or "quantized_dimension" in told.message


# --- enrolment and keys ----------------------------------------------------------------------------------------------


def bundle_of(device: Device) -> dict[str, Any]:
    """The bundle that the device was enrolled with."""
    bundle: dict[str, Any] = json.loads((device.fleet.folder / "bundle.json").read_text())
    return bundle


BUNDLES: list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], object], str]] = [
    ("another device's", lambda own, other: other, "another key than this device's"),
    ("another name", lambda own, other: {**own, "device": OTHER}, f"not for '{OTHER}'"),
    ("another CA", lambda own, other: {**own, "ca": own["certificate"]}, "its CA did not issue its certificate"),
    ("a damaged certificate", lambda own, other: {**own, "certificate": own["certificate"][:200]}, "cannot be read"),
    ("a damaged root", lambda own, other: {**own, "root": own["root"].replace('"version":1', '"version":2')}, "root: "),
    ("no broker", lambda own, other: {key: own[key] for key in own if key != "broker"}, "'broker'"),
    ("a number", lambda own, other: 7, "enrolment bundle"),
]


@pytest.mark.usefixtures("tampered")  # for its time, not for its effect
@pytest.mark.fault("F47")
@pytest.mark.parametrize(("make", "message"), [case[1:] for case in BUNDLES], ids=[case[0] for case in BUNDLES])
def test_a_bundle_that_is_not_this_devices_changes_nothing(
    device: Device, make: Callable[[dict[str, Any], dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    other = json.loads((device.fleet.folder / OTHER / "bundle.json").read_text())
    (tmp_path / "bundle.json").write_text(json.dumps(make(bundle_of(device), other)))
    twin = device.twin(tmp_path)  # its daemon does not run, as enrolling asks for
    enrolment, keys = twin.state / "enrolment", twin.state / "keys"
    with unchanged(enrolment, keys):
        words = ("enroll", "--config", "agent.toml", "--bundle", "bundle.json")
        told = refused("edge-agent", *words, folder=tmp_path)
    twin.fleet.stop()
    assert told.reason == "bad_bundle"
    assert message in told.message


@pytest.mark.fault("F53")
@pytest.mark.parametrize("name", ["device.key", "hpke.key", "storage.key"])
def test_a_daemon_does_not_start_with_a_key_that_others_can_read(device: Device, name: str, tmp_path: Path) -> None:
    twin = device.twin(tmp_path)
    key = twin.state / "keys" / name
    key.chmod(0o644)
    with unchanged(tmp_path):
        told = refused("edge-agent", "run", "--config", "agent.toml", folder=tmp_path)
    twin.fleet.stop()
    assert (told.reason, told.hint) == ("key_unsafe", f"chmod 0600 {key}")
    assert "0644" in told.message


def test_a_second_daemon_on_the_same_state_leaves_the_first_alone(device: Device, untouched: None) -> None:
    told = refused("edge-agent", "run", "--config", "agent.toml", folder=device.fleet.folder)
    assert told.reason == "daemon_running"
    assert str(device.state) in told.message


def test_a_daemon_refuses_to_roll_back_a_line_that_it_has_not(device: Device, untouched: None) -> None:
    told = refused("edge-agent", "rollback", "meter", "--config", "agent.toml", folder=device.fleet.folder)
    assert (told.reason, told.hint) == ("unknown_line", "lines: parts")


# --- a source, a broker that are not there ---------------------------------------------------------------------------


@contextmanager
def twin(device: Device, folder: Path, **config: Any) -> Iterator[Device]:
    """A daemon of its own on a copy of the device's state, below `folder`."""
    made = device.twin(folder)
    made.configure(**config)
    try:
        yield made
    finally:
        made.fleet.stop()


@pytest.mark.parametrize(("content", "reason"), [(None, "source_missing"), (b"this is no video", "source_unreadable")])
def test_a_daemon_lives_without_its_video_and_serves_when_it_comes(
    device: Device, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    clip = tmp_path / "belt.avi"
    if content is not None:
        clip.write_bytes(content)
    with twin(device, tmp_path, clip=clip) as made:
        cut_off(made)
        pid = made.start()
        condition = until("the condition", lambda: made.condition("SourceStreaming", reason))
        assert condition["status"] == "False"
        assert str(clip) in condition["message"]
        printed = did("edge-agent", "status", "--config", "agent.toml", folder=made.fleet.folder)
        assert f"condition  SourceStreaming False: {condition['message']}" in printed
        # whole from the first byte on, as a copy to another file system would not be
        shutil.copy(device.clip, tmp_path / "copy.avi")
        (tmp_path / "copy.avi").rename(clip)
        until("results", lambda: made.serving()["results"] > 0)
        assert made.condition("SourceStreaming") is None
        assert made.ask()["process"]["pid"] == pid


def cut_off(made: Device) -> None:
    """Let the twin look for its broker where none is."""
    bundle = made.state / "enrolment" / "bundle.json"
    text = json.loads(bundle.read_text())
    text["broker"]["port"] = free_port()
    bundle.write_text(json.dumps(text))


def test_a_daemon_serves_without_a_broker_and_says_why_it_is_alone(device: Device, tmp_path: Path) -> None:
    with twin(device, tmp_path) as made:
        cut_off(made)
        made.start("1.0.0")
        condition = until("the condition", lambda: made.condition("LinkConnected", "broker_unreachable"))
        assert condition["message"]
        results = made.serving()["results"]
        until("more results", lambda: made.serving()["results"] > results)


@pytest.mark.fault("F78")
@pytest.mark.parametrize(
    ("files", "reasons"),
    [
        (("certificate", "key"), {"broker_refused", "broker_lost", "broker_tls"}),
        (("ca",), {"broker_untrusted"}),
    ],
    ids=["a certificate the broker does not know", "a broker the device does not know"],
)
def test_a_daemon_serves_though_broker_and_device_do_not_trust_each_other(
    device: Device, files: tuple[str, ...], reasons: set[str], tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger").issue(device.fleet.device)
    with twin(device, tmp_path) as made:
        bundle = made.state / "enrolment" / "bundle.json"
        fields = json.loads(bundle.read_text())
        for name in files:
            if name == "key":
                shutil.copyfile(stranger.key, made.state / "keys" / "device.key")
            else:
                fields[name] = Path(getattr(stranger, name)).read_text()
        bundle.write_text(json.dumps(fields))
        made.start("1.0.0")
        until("the condition", lambda: any(made.condition("LinkConnected", reason) for reason in reasons))
        assert made.ask()["link"]["hint"]
        results = made.serving()["results"]
        until("more results", lambda: made.serving()["results"] > results)


# --- payloads and metadata -------------------------------------------------------------------------------------------


def damaged(device: Device, version: str, damage: Callable[[Path], None]) -> None:
    """Publish a release, of which nothing will ever run, and damage its payloads afterwards."""
    repo = device.fleet.folder / "repo"
    build_bad_release(repo, version, PARTS / "1.1.0" / "int8.onnx", "onnx:cpu")
    publish(device.repository(), [("parts", version)])
    for name in device.payloads(version):
        damage(repo / "payloads" / name)


@pytest.fixture(scope="module")
def tampered(device: Device, observer: Observer) -> tuple[str, int]:
    """A release with a bit flipped in its payloads, and how many events came before it was granted. The daemon asks for
    the bad block again and again with back-off, which takes about ten seconds; other tests run meanwhile."""
    damaged(device, "1.2.0", flip_one_bit)
    seen = len(observer.events)
    device.assign("1.2.0")
    return "1.2.0", seen


@pytest.mark.fault("F17")
def test_a_payload_that_was_tampered_with_at_the_publisher_is_not_installed(
    device: Device, observer: Observer, tampered: tuple[str, int], untouched: None
) -> None:
    version, seen = tampered
    end = ended(observer, version, seen)
    assert (end["outcome"], end["reason"]) == ("failed", "transfer_corrupt")
    assert_told(device, version, "transfer_corrupt")
    device.assign("1.0.0")


def test_a_payload_that_was_cut_at_the_publisher_is_not_installed(
    device: Device, observer: Observer, untouched: None
) -> None:
    damaged(device, "1.3.0", lambda payload: os.truncate(payload, payload.stat().st_size // 2))
    end = device.grant(observer, "1.3.0")
    assert (end["outcome"], end["reason"]) == ("failed", "not_found")
    assert_told(device, "1.3.0", "not_found")
    device.assign("1.0.0")


def assert_told(device: Device, version: str, reason: str) -> None:
    """The status says how the update failed, and that 1.0.0 is still the committed release."""
    line = device.serving()
    told = line["update"]
    assert (told["outcome"], told["reason"], told["last_version"]) == ("failed", reason, version)
    assert (line["version"], line["committed"]) == ("1.0.0", "1.0.0")


@pytest.mark.fault("F33")
def test_an_expired_timestamp_is_a_condition_until_the_operator_signs_again(device: Device, untouched: None) -> None:
    repo = device.fleet.folder / "repo"
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=30)
    publish(Repository.open(repo, now=lambda: long_ago), [])
    device.look()
    condition = until("the condition", lambda: device.condition("MetadataFresh"))
    assert condition["reason"] == "timestamp_expired"
    assert "timestamp expired at" in condition["message"]
    did("edge-ota", "publish", "repo", folder=device.fleet.folder)
    device.look()
    until("the end of the condition", lambda: device.condition("MetadataFresh") is None)


@pytest.mark.fault("F47")
def test_the_director_document_of_another_device_is_refused(device: Device, untouched: None) -> None:
    devices = device.fleet.folder / "repo" / "devices"
    own = devices / device.fleet.device / "desired.json"
    before = own.read_bytes()
    shutil.copyfile(devices / OTHER / "desired.json", own)
    try:
        device.look()
        condition = until("the condition", lambda: device.condition("MetadataFresh"))
        assert condition["reason"] == "not_for_this_device"
    finally:
        own.write_bytes(before)
    device.look()
    until("the end of the condition", lambda: device.condition("MetadataFresh") is None)
