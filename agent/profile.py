"""Device profiles: how a board is recognised and which delegates it may try, in which order.

A profile never says which delegate is best; `agent.daemon.selection` measures that.
"""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import ConfigError, Reason

# every delegate, and the model formats it takes
DELEGATES: dict[str, tuple[str, ...]] = {
    "litert:xnnpack": ("tflite",),
    "litert:cpu": ("tflite",),
    "tflite:cpu": ("tflite",),
    "onnx:cpu": ("onnx",),
    "openvino:cpu": ("onnx", "tflite"),
}


@dataclass(frozen=True, slots=True)
class Profile:
    """One board description. `delegates` is the ladder, most promising first; those in `exclusive` drive hardware that
    one process alone may have open: it belongs to the line that serves on it, and trials take turns there."""

    name: str
    machines: tuple[str, ...]
    models: tuple[str, ...]
    delegates: tuple[str, ...]
    threads: int
    exclusive: tuple[str, ...] = ()


def folder() -> Path:
    """Where the profiles lie; in a checkout a link to the top-level folder of that name."""
    return Path(__file__).resolve().parent / "device-profiles"


def parse(data: Mapping[str, Any], where: str) -> Profile:
    """Check one profile.

    Raises:
        ConfigError: `bad_profile`, naming the key.
    """
    unknown = set(data) - {"name", "recognise", "delegates", "exclusive", "limits"}
    if unknown:
        raise ConfigError(Reason.BAD_PROFILE, f"{where}: unknown key {sorted(unknown)[0]!r}")
    try:
        recognise = data["recognise"]
        profile = Profile(
            name=str(data["name"]),
            machines=tuple(recognise.get("machine", ())),
            models=tuple(recognise.get("model", ())),
            delegates=tuple(data["delegates"]),
            threads=int(data.get("limits", {}).get("threads", 1)),
            exclusive=tuple(data.get("exclusive", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(Reason.BAD_PROFILE, f"{where}: {e!r} is missing or of the wrong kind") from e
    for delegate in profile.delegates:
        if delegate not in DELEGATES:
            raise ConfigError(
                Reason.BAD_PROFILE, f"{where}: delegate {delegate!r} is unknown", hint=f"known: {', '.join(DELEGATES)}"
            )
    for delegate in profile.exclusive:
        if delegate not in profile.delegates:
            raise ConfigError(
                Reason.BAD_PROFILE,
                f"{where}: exclusive delegate {delegate!r} is not among its delegates",
                hint=f"delegates: {', '.join(profile.delegates)}",
            )
    return profile


def load_all(where: Path | None = None) -> dict[str, Profile]:
    """Every profile by name.

    Raises:
        ConfigError: `bad_profile`.
    """
    profiles = {}
    for path in sorted((where or folder()).glob("*.toml")):
        try:
            profile = parse(tomllib.loads(path.read_text()), path.name)
        except (OSError, ValueError, RecursionError) as e:
            raise ConfigError(Reason.BAD_PROFILE, f"{path.name}: {e}") from e
        profiles[profile.name] = profile
    return profiles


def recognise(name: str, profiles: Mapping[str, Profile], *, root: Path = Path("/"), machine: str = "") -> Profile:
    """The profile called `name`, or for `auto` the first whose facts this board shows; narrower ones (by model) first.

    Args:
        root: file system root that holds `proc/device-tree/model`.
        machine: instruction set, `platform.machine()` when empty.

    Raises:
        ConfigError: `bad_profile` when nothing fits.
    """
    if name != "auto":
        if name not in profiles:
            raise ConfigError(
                Reason.BAD_PROFILE, f"profile {name!r} does not exist", hint=f"known: {', '.join(sorted(profiles))}"
            )
        return profiles[name]
    machine = machine or platform.machine()
    try:
        model = (root / "proc/device-tree/model").read_text().strip("\0\n ")
    except OSError:
        model = ""
    fitting = [p for p in profiles.values() if machine in p.machines]
    by_model = [p for p in fitting if any(fragment in model for fragment in p.models)]
    generic = [p for p in fitting if not p.models]
    for candidates in (by_model, generic):
        if candidates:
            return candidates[0]
    raise ConfigError(
        Reason.BAD_PROFILE, f"no profile fits {machine} {model!r}", hint='set profile = "…" in agent.toml'
    )
