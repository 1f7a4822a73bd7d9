"""`spec.toml`: what a person writes to make a release, read once into frozen values.

Strict: an unknown key is an error that names the nearest known one, and every default is filled in here so that the
signed release leaves nothing open. What the values mean to a running model is the business of the package that runs
models; this module knows their types and ranges alone.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ota.errors import PublishError, Reason
from ota.publisher import files, graphspec
from ota.publisher.repository import check_line
from ota.publisher.spectable import Table, choice, list_of, mapping, number, text
from ota.release import COMPONENT_PATTERN, VERSION_PATTERN, Budgets, Requires

MAX_SPEC_BYTES = 1 << 20
MAX_GOLDEN_IMAGES = 64
MAX_IMAGE_BYTES = 16 << 20
GOLDEN_NAME = "golden"

_AGENT_PATTERN = re.compile(r">=[0-9]{1,5}\.[0-9]{1,5}(\.[0-9]{1,5})?")
_TOP_KEYS = (
    *("line", "version", "task", "labels", "licence"),
    *("preprocess", "postprocess", "golden", "budgets", "requires", "order", "metrics", "component"),
)


@dataclass(frozen=True, slots=True)
class SpecComponent:
    """One model file; `name` is None where the publisher derives it from the model."""

    file: Path
    outputs: tuple[str, ...]
    name: str | None = None
    precision: tuple[str, ...] = ()


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
    order: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
    top = Table(table, where, _TOP_KEYS)
    graph = graphspec.graph(top)
    line, version = top.take("line", text(32)), top.take("version", text(20))
    if not VERSION_PATTERN.fullmatch(version):
        raise top.bad("version", f"{version!r} is not three numbers like 1.4.2")
    golden = top.table("golden", "images")
    # without pictures of its own, or for a model that takes none, the release is recorded on generated inputs
    images = golden.take("images", list_of(text(4096), int(graph["task"] != "raw"), MAX_GOLDEN_IMAGES), [])
    spec = Spec(
        line=check_line(line),
        version=version,
        licence=top.take("licence", text(64)),
        graph=graph,
        components=_components(top, directory, model),
        images=tuple(directory / image for image in images),
        budgets=_budgets(top.table("budgets", "p95_ms", "rss_mb")),
        requires=_requires(top.table("requires", "agent", "profiles")),
        metrics=_metrics(top),
        order=_order(top),
    )
    return spec


def _components(top: Table, directory: Path, model: Path | None) -> tuple[SpecComponent, ...]:
    tables = top.take("component", list_of(mapping, 1, 16), None)
    if model is not None:
        if tables is not None:
            raise top.bad("component", "the spec lists components, so --from has no place")
        return (SpecComponent(model, ()),)
    if tables is None:
        raise top.bad("component", "missing: name the model with --from, or list [[component]] tables")
    found = []
    for index, table in enumerate(tables):
        fields = Table(table, f"{top.where}: component[{index}]", ("name", "file", "outputs", "precision"))
        name = fields.take("name", text(48), None)
        if name is not None and (not COMPONENT_PATTERN.fullmatch(name) or name == GOLDEN_NAME):
            raise fields.bad("name", f"{name!r} is not allowed as the name of a component")
        file = directory / fields.take("file", text(4096))
        outputs = tuple(fields.take("outputs", list_of(text(200), 1, 16), ()))
        # narrower numbers that a runtime may compute floats in; without them it is held to float32
        precision = tuple(fields.take("precision", list_of(choice("bf16"), 1, 1), ()))
        found.append(SpecComponent(file, outputs, name, precision))
    return tuple(found)


def _budgets(fields: Table) -> Budgets:
    p95_ms = fields.take("p95_ms", number(0.001, 1e7), None)
    rss_mb = fields.take("rss_mb", number(1, 1e6), None)
    return Budgets(p95_ms, None if rss_mb is None else int(rss_mb * 1_000_000))


def _requires(fields: Table) -> Requires:
    agent = fields.take("agent", text(64), "")
    if agent and not _AGENT_PATTERN.fullmatch(agent):
        raise fields.bad("agent", f"{agent!r} is not of the form >=1.2.0")
    profiles = fields.take("profiles", list_of(text(64), 0, 64), [])
    return Requires(agent, tuple(profiles))


def _order(top: Table) -> dict[str, tuple[str, ...]]:
    """By device profile, the names of components as the publisher measured them there, the best first."""
    fields = top.table("order", *top.take("order", mapping, {}))
    return {profile: tuple(fields.take(profile, list_of(text(48), 1, 16))) for profile in fields.raw}


def _metrics(top: Table) -> dict[str, float]:
    """Free names: what the publisher wants to remember about the model."""
    fields = top.table("metrics", *top.take("metrics", mapping, {}))
    return {key: fields.take(key, number(-math.inf, math.inf)) for key in fields.raw}
