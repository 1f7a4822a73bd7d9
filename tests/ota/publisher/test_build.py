"""Building: what is sealed opens to the model, deltas are worth their bytes, and bad input is refused by name."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from agent.daemon.compiled import load_options
from ota import delta as codecs
from ota import payload
from ota.errors import OtaError, PayloadError
from ota.publisher import spec as spec_format
from ota.publisher.build import build_release
from ota.publisher.publish import publish
from ota.publisher.recorder import ModelFacts
from ota.publisher.repository import Repository
from ota.publisher.spec import SpecComponent
from ota.publisher.vault import Vault
from ota.release import Component, Payload, Release, parse
from tests.ota.publisher.conftest import FACTS, Build, FakeRecorder, MakeSpec, model_bytes, spec_table


def reason(caught: pytest.ExceptionInfo[OtaError]) -> str:
    return caught.value.reason.value


def sealed_bytes(repository: Repository, described: Payload) -> bytes:
    opened = repository.open_payload(described.sha256)
    assert opened is not None
    with os.fdopen(opened[0], "rb") as file:
        data = file.read()
    assert (len(data), opened[1]) == (described.length, described.length)
    return data


def open_payload(repository: Repository, release: Release, component: Component, described: Payload) -> bytes:
    """Decrypt as a device would, with the key out of the vault."""
    sealed = sealed_bytes(repository, described)
    assert hashlib.sha256(sealed).hexdigest() == described.sha256
    assert payload.leaves(sealed) == described.leaves
    cek = Vault(repository).key(release.line, release.version, described.cek_id)
    out = bytearray(payload.plain_length(len(sealed)))
    context = payload.context_of(release.line, release.version, component, described)
    count = payload.open_into([sealed], cek, context, memoryview(out))
    return bytes(out[:count])


def decoded(codec: str, data: bytes, base: bytes | None, length: int) -> bytes:
    """Decode as a device would."""
    out = bytearray(length)
    codecs.apply(codec, data, base, memoryview(out))
    return bytes(out)


def edited(data: bytes, places: int = 20) -> bytes:
    changed = bytearray(data)
    for at in random.Random(5).sample(range(len(data)), places):
        changed[at] ^= 1
    return bytes(changed)


def test_an_incompressible_model_travels_raw_and_opens_to_itself(repository: Repository, build: Build) -> None:
    data = model_bytes(1, 200_000)
    release = build(data=data)
    component = release.components[0]
    assert (component.name, component.full.codec, component.deltas) == ("int8.tflite", "raw", ())
    assert open_payload(repository, release, component, component.full) == data


def test_a_compressible_model_travels_as_zstd(repository: Repository, build: Build) -> None:
    data = b"weights " * 20_000
    release = build(data=data)
    component = release.components[0]
    assert component.full.codec == "zstd"
    assert component.full.length < 1000
    opened = open_payload(repository, release, component, component.full)
    assert decoded("zstd", opened, None, len(data)) == data


def test_a_delta_turns_the_previous_model_into_the_new_one(repository: Repository, build: Build) -> None:
    old, new = model_bytes(1), edited(model_bytes(1))
    first = build("1.0.0", old)
    publish(repository)
    release = build("1.1.0", new)
    component = release.components[0]
    (delta,) = component.deltas
    assert delta.base_sha256 == first.components[0].plain_sha256
    assert delta.payload.length < component.full.length // 50
    patch = open_payload(repository, release, component, delta.payload)
    assert decoded(delta.payload.codec, patch, old, len(new)) == new


def test_a_delta_is_never_larger_than_the_full_payload(repository: Repository, build: Build) -> None:
    build("1.0.0", model_bytes(1))
    unrelated = build("1.1.0", model_bytes(2)).components[0]
    assert unrelated.deltas == ()
    tiny = build("1.2.0", b"x" * 100_000).components[0]
    assert all(delta.payload.length < tiny.full.length for delta in tiny.deltas)


def test_deltas_reach_back_over_the_configured_number_of_releases(repository: Repository, build: Build) -> None:
    data = model_bytes(1)
    bases = []
    for minor in range(5):
        release = build(f"1.{minor}.0", data)
        bases.append(release.components[0].plain_sha256)
        data = edited(data, 20 + minor)
    assert [d.base_sha256 for d in build("1.5.0", data).components[0].deltas] == bases[:1:-1]


def test_an_unchanged_model_has_no_delta_and_the_golden_file_has_one(repository: Repository, build: Build) -> None:
    golden = model_bytes(7)
    build("1.0.0", golden=golden)
    release = build("1.1.0", golden=edited(golden))
    assert release.components[0].deltas == ()
    assert len(release.golden.deltas) == 1


def test_a_base_that_left_the_vault_costs_its_delta_and_nothing_else(repository: Repository, build: Build) -> None:
    first = build("1.0.0", model_bytes(1))
    (repository.path / "vault/plain" / first.components[0].plain_sha256).unlink()
    assert build("1.1.0", edited(model_bytes(1))).components[0].deltas == ()


def test_every_component_has_a_key_of_its_own_and_contexts_are_bound(repository: Repository, build: Build) -> None:
    release = build()
    component, golden = release.components[0], release.golden
    assert component.full.cek_id != golden.full.cek_id
    cek = Vault(repository).key("person", "1.0.0", component.full.cek_id)
    sealed = sealed_bytes(repository, component.full)
    swapped = payload.context_of("person", "1.0.1", component, component.full)
    with pytest.raises(PayloadError, match="does not authenticate"):
        payload.open_into([sealed], cek, swapped, memoryview(bytearray(component.plain_length)))


def test_no_plaintext_lies_outside_the_vault(repository: Repository, build: Build) -> None:
    data = model_bytes(1)
    build(data=data, golden=b"canary of the golden vectors")
    publish(repository)
    holders = {
        path.parent.relative_to(repository.path).as_posix()
        for path in repository.path.rglob("*")
        if path.is_file() and any(canary in path.read_bytes() for canary in (data[:64], b"canary of the golden"))
    }
    assert holders == {"vault/plain"}


def test_the_counter_is_the_lines_last_plus_one(repository: Repository, build: Build) -> None:
    assert build("1.0.0").release_counter == 1
    publish(repository)
    assert build("1.1.0").release_counter == 2
    assert build("1.2.0", counter=10).release_counter == 10
    assert build("1.3.0").release_counter == 11
    assert build("1.0.0", line="meter").release_counter == 1
    with pytest.raises(OtaError, match="not above the line's last, 11") as refused:
        build("1.4.0", counter=11)
    assert reason(refused) == "counter_rollback"


@pytest.mark.parametrize("counter", [(1 << 52) + 1, 1 << 53, 10**22])
def test_a_counter_that_no_later_release_could_exceed_is_refused(
    repository: Repository, build: Build, counter: int
) -> None:
    with pytest.raises(OtaError, match="leaves no room for releases after it") as refused:
        build(counter=counter)
    assert reason(refused) == "bad_usage"
    assert build(counter=1 << 52).release_counter == 1 << 52
    assert build("1.1.0").release_counter == (1 << 52) + 1


def test_a_damaged_release_that_waits_is_named(repository: Repository, build: Build) -> None:
    build()
    path = repository.prepared_path("person", "1.0.0")
    path.write_bytes(b"{")
    with pytest.raises(OtaError, match=r"prepared/person/1\.0\.0/release\.json is damaged") as refused:
        publish(repository)
    assert reason(refused) == "state_corrupt"
    path.unlink()
    publish(repository)


def test_a_signed_version_cannot_be_built_again_and_an_unsigned_one_is_replaced(
    repository: Repository, build: Build
) -> None:
    old = build(data=model_bytes(1))
    new = build(data=model_bytes(2))
    assert new.release_counter == old.release_counter
    assert repository.open_payload(old.components[0].full.sha256) is None
    publish(repository)
    assert [listed.sha256 for listed in repository.published()] == [new.sha256]
    with pytest.raises(OtaError, match="is signed and cannot change") as refused:
        build(data=model_bytes(3))
    assert reason(refused) == "release_exists"


def test_the_recorder_gets_models_and_images_and_its_answers_are_signed(
    repository: Repository, make_spec: MakeSpec
) -> None:
    recorder = FakeRecorder()
    release = build_release(repository, make_spec(), recorder=recorder)
    assert recorder.described == [("int8.tflite", ())]
    assert recorder.recorded == [(["int8.tflite"], [b"an encoded picture"])]
    assert release.graph["golden"] == {"atol": {"int8.tflite": [0.01]}, "margin": 0.1}
    assert release.components[0].inputs[0]["shape"] == [1, 96, 96, 3]
    assert release.components[0].delegates == ("litert:xnnpack",)
    assert parse(release.raw) == release


def test_several_components_keep_the_outputs_and_names_of_the_spec(
    repository: Repository, make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "b.onnx").write_bytes(b"onnx")
    recorder = FakeRecorder()
    tables = [{"file": "int8.tflite", "outputs": ["a", "b"]}, {"file": "b.onnx", "name": "float32.onnx"}]
    make_spec()  # writes the first model and the image
    spec = spec_format.parse(spec_table(component=tables), tmp_path)
    release = build_release(repository, spec, recorder=recorder)
    assert [c.name for c in release.components] == ["int8.tflite", "float32.onnx"]
    assert recorder.described[0] == ("int8.tflite", ("a", "b"))


def test_labels_that_do_not_fit_the_models_classes_are_refused(repository: Repository, make_spec: MakeSpec) -> None:
    with pytest.raises(OtaError, match="answers 2 classes, the spec has 3 labels") as refused:
        build_release(repository, make_spec(labels=["a", "b", "c"]), recorder=FakeRecorder())
    assert reason(refused) == "bad_spec"


def test_two_components_of_one_name_are_refused(repository: Repository, make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec()
    twice = replace(spec, components=(*spec.components, SpecComponent(tmp_path / "int8.tflite", ())))
    with pytest.raises(OtaError, match=r"name 'int8\.tflite' is taken"):
        build_release(repository, twice, recorder=FakeRecorder())


@pytest.mark.parametrize("missing", ["int8.tflite", "image.png"])
def test_a_missing_file_is_named(repository: Repository, make_spec: MakeSpec, tmp_path: Path, missing: str) -> None:
    spec = make_spec()
    (tmp_path / missing).unlink()
    with pytest.raises(OtaError, match=missing) as refused:
        build_release(repository, spec, recorder=FakeRecorder())
    assert reason(refused) == "not_found"


def test_an_empty_model_is_refused(repository: Repository, make_spec: MakeSpec) -> None:
    with pytest.raises(OtaError, match="is empty"):
        build_release(repository, make_spec(data=b""), recorder=FakeRecorder())


def test_a_model_that_changes_while_it_is_recorded_is_refused(
    repository: Repository, make_spec: MakeSpec, tmp_path: Path
) -> None:
    class Replacing(FakeRecorder):
        def describe(self, model: Path, outputs: object) -> ModelFacts:
            model.write_bytes(b"another model")
            return FACTS

    with pytest.raises(OtaError, match="changed while the release was built"):
        build_release(repository, make_spec(), recorder=Replacing())
    assert list(tmp_path.glob("repository/payloads/*")) == []


def test_without_a_recorder_the_hint_names_what_to_install(repository: Repository, make_spec: MakeSpec) -> None:
    with pytest.raises(OtaError, match="cannot run models") as refused:
        build_release(repository, make_spec())
    assert "pip install" in refused.value.hint


def test_a_release_document_above_the_limit_is_refused(repository: Repository, build: Build) -> None:
    with pytest.raises(OtaError, match=r"release\.json has \d+ bytes") as refused:
        build(labels=[f"{i:080}" for i in range(20_000)])
    assert reason(refused) == "bad_spec"


def test_published_models_become_smaller_full_payloads_and_small_deltas(
    repository: Repository, build: Build, shared_data: Path
) -> None:
    """The int8 person model with 300 of its bytes changed: what a fine-tuned last layer looks like."""
    old = (shared_data / "mlperf-tiny/vww_96_int8.tflite").read_bytes()
    build("1.0.0", old)
    component = build("1.1.0", edited(old, 300)).components[0]
    assert component.full.length < len(old)
    assert component.deltas[0].payload.length < component.full.length // 10


@pytest.mark.parametrize(("precision", "allowed"), [((), False), (("bf16",), True)])
def test_the_precision_that_a_component_allows_is_signed_and_reaches_the_worker(
    repository: Repository, make_spec: MakeSpec, precision: tuple[str, ...], allowed: bool
) -> None:
    spec = make_spec()
    spec = replace(spec, components=tuple(replace(component, precision=precision) for component in spec.components))
    release = build_release(repository, spec, recorder=FakeRecorder())
    (component,) = parse(release.raw).components
    assert component.precision == precision
    assert (b"precision" in release.raw) == allowed
    assert load_options(component) == {"model": component.plain_sha256, "bf16": allowed}


def two_components(folder: Path, order: dict[str, list[str]]) -> spec_format.Spec:
    for name in ("int8.tflite", "b.onnx", "image.png"):
        (folder / name).write_bytes(model_bytes(1))
    tables = [{"file": "int8.tflite"}, {"file": "b.onnx"}]
    return spec_format.parse(spec_table(component=tables, order=order), folder)


def test_the_order_of_components_is_signed(repository: Repository, tmp_path: Path) -> None:
    spec = two_components(tmp_path, {"raspberry-pi-5": ["b.onnx", "int8.tflite"]})
    release = build_release(repository, spec, recorder=FakeRecorder())
    assert parse(release.raw).order == {"raspberry-pi-5": ("b.onnx", "int8.tflite")}


@pytest.mark.parametrize("order", [{"raspberry-pi-5": ["b.tflite"]}, {"p" * 65: ["b.onnx"]}])
def test_an_order_of_what_is_not_in_the_release_is_refused_and_leaves_nothing(
    repository: Repository, tmp_path: Path, order: dict[str, list[str]]
) -> None:
    with pytest.raises(OtaError, match="does not list components of this release") as refused:
        build_release(repository, two_components(tmp_path, order), recorder=FakeRecorder())
    assert refused.value.hint
    assert repository.releases("person") == []
