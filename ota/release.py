"""`release.json`: what one release of a line consists of, parsed once into frozen values.

This is signed metadata: unknown fields are kept in `Release.raw` and ignored, known ones are checked strictly. How a
model runs (`graph`) is carried unread; the package that runs models parses it.
Invariants: every length and hash that later bounds an allocation comes from here; a `Release` exists only for bytes
whose hash a verified TUF target named (`ota.client.trust`), or on the publisher's own side.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ota import strictjson
from ota.errors import OtaError, Reason

FORMAT = 1
LEAF_BYTES = 65536
MAX_RELEASE_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 31

LINE_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
VERSION_PATTERN = re.compile(r"[0-9]{1,5}\.[0-9]{1,5}\.[0-9]{1,5}")
COMPONENT_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}")
DEVICE_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")
_TARGET_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_HEX32 = re.compile(r"[0-9a-f]{32}")

FULL_CODECS = ("raw", "zstd")
DELTA_CODECS = ("zstd-patch",)
ENC_COBBLESTONE = "cobblestone-256"


@dataclass(frozen=True, slots=True)
class Payload:
    """One sealed file as it travels: ciphertext hash, length and leaves, and how to get the plaintext out of it.

    `leaves` are the SHA-256 of every 64 KiB of the ciphertext in order, so a block is checked the moment it arrives.
    """

    sha256: str
    length: int
    codec: str
    enc: str
    cek_id: str
    leaves: tuple[str, ...]

    def leaf_range(self, index: int) -> tuple[int, int]:
        """Byte range [start, end) of leaf `index`."""
        start = index * LEAF_BYTES
        return start, min(start + LEAF_BYTES, self.length)


@dataclass(frozen=True, slots=True)
class Delta:
    """A payload that turns the plaintext `base_sha256` into the component's plaintext."""

    base_sha256: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class Component:
    """One file of a release. `format` is `tflite`, `onnx`, `ovir` or `golden`; `delegates` are those the publisher
    allows, `precision` the narrower numbers that floats may be computed in (`bf16`)."""

    name: str
    format: str
    plain_sha256: str
    plain_length: int
    full: Payload
    deltas: tuple[Delta, ...]
    delegates: tuple[str, ...]
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]
    precision: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Budgets:
    """What the publisher promises; a trial that measures more is refused. None means no promise."""

    p95_ms: float | None
    rss_bytes: int | None


@dataclass(frozen=True, slots=True)
class Requires:
    """What a device must have; an empty tuple or string allows any."""

    agent: str
    profiles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """One release of a line. `graph` holds task, labels, preprocess, postprocess and golden tolerance, unread here.

    `order`: by device profile, the names of components from the most to the least promising, as the publisher measured.
    """

    line: str
    version: str
    release_counter: int
    issued: str
    requires: Requires
    components: tuple[Component, ...]
    golden: Component
    graph: Mapping[str, Any]
    budgets: Budgets
    licence: str
    metrics: Mapping[str, Any]
    sha256: str
    raw: bytes
    order: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def component(self, name: str) -> Component:
        """The component called `name`.

        Raises:
            OtaError: reason `bad_release` when there is none.
        """
        for component in self.components:
            if component.name == name:
                return component
        raise OtaError(Reason.BAD_RELEASE, f"release {self.line} {self.version} has no component {name!r}")


def target_name(line: str, version: str) -> str:
    """TUF target path of a release."""
    return f"{line}/{version}/release.json"


def check_target_name(name: str) -> str:
    """Return `name` if it is in the grammar of target names.

    Raises:
        OtaError: reason `bad_target_name`.
    """
    if len(name) > 200 or not _TARGET_PATTERN.fullmatch(name) or ".." in name:
        raise OtaError(
            Reason.BAD_TARGET_NAME, f"target name {name[:80]!r} is not allowed", hint="use a-z 0-9 . _ - and single /"
        )
    return name


def parse(data: bytes) -> Release:
    """Parse the bytes of a `release.json`.

    Args:
        data: at most `MAX_RELEASE_BYTES` bytes.

    Raises:
        OtaError: `bad_json` or `bad_release`, naming the field; `unsupported` for an unknown format, codec or enc.
    """
    top = _Fields(strictjson.loads(data, max_bytes=MAX_RELEASE_BYTES, what="release.json"), "release.json")
    if (number := top.integer("format", 1, 1 << 16)) != FORMAT:
        raise OtaError(
            Reason.UNSUPPORTED, f"release.json has format {number}, this agent reads {FORMAT}", hint="update the agent"
        )
    components = tuple(_component(item) for item in top.objects("components", 1, 16))
    names = [c.name for c in components]
    if len(set(names)) != len(names):
        raise top.bad("components", "two components of one name")
    requires = top.object("requires")
    budgets = top.object("budgets")
    return Release(
        line=top.match("line", LINE_PATTERN),
        version=top.match("version", VERSION_PATTERN),
        release_counter=top.integer("release_counter", 1, 1 << 53),
        issued=top.string("issued", 40),
        requires=Requires(requires.string("agent", 64), requires.strings("profiles", 64)),
        components=components,
        golden=_component(top.object("golden")),
        graph=top.mapping("graph"),
        budgets=Budgets(
            budgets.optional_number("p95_ms"),
            None if (rss := budgets.optional_number("rss_bytes")) is None else int(rss),
        ),
        licence=top.string("licence", 64),
        metrics=top.mapping("metrics"),
        sha256=hashlib.sha256(data).hexdigest(),
        raw=data,
        order=_order(top, names),
    )


def payload_to_json(payload: Payload) -> dict[str, Any]:
    """The JSON object of a payload, as `parse` reads it."""
    return {
        "sha256": payload.sha256,
        "length": payload.length,
        "codec": payload.codec,
        "enc": payload.enc,
        "cek_id": payload.cek_id,
        "leaves": list(payload.leaves),
    }


def component_to_json(component: Component) -> dict[str, Any]:
    """The JSON object of a component, as `parse` reads it."""
    return {
        "name": component.name,
        "format": component.format,
        "plain_sha256": component.plain_sha256,
        "plain_length": component.plain_length,
        "full": payload_to_json(component.full),
        "deltas": [{"base_sha256": d.base_sha256, "payload": payload_to_json(d.payload)} for d in component.deltas],
        "delegates": list(component.delegates),
        "inputs": [dict(spec) for spec in component.inputs],
        "outputs": [dict(spec) for spec in component.outputs],
        # left out where empty: most components, and all that an older agent knows
        **({"precision": list(component.precision)} if component.precision else {}),
    }


def _order(top: _Fields, names: list[str]) -> dict[str, tuple[str, ...]]:
    if "order" not in top.raw:
        return {}
    fields = top.object("order")
    found = {profile: fields.strings(profile, 16) for profile in fields.raw}
    for profile, order in found.items():
        if len(profile) > 64 or not set(order) <= set(names):
            raise top.bad("order", f"{profile[:40]!r} does not list components of this release")
    return found


def _component(fields: _Fields) -> Component:
    return Component(
        name=fields.match("name", COMPONENT_PATTERN),
        format=fields.string("format", 16),
        plain_sha256=fields.match("plain_sha256", _HEX64),
        plain_length=fields.integer("plain_length", 1, MAX_PAYLOAD_BYTES),
        full=_payload(fields.object("full"), FULL_CODECS),
        deltas=tuple(
            Delta(item.match("base_sha256", _HEX64), _payload(item.object("payload"), DELTA_CODECS))
            for item in fields.objects("deltas", 0, 16)
        ),
        delegates=fields.strings("delegates", 16),
        inputs=tuple(f.raw for f in fields.objects("inputs", 0, 16)),
        outputs=tuple(f.raw for f in fields.objects("outputs", 0, 16)),
        precision=fields.strings("precision", 4) if "precision" in fields.raw else (),
    )


def _payload(fields: _Fields, codecs: tuple[str, ...]) -> Payload:
    codec = fields.string("codec", 32)
    enc = fields.string("enc", 32)
    if codec not in codecs:
        raise OtaError(Reason.UNSUPPORTED, f"{fields.where}: codec {codec!r} is unknown", hint="update the agent")
    if enc != ENC_COBBLESTONE:
        raise OtaError(Reason.UNSUPPORTED, f"{fields.where}: encryption {enc!r} is unknown", hint="update the agent")
    length = fields.integer("length", 1, MAX_PAYLOAD_BYTES)
    leaves = fields.strings("leaves", MAX_PAYLOAD_BYTES // LEAF_BYTES)
    if len(leaves) != -(-length // LEAF_BYTES) or not all(_HEX64.fullmatch(leaf) for leaf in leaves):
        raise fields.bad("leaves", f"not {-(-length // LEAF_BYTES)} SHA-256 values")
    return Payload(
        sha256=fields.match("sha256", _HEX64),
        length=length,
        codec=codec,
        enc=enc,
        cek_id=fields.match("cek_id", _HEX32),
        leaves=leaves,
    )


class _Fields:
    """Typed access to one JSON object; every miss names the object and the field."""

    def __init__(self, value: Any, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise OtaError(Reason.BAD_RELEASE, f"{where}: not an object")
        self.raw: dict[str, Any] = value

    def bad(self, key: str, why: str) -> OtaError:
        return OtaError(
            Reason.BAD_RELEASE, f"{self.where}: {key}: {why}", hint="rebuild the release with edge-ota release"
        )

    def string(self, key: str, limit: int) -> str:
        value = self.raw.get(key)
        if not isinstance(value, str) or len(value) > limit:
            raise self.bad(key, f"not a text of at most {limit} characters")
        return value

    def match(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.string(key, 256)
        if not pattern.fullmatch(value):
            raise self.bad(key, f"{value[:40]!r} does not match {pattern.pattern}")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(key, f"not an integer from {low} to {high}")
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise self.bad(key, "not a positive number")
        return float(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        return self.object(key).raw

    def object(self, key: str) -> _Fields:
        return _Fields(self.raw.get(key), f"{self.where}.{key}")

    def objects(self, key: str, low: int, high: int) -> list[_Fields]:
        value = self.raw.get(key)
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise self.bad(key, f"not a list of {low} to {high} objects")
        return [_Fields(item, f"{self.where}.{key}[{i}]") for i, item in enumerate(value)]

    def strings(self, key: str, limit: int) -> tuple[str, ...]:
        value = self.raw.get(key)
        if not isinstance(value, list) or len(value) > limit or not all(isinstance(s, str) for s in value):
            raise self.bad(key, f"not a list of at most {limit} texts")
        return tuple(value)
