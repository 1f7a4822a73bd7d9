"""`spec.toml`: what a person writes to make a release, read once into frozen values.

Strict: an unknown key is an error that names the nearest known one, and every default is filled in here so that the
signed release leaves nothing open. What the values mean to a running model is the business of the package that runs
models; this module knows their types and ranges alone.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ota.errors import PublishError, Reason
from ota.publisher import files
from ota.publisher.repository import check_line
from ota.publisher.settings import nearest
from ota.release import COMPONENT_PATTERN, VERSION_PATTERN, Budgets, Requires

MAX_SPEC_BYTES = 1 << 20
MAX_LABELS = 20_000
MAX_LABEL_CHARS = 80
# What one answer of a device may hold.
MAX_ITEMS = 200
MAX_GOLDEN_IMAGES = 64
MAX_IMAGE_BYTES = 16 << 20
GOLDEN_NAME = "golden"

Check = Callable[[Any], Any]

_AGENT_PATTERN = re.compile(r">=[0-9]{1,5}\.[0-9]{1,5}(\.[0-9]{1,5})?")
_TOP_KEYS = (
    *("line", "version", "task", "labels", "licence"),
    *("preprocess", "postprocess", "golden", "budgets", "requires", "metrics", "component"),
)
_PREPROCESS_KEYS = ("resize", "interpolation", "color", "mean", "std")
_POSTPROCESS_KEYS: Mapping[str, tuple[str, ...]] = {
    "classification": ("softmax", "top_k"),
    "centernet": ("stride", "threshold", "max_detections", "nms_iou"),
    "raw": (),
}
_ANY_POSTPROCESS_KEY = tuple(key for keys in _POSTPROCESS_KEYS.values() for key in keys)


@dataclass(frozen=True, slots=True)
class SpecComponent:
    """One model file; `name` is None where the publisher derives it from the model."""

    file: Path
    outputs: tuple[str, ...]
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """A checked spec. `graph` holds task, labels, preprocess and postprocess; `images` are encoded pictures."""

    line: str
    version: str
    licence: str
    graph: Mapping[str, Any]
    components: tuple[SpecComponent, ...]
    images: tuple[Path, ...]
    budgets: Budgets
    requires: Requires
    metrics: Mapping[str, float]


def load(path: Path, *, model: Path | None = None) -> Spec:
    """Read the spec at `path`; file names in it are relative to it.

    Args:
        model: the one model file of the release (`--from`); then the spec has no [[component]].

    Raises:
        PublishError: `bad_spec`, naming file and key; `not_found` when there is no such file.
    """
    data = files.read_regular(path.resolve(), MAX_SPEC_BYTES)
    if data is None:
        raise PublishError(Reason.NOT_FOUND, f"there is no spec at {path}", hint="check the path after --spec")
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as e:  # tomllib: also for integers of thousands of digits
        raise PublishError(Reason.BAD_SPEC, f"{path.name}: {e}", hint="the file is not valid TOML") from e
    return parse(table, path.parent, where=path.name, model=model)


def lists_components(path: Path) -> bool:
    """Whether the spec at `path` names its models itself; False also for one that cannot be read."""
    try:
        return "component" in tomllib.loads(path.read_text())
    except (OSError, ValueError):
        return False


def parse(table: Mapping[str, Any], directory: Path, *, where: str = "spec", model: Path | None = None) -> Spec:
    """Check the parsed TOML `table`. See `load`."""
    top = _Table(table, where, _TOP_KEYS)
    task = top.take("task", _choice("detection", "classification", "raw"))
    labels = top.take("labels", _list(_text(MAX_LABEL_CHARS), 0, MAX_LABELS), [])
    if task != "raw" and not labels:
        raise top.bad("labels", f"task {task!r} needs at least one label")
    line, version = top.take("line", _text(32)), top.take("version", _text(20))
    if not VERSION_PATTERN.fullmatch(version):
        raise top.bad("version", f"{version!r} is not three numbers like 1.4.2")
    graph = {
        "task": task,
        "labels": labels,
        "preprocess": _preprocess(top.table("preprocess", *_PREPROCESS_KEYS), task),
        "postprocess": _postprocess(top, task),
    }
    golden = top.table("golden", "images")
    # without pictures of its own, or for a model that takes none, the release is recorded on generated inputs
    images = golden.take("images", _list(_text(4096), int(task != "raw"), MAX_GOLDEN_IMAGES), [])
    spec = Spec(
        line=check_line(line),
        version=version,
        licence=top.take("licence", _text(64)),
        graph=graph,
        components=_components(top, directory, model),
        images=tuple(directory / image for image in images),
        budgets=_budgets(top.table("budgets", "p95_ms", "rss_mb")),
        requires=_requires(top.table("requires", "agent", "profiles")),
        metrics=_metrics(top),
    )
    return spec


def _preprocess(fields: _Table, task: str) -> dict[str, Any]:
    """`value = (pixel - mean) / std`, pixels 0..255, before the model's own quantization. No default is right for most
    models, so both have to be written where pictures are meant."""
    color = fields.take("color", _choice("rgb", "bgr", "gray"), "rgb")
    count = (1,) if color == "gray" else (1, 3)
    identity = ([0.0], [1.0]) if task == "raw" else ()
    return {
        "resize": fields.take("resize", _choice("stretch", "letterbox", "crop"), "stretch"),
        "interpolation": fields.take("interpolation", _choice("nearest", "linear", "area"), "linear"),
        "color": color,
        "mean": fields.take("mean", _numbers(count, -1e6, 1e6), *identity[:1]),
        "std": fields.take("std", _numbers(count, 1e-6, 1e6), *identity[1:]),
    }


def _postprocess(top: _Table, task: str) -> dict[str, Any]:
    kinds = {"classification": "classification", "detection": "centernet", "raw": "raw"}
    given = top.take("postprocess", _mapping, {}).get("kind", kinds[task])
    # an unknown kind is refused as such, not by the first of its keys
    keys = _POSTPROCESS_KEYS[given] if isinstance(given, str) and given in _POSTPROCESS_KEYS else _ANY_POSTPROCESS_KEY
    fields = top.table("postprocess", "kind", *keys)
    kind = fields.take("kind", _choice(*kinds.values()), kinds[task])
    if kind not in (kinds[task], "raw"):
        raise fields.bad("kind", f"{kind!r} does not answer the task {task!r}")
    plan: dict[str, Any] = {"kind": kind}
    if kind == "classification":
        plan["softmax"] = fields.take("softmax", _boolean, False)
        plan["top_k"] = fields.take("top_k", _integer(1, MAX_ITEMS), 1)
    elif kind == "centernet":
        plan["stride"] = fields.take("stride", _integer(1, 256))
        plan["threshold"] = fields.take("threshold", _number(0.0, 1.0), 0.5)
        plan["max_detections"] = fields.take("max_detections", _integer(1, MAX_ITEMS), 100)
        plan["nms_iou"] = fields.take("nms_iou", _number(0.0, 1.0), 0.5)
    return plan


def _components(top: _Table, directory: Path, model: Path | None) -> tuple[SpecComponent, ...]:
    tables = top.take("component", _list(_mapping, 1, 16), None)
    if model is not None:
        if tables is not None:
            raise top.bad("component", "the spec lists components, so --from has no place")
        return (SpecComponent(model, ()),)
    if tables is None:
        raise top.bad("component", "missing: name the model with --from, or list [[component]] tables")
    found = []
    for index, table in enumerate(tables):
        fields = _Table(table, f"{top.where}: component[{index}]", ("name", "file", "outputs"))
        name = fields.take("name", _text(48), None)
        if name is not None and (not COMPONENT_PATTERN.fullmatch(name) or name == GOLDEN_NAME):
            raise fields.bad("name", f"{name!r} is not allowed as the name of a component")
        file = directory / fields.take("file", _text(4096))
        found.append(SpecComponent(file, tuple(fields.take("outputs", _list(_text(200), 1, 16), ())), name))
    return tuple(found)


def _budgets(fields: _Table) -> Budgets:
    p95_ms = fields.take("p95_ms", _number(0.001, 1e7), None)
    rss_mb = fields.take("rss_mb", _number(1, 1e6), None)
    return Budgets(p95_ms, None if rss_mb is None else int(rss_mb * 1_000_000))


def _requires(fields: _Table) -> Requires:
    agent = fields.take("agent", _text(64), "")
    if agent and not _AGENT_PATTERN.fullmatch(agent):
        raise fields.bad("agent", f"{agent!r} is not of the form >=1.2.0")
    profiles = fields.take("profiles", _list(_text(64), 0, 64), [])
    return Requires(agent, tuple(profiles))


def _metrics(top: _Table) -> dict[str, float]:
    """Free names: what the publisher wants to remember about the model."""
    fields = top.table("metrics", *top.take("metrics", _mapping, {}))
    return {key: fields.take(key, _number(-math.inf, math.inf)) for key in fields.raw}


class _Table:
    """One TOML table. A key that is not among `keys` is refused before any other is looked at: a misspelt key explains
    a missing one."""

    def __init__(self, raw: Mapping[str, Any], where: str, keys: Iterable[str]) -> None:
        self.raw = raw
        self.where = where
        known = tuple(keys)
        for key in raw:
            if key not in known:
                raise self.bad(key, "unknown key", nearest(key, known))

    def bad(self, key: str, why: str, hint: str = "") -> PublishError:
        """The error of `key`."""
        return PublishError(Reason.BAD_SPEC, f"{self.where}: {key}: {why}", hint=hint or "see FORMAT.md §2, spec.toml")

    def take(self, key: str, check: Check, *default: Any) -> Any:
        """The checked value of `key`, or the default when it is absent and there is one."""
        if key not in self.raw:
            if default:
                return default[0]
            raise self.bad(key, "missing")
        try:
            return check(self.raw[key])
        except ValueError as e:
            raise self.bad(key, str(e)) from e

    def table(self, key: str, *keys: str) -> _Table:
        """The table under `key`, empty when absent."""
        return _Table(self.take(key, _mapping, {}), f"{self.where}: [{key}]", keys)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a table")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("not true or false")
    return value


def _text(limit: int) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= limit:
            raise ValueError(f"not a text of 1 to {limit} characters")
        if not value.isprintable():
            raise ValueError("holds characters that cannot be printed")
        return value

    return check


def _choice(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(dict.fromkeys(allowed))}")
        return value

    return check


def _integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"not a whole number from {low} to {high}")
        return value

    return check


def _number(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError("not a number")
        if not low <= value <= high:
            raise ValueError(f"not from {low:g} to {high:g}")
        return float(value)

    return check


def _numbers(counts: tuple[int, ...], low: float, high: float) -> Check:
    number = _number(low, high)

    def check(value: Any) -> list[float]:
        if not isinstance(value, list) or len(value) not in counts:
            raise ValueError(f"not a list of {' or '.join(map(str, counts))} numbers")
        return [number(one) for one in value]

    return check


def _list(item: Check, low: int, high: int) -> Check:
    def check(value: Any) -> list[Any]:
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise ValueError(f"not a list of {low} to {high} values")
        return [item(one) for one in value]

    return check
