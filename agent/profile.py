"""Device profiles: how a board is recognised, which delegates it may try in which order, and what of that was ever run.

A profile never says which delegate is best; `agent.daemon.selection` measures that. Its facts each name the public
document they are from, its ledger what was run on the hardware, what under emulation and what never.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.board import Board, read_board
from agent.configtable import Table
from agent.errors import ConfigError, Reason
from agent.governorconfig import GovernorConfig, parse_governor
from agent.sourceconfig import parse_source

# every delegate, and the model formats it takes
DELEGATES: dict[str, tuple[str, ...]] = {
    "litert:xnnpack": ("tflite",),
    "litert:cpu": ("tflite",),
    "litert:edgetpu": ("tflite",),
    "litert:ethosu": ("tflite",),
    "litert:vx": ("tflite",),
    "tflite:cpu": ("tflite",),
    "onnx:cpu": ("onnx",),
    "onnx:cuda": ("onnx",),
    "onnx:tensorrt": ("onnx",),
    "onnx:openvino": ("onnx",),
    "onnx:qnn": ("onnx",),
    "openvino:cpu": ("onnx", "ovir", "tflite"),
    "openvino:gpu": ("onnx", "ovir", "tflite"),
    "openvino:npu": ("onnx", "ovir", "tflite"),
    "reference": ("tflite",),
}
ACCESSORIES_NAME = "accessories.toml"
FACT_KINDS = ("model", "compatible", "dmi", "cpu", "cpu_flag", "pci", "usb")
RECOGNITIONS = ("captured", "assembled", "untested")
RUNS = ("hardware", "emulation", "never")


@dataclass(frozen=True, slots=True)
class Fact:
    """Something a board shows: of `kind`, any one of `values`. `source` names the public document that says so.

    A board without a `needed` fact is not of this profile; the others are shown, and say more about a board. `model`,
    `dmi` and `cpu` match as a part of what the board shows, the other kinds match whole.
    """

    kind: str
    values: tuple[str, ...]
    source: str
    needed: bool

    def seen(self, board: Board) -> str:
        """The value that `board` shows, empty when it shows none."""
        shown = _shown(board, self.kind)
        for value in self.values:
            if self.kind in ("model", "dmi", "cpu"):
                whole = next((s for s in shown if value in s), "")
                if whole:
                    return whole
            elif value in shown:
                return value
        return ""


@dataclass(frozen=True, slots=True)
class Accessory:
    """Something that is plugged in and brings `delegates`, found by any of its `facts`. One without delegates is
    recognised so that `note` can say why nothing of this program runs on it."""

    name: str
    title: str
    facts: tuple[Fact, ...]
    delegates: tuple[str, ...]
    exclusive: tuple[str, ...]
    note: str


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of the support ledger: `claim` (`recognition`, `camera`, `governor`, or the name of a delegate) was run
    on the hardware, under emulation, or never; `date` and `by` say when and by what."""

    claim: str
    run: str
    date: str
    by: str


@dataclass(frozen=True, slots=True)
class Profile:
    """One board description. `delegates` is the ladder, most promising first; those in `exclusive` drive hardware that
    one process alone may have open: it belongs to the line that serves on it, and trials take turns there.

    `python` is the interpreter of the workers, None for the daemon's own. `zygote` and `fused` switch these ways of
    running workers on. `ram_mb` and `temperature_c` are limits of the board, 0 where none is known. `camera` holds keys
    of a `[[source]]` table that fits the board's own camera; `notes` is what a person should know.
    """

    name: str
    title: str
    recognition: str
    machines: tuple[str, ...]
    facts: tuple[Fact, ...]
    delegates: tuple[str, ...]
    exclusive: tuple[str, ...]
    accessories: tuple[str, ...]
    threads: int
    ram_mb: int
    temperature_c: float
    camera: Mapping[str, Any]
    python: Path | None
    zygote: bool
    fused: bool
    governor: GovernorConfig
    ledger: tuple[Claim, ...]
    notes: tuple[str, ...]

    def fits(self, board: Board) -> bool:
        """Whether `board` shows every needed fact. A copied root that does not tell its machine fits by facts alone."""
        needed = [fact for fact in self.facts if fact.needed]
        of_machine = board.machine in self.machines or (not board.machine and bool(needed))
        return of_machine and all(fact.seen(board) for fact in needed)

    @property
    def narrowness(self) -> int:
        """How many facts a board must show: of two profiles that fit, the narrower one is meant."""
        return sum(fact.needed for fact in self.facts)


@dataclass(frozen=True, slots=True)
class Recognised:
    """The profile of this device with the delegates of what is plugged in, in front of its own.

    `evidence` says in one line why it is this one.
    """

    profile: Profile
    board: Board
    accessories: tuple[Accessory, ...]
    evidence: str


def folder() -> Path:
    """Where the profiles lie; in a checkout a link to the top-level folder of that name."""
    return Path(__file__).resolve().parent / "device-profiles"


def parse(data: Mapping[str, Any], where: str) -> Profile:
    """Check one profile.

    Raises:
        ConfigError: `bad_profile`, naming the key.
    """
    try:
        return _profile(Table(data, where, Path()), where, data)
    except ConfigError as e:
        raise ConfigError(Reason.BAD_PROFILE, e.message, hint=e.hint) from e


def parse_accessories(data: Mapping[str, Any], where: str) -> dict[str, Accessory]:
    """Check the file of accessories.

    Raises:
        ConfigError: `bad_profile`, naming the key.
    """
    try:
        top = Table(data, where, Path())
        found = {a.name: a for a in map(_accessory, top.tables("accessory"))}
        top.finish()
    except ConfigError as e:
        raise ConfigError(Reason.BAD_PROFILE, e.message, hint=e.hint) from e
    return found


def load_all(where: Path | None = None) -> dict[str, Profile]:
    """Every profile by name.

    Raises:
        ConfigError: `bad_profile`.
    """
    paths = sorted((where or folder()).glob("*.toml"))
    profiles = [parse(_toml(path), path.name) for path in paths if path.name != ACCESSORIES_NAME]
    return {profile.name: profile for profile in profiles}


def load_accessories(where: Path | None = None) -> dict[str, Accessory]:
    """Every accessory by name; none where there is no file of them.

    Raises:
        ConfigError: `bad_profile`.
    """
    path = (where or folder()) / ACCESSORIES_NAME
    return parse_accessories(_toml(path), path.name) if path.exists() else {}


def recognise(name: str, profiles: Mapping[str, Profile]) -> Profile:
    """The profile called `name`, or for `auto` the narrowest that fits this board, with what is plugged in.

    Raises:
        ConfigError: `bad_profile` when nothing fits.
    """
    return examine(name, profiles, load_accessories(), read_board()).profile


def here(name: str) -> Recognised:
    """As `recognise`, among all profiles and with the reasons.

    Raises:
        ConfigError: `bad_profile`.
    """
    return examine(name, load_all(), load_accessories(), read_board())


def examine(
    name: str, profiles: Mapping[str, Profile], accessories: Mapping[str, Accessory], board: Board
) -> Recognised:
    """As `recognise`, with the reasons.

    Raises:
        ConfigError: `bad_profile` when nothing fits.
    """
    if name != "auto":
        if name not in profiles:
            raise ConfigError(
                Reason.BAD_PROFILE, f"profile {name!r} does not exist", hint=f"known: {', '.join(sorted(profiles))}"
            )
        profile, evidence = profiles[name], "named in agent.toml"
    else:
        fitting = sorted((p for p in profiles.values() if p.fits(board)), key=lambda p: (-p.narrowness, p.name))
        if not fitting:
            raise ConfigError(
                Reason.BAD_PROFILE,
                f"no profile fits {board.machine} {board.model!r}",
                hint='take one of edge-agent profile list: profile = "NAME" in agent.toml',
            )
        profile = fitting[0]
        shown = [f"{fact.kind} {seen}" for fact in profile.facts if (seen := fact.seen(board))]
        evidence = "; ".join(shown) or f"machine {board.machine}"
    plugged = tuple(
        accessory
        for accessory in (accessories[a] for a in profile.accessories if a in accessories)
        if any(fact.seen(board) for fact in accessory.facts)
    )
    return Recognised(_equipped(profile, plugged), board, plugged, evidence)


def _equipped(profile: Profile, plugged: Iterable[Accessory]) -> Profile:
    brought = tuple(dict.fromkeys(d for accessory in plugged for d in accessory.delegates))
    alone = tuple(dict.fromkeys(d for accessory in plugged for d in accessory.exclusive))
    return replace(
        profile,
        delegates=brought + tuple(d for d in profile.delegates if d not in brought),
        exclusive=profile.exclusive + tuple(d for d in alone if d not in profile.exclusive),
    )


def _shown(board: Board, kind: str) -> Iterable[str]:
    if kind == "model":
        return (board.model,)
    if kind == "cpu_flag":
        return board.flags
    found: Iterable[str] = getattr(board, kind)
    return found


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(Reason.BAD_PROFILE, f"{path.name}: {e}") from e


def _profile(top: Table, where: str, data: Mapping[str, Any]) -> Profile:
    recognise_, limits = top.table("recognise"), top.table("limits")
    profile = Profile(
        name=top.text("name", None),
        title=top.text("title", None),
        recognition=top.choice("recognition", None, RECOGNITIONS),
        machines=tuple(recognise_.parsed("machine", str)),
        facts=tuple(_fact(t) for t in recognise_.tables("fact")),
        delegates=top.choices("delegates", tuple(DELEGATES)),
        exclusive=top.choices("exclusive", tuple(DELEGATES)),
        accessories=tuple(top.parsed("accessories", str)),
        threads=int(limits.number("threads", 1, 1, 64)),
        ram_mb=int(limits.number("ram_mb", 0, 0, 1 << 20)),
        temperature_c=limits.number("temperature_c", 0, 0, 150),
        camera=_camera(where, data["camera"]) if top.has("camera") else {},
        python=Path(top.text("python", "")) if top.has("python") else None,
        zygote=top.flag("zygote", False),
        fused=top.flag("fused", False),
        governor=parse_governor(top.table("governor")),
        ledger=tuple(_claim(t) for t in top.tables("ledger")),
        notes=tuple(top.parsed("notes", str)),
    )
    for table in (recognise_, limits, top):
        table.finish()
    if not profile.delegates:
        raise top.bad("delegates is empty", f"known: {', '.join(DELEGATES)}")
    for delegate in profile.exclusive:
        if delegate not in profile.delegates:
            raise top.bad(
                f"exclusive delegate {delegate!r} is not among its delegates",
                f"delegates: {', '.join(profile.delegates)}",
            )
    return profile


def _camera(where: str, keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys as they stand, once a source was made of them."""
    if not isinstance(keys, Mapping):
        raise ConfigError(Reason.BAD_PROFILE, f"{where}: camera = {keys!r} is not a table")
    parse_source(Table({"name": "camera", **keys}, f"{where}: [camera]", Path("/")))
    return dict(keys)


def _accessory(table: Table) -> Accessory:
    accessory = Accessory(
        name=table.text("name", None),
        title=table.text("title", None),
        facts=tuple(_fact(t) for t in table.tables("fact")),
        delegates=table.choices("delegates", tuple(DELEGATES)),
        exclusive=table.choices("exclusive", tuple(DELEGATES)),
        note=table.text("note", ""),
    )
    table.finish()
    return accessory


def _fact(table: Table) -> Fact:
    fact = Fact(
        kind=table.choice("kind", None, FACT_KINDS),
        values=tuple(table.parsed("any", str)),
        source=table.text("source", None),
        needed=table.flag("needed", True),
    )
    table.finish()
    return fact


def _claim(table: Table) -> Claim:
    claim = Claim(
        claim=table.text("claim", None),
        run=table.choice("run", None, RUNS),
        date=table.text("date", ""),
        by=table.text("by", ""),
    )
    table.finish()
    if claim.run != "never" and not (claim.date and claim.by):
        raise table.bad(f"claim {claim.claim!r} was run, but not when nor by what", "add date and by")
    return claim
