"""Making a release: facts and golden vectors of its models, one content key per file, sealed payloads and deltas.

The result is `prepared`: written under payloads/, vault/ and prepared/, and listed nowhere until `publish` signs it.
Invariants: every payload is decoded before it is written; a delta is kept only when its sealed form is smaller than
the full payload's; the release that is written is the one that `ota.release.parse` read back.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ota import payload, strictjson
from ota import release as release_format
from ota.errors import PublishError, Reason
from ota.publisher import deltas, files
from ota.publisher.recorder import ModelFacts, Recorder, Recording
from ota.publisher.repository import Repository
from ota.publisher.spec import GOLDEN_NAME, MAX_IMAGE_BYTES, Spec, SpecComponent
from ota.publisher.vault import Vault
from ota.release import COMPONENT_PATTERN, MAX_PAYLOAD_BYTES, Component, Delta, Payload, Release

# What a device's worker reads at most.
_MAX_GOLDEN_BYTES = 64 << 20
# A counter never goes down again; this one is above any date that somebody may count by.
_MAX_COUNTER = 1 << 52
# Deltas of one component stay within what release.json may list.
_MAX_DELTAS = 16


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    path: Path
    data: bytes
    facts: ModelFacts
    precision: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A component and the ciphertexts that belong to it, nothing written yet."""

    component: Component
    cek: bytes
    ciphertexts: tuple[bytes, ...]


def build_release(
    repository: Repository,
    spec: Spec,
    *,
    recorder: Recorder | None = None,
    facts: Sequence[ModelFacts] | None = None,
    golden: bytes | None = None,
    tolerance: Mapping[str, Any] | None = None,
    counter: int | None = None,
) -> Release:
    """Build and store the release that `spec` describes; an unsigned one of the same version is replaced.

    Args:
        recorder: describes the models and records golden vectors; needed unless `facts` and `golden` are given.
        facts: facts of the components in their order, instead of running the models.
        golden: bytes of a golden file, with `tolerance` for the release's `graph.golden`.
        counter: the release counter; the line's last one + 1 when None.

    Raises:
        PublishError: `bad_spec`, `not_found` for a model or an image, `release_exists` for a signed version,
            `counter_rollback`, `bad_usage` for a counter that is too high, `key_missing`, `busy`, `io_error`,
            `no_space`; whatever the recorder raises.
    """
    with repository.locked():
        _refuse_published(repository, spec)
        models = _models(spec, recorder, facts)
        recording = _recording(spec, models, recorder, golden, tolerance)
        _refuse_changed(models)
        earlier = [r for r in repository.releases(spec.line) if r.version != spec.version]
        chosen = _counter(earlier, counter)
        bases = [r for r in earlier if r.release_counter < chosen][::-1][: repository.settings.delta_releases]
        sealer = _Sealer(repository, spec, bases)
        sealed = [sealer.seal(m.name, m.facts.format, m.data, m.facts, m.precision) for m in models]
        sealed_golden = sealer.seal(GOLDEN_NAME, "golden", recording.golden, ModelFacts("golden", (), (), ()))
        release = _compose(repository, spec, chosen, sealed, sealed_golden, recording)
        _store(repository, release, [*sealed, sealed_golden], [*(m.data for m in models), recording.golden])
        return release


def _refuse_published(repository: Repository, spec: Spec) -> None:
    if any((r.line, r.version) == (spec.line, spec.version) for r in repository.published()):
        raise PublishError(
            Reason.RELEASE_EXISTS,
            f"release {spec.line} {spec.version} is signed and cannot change",
            hint="give the new release a new version",
        )


def _counter(earlier: Sequence[Release], wanted: int | None) -> int:
    last = max((release.release_counter for release in earlier), default=0)
    if wanted is None:
        return last + 1
    if wanted <= last:
        raise PublishError(
            Reason.COUNTER_ROLLBACK,
            f"counter {wanted} is not above the line's last, {last}",
            hint=f"leave --counter out, or use {last + 1} or more",
        )
    if wanted > _MAX_COUNTER:
        raise PublishError(
            Reason.BAD_USAGE, f"counter {wanted} leaves no room for releases after it", hint="leave --counter out"
        )
    return wanted


def _models(spec: Spec, recorder: Recorder | None, given: Sequence[ModelFacts] | None) -> list[_Model]:
    if given is not None and len(given) != len(spec.components):
        raise PublishError(Reason.BAD_SPEC, f"{len(given)} facts for {len(spec.components)} components")
    models: list[_Model] = []
    for index, component in enumerate(spec.components):
        data = _read_input(component.file, MAX_PAYLOAD_BYTES, "model")
        facts = given[index] if given is not None else _describe(recorder, spec, component)
        name = component.name or _default_name(component.file)
        if not COMPONENT_PATTERN.fullmatch(name) or name in (GOLDEN_NAME, *(m.name for m in models)):
            raise PublishError(
                Reason.BAD_SPEC,
                f"component {component.file.name}: the name {name!r} is taken or not allowed",
                hint="give each [[component]] a name of its own: name = …",
            )
        models.append(_Model(name, component.file, data, facts, component.precision))
    return models


def _describe(recorder: Recorder | None, spec: Spec, component: SpecComponent) -> ModelFacts:
    if recorder is None:
        raise PublishError(
            Reason.UNSUPPORTED,
            "this edge-ota cannot run models, and no facts and golden vectors were given",
            hint="install a runtime beside it: pip install 'edge-runtime-agent[litert]'",
        )
    facts = recorder.describe(component.file, component.outputs)
    if not facts.inputs or not facts.outputs:
        raise PublishError(Reason.BAD_SPEC, f"model {component.file.name} has no input or no output")
    labels, kind = spec.graph["labels"], spec.graph["postprocess"]["kind"]
    shape = facts.outputs[0].get("shape") or [0]
    # NHWC: the classes are the last axis of a heat map and of a classifier's scores alike
    if kind in ("classification", "centernet") and shape[-1] != len(labels):
        raise PublishError(
            Reason.BAD_SPEC,
            f"model {component.file.name} answers {shape[-1]} classes, the spec has {len(labels)} labels",
            hint="one label per class, in the model's order; several outputs are put in order by outputs = […]",
        )
    return facts


def _default_name(file: Path) -> str:
    """The file's own name, lower case, with `-` for what a component's name may not hold."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in file.name.lower())[:48]


def _recording(
    spec: Spec,
    models: Sequence[_Model],
    recorder: Recorder | None,
    golden: bytes | None,
    tolerance: Mapping[str, Any] | None,
) -> Recording:
    if golden is not None:
        recording = Recording(golden, tolerance or {})
    elif recorder is not None:
        images = [_read_input(image, MAX_IMAGE_BYTES, "golden image") for image in spec.images]
        recording = recorder.record(
            {m.name: m.path for m in models}, {m.name: m.facts for m in models}, spec.graph, images
        )
    else:
        raise PublishError(Reason.UNSUPPORTED, "facts were given without golden vectors, and there is no recorder")
    if not 0 < len(recording.golden) <= _MAX_GOLDEN_BYTES:
        raise PublishError(
            Reason.BAD_SPEC,
            f"the golden file has {len(recording.golden)} bytes, not 1 to {_MAX_GOLDEN_BYTES}",
            hint="use fewer or smaller golden images",
        )
    return recording


def _refuse_changed(models: Sequence[_Model]) -> None:
    """The recorder read the file by its name; what is sealed has to be the same bytes."""
    for model in models:
        if _read_input(model.path, MAX_PAYLOAD_BYTES, "model") != model.data:
            raise PublishError(Reason.BAD_SPEC, f"{model.path} changed while the release was built", hint="try again")


def _read_input(path: Path, max_bytes: int, what: str) -> bytes:
    # the publisher's own input may be a link; what it points to has to be a file
    data = files.read_regular(path.resolve(), max_bytes)
    if data is None:
        raise PublishError(Reason.NOT_FOUND, f"there is no {what} at {path}", hint="check the path in the spec")
    if not data:
        raise PublishError(Reason.BAD_SPEC, f"{what} {path} is empty")
    return data


class _Sealer:
    """Turns plaintexts into sealed components of one release."""

    def __init__(self, repository: Repository, spec: Spec, bases: Sequence[Release]) -> None:
        self._spec = spec
        self._bases = bases
        self._vault = Vault(repository)

    def seal(self, name: str, kind: str, plain: bytes, facts: ModelFacts, precision: tuple[str, ...] = ()) -> _Sealed:
        """One component with its full payload and the deltas that are worth their bytes."""
        cek, cek_id = payload.new_key(), secrets.token_hex(16)
        sha256 = hashlib.sha256(plain).hexdigest()

        def travelling(codec: str, data: bytes, context_kind: str) -> tuple[Payload, bytes]:
            context = payload.payload_context(
                self._spec.line, self._spec.version, name, context_kind, sha256, len(plain)
            )
            sealed = payload.seal(data, cek, context)
            described = Payload(
                hashlib.sha256(sealed).hexdigest(),
                len(sealed),
                codec,
                release_format.ENC_COBBLESTONE,
                cek_id,
                payload.leaves(sealed),
            )
            return described, sealed

        full = travelling(*deltas.encode_full(plain), "full")
        ciphertexts = [full[1]]
        found = []
        for base in self._base_hashes(name, kind, sha256):
            base_plain = self._vault.plain(base)
            encoded = None if base_plain is None else deltas.encode_delta(base_plain, plain)
            if encoded is None:
                continue
            described, sealed = travelling(*encoded, f"delta:{base}")
            if described.length < full[0].length:
                found.append(Delta(base, described))
                ciphertexts.append(sealed)
        travels = (name, kind, sha256, len(plain), full[0], tuple(found))
        component = Component(*travels, facts.delegates, facts.inputs, facts.outputs, precision)
        return _Sealed(component, cek, tuple(ciphertexts))

    def _base_hashes(self, name: str, kind: str, own: str) -> list[str]:
        """Plaintexts a device may hold: of the same name in earlier releases, else all of the same format."""
        found: dict[str, None] = {}
        for release in self._bases:
            of_format = [c for c in (*release.components, release.golden) if c.format == kind]
            named = [c for c in of_format if c.name == name]
            found.update(dict.fromkeys(c.plain_sha256 for c in named or of_format))
        found.pop(own, None)
        return list(found)[:_MAX_DELTAS]


def _compose(
    repository: Repository,
    spec: Spec,
    counter: int,
    sealed: Sequence[_Sealed],
    golden: _Sealed,
    recording: Recording,
) -> Release:
    document = {
        "format": release_format.FORMAT,
        "line": spec.line,
        "version": spec.version,
        "release_counter": counter,
        "issued": repository.now().replace(microsecond=0).isoformat().replace("+00:00", "Z"),
        "requires": {"agent": spec.requires.agent, "profiles": list(spec.requires.profiles)},
        "components": [release_format.component_to_json(s.component) for s in sealed],
        "golden": release_format.component_to_json(golden.component),
        "graph": {**spec.graph, "golden": dict(recording.tolerance)},
        "budgets": {"p95_ms": spec.budgets.p95_ms, "rss_bytes": spec.budgets.rss_bytes},
        "licence": spec.licence,
        "metrics": dict(spec.metrics),
    }
    if spec.order:
        document["order"] = {profile: list(names) for profile, names in spec.order.items()}
    data = strictjson.canonical(document)
    if len(data) > release_format.MAX_RELEASE_BYTES:
        raise PublishError(
            Reason.BAD_SPEC,
            f"release.json has {len(data)} bytes, more than the {release_format.MAX_RELEASE_BYTES} allowed",
            hint="split the components over several lines, or lower delta_releases in repo.toml",
        )
    return release_format.parse(data)


def _store(repository: Repository, release: Release, sealed: Sequence[_Sealed], plaintexts: Sequence[bytes]) -> None:
    vault = Vault(repository)
    replaced = _prepared_payloads(repository, release)
    for plain in plaintexts:
        vault.keep_plain(plain)
    for item in sealed:
        vault.keep_key(item.cek, release.line, release.version, item.component.full.cek_id)
        for ciphertext in item.ciphertexts:
            files.write_atomic(repository.payload_path(hashlib.sha256(ciphertext).hexdigest()), ciphertext)
    place = repository.prepared_path(release.line, release.version)
    files.make_directory(place.parent)
    files.write_atomic(place, release.raw)
    for old in replaced:
        files.remove(repository.payload_path(old))


def _prepared_payloads(repository: Repository, release: Release) -> list[str]:
    """Payloads of the unsigned release that `release` replaces; nobody can have fetched them."""
    return [
        item.sha256
        for old in repository.prepared()
        if (old.line, old.version) == (release.line, release.version)
        for component in (*old.components, old.golden)
        for item in (component.full, *(delta.payload for delta in component.deltas))
    ]
