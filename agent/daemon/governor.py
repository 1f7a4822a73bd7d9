"""Fewer frames while the board is too hot, slowed down, starved of power or overloaded; decisions are pure.

`decide` takes where things stand and one look at the board, and says where they stand then. Rules:
- One rung at a time, and none before the last one has had `hold_s` to show its effect.
- Up again only after `recover_s` in which every figure was on the calm side, which lies clear of the straining one.
- A way up that had to be taken back at once is waited for twice as long the next time, up to `MAX_PATIENCE` doublings:
  a board that is only cool because of the rung would otherwise go up and down for ever.
A thread of the board's own, a fan or another governor of the kernel, is none of its business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from agent.daemon.vitals import Vitals, VitalsReader
from agent.governorconfig import PAUSE, GovernorConfig, divisor

log = logging.getLogger(__name__)

# so far from where the kernel switches off, where neither profile nor agent.toml has a temperature
HEADROOM_K = 10.0
HYSTERESIS_K = 8.0
# the calm side of pressure and of power, as a share of the threshold; of a battery, in percent more
CALM_PRESSURE, CALM_POWER, CALM_BATTERY = 0.7, 0.9, 5.0
MAX_PATIENCE = 5
# at full rate for so long: what was learnt of this board's heat is out of date
FORGET_S = 3600.0
COOL, FEED, LESS = "cool the board", "give it a stronger supply", "give it less to do"
LOOK_EVERY_TICKS = 2
"""How often the board is looked at, in calls of `tick`."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Where things stand: `level` rungs down, since `since_s`, because of `cause`.

    `calm_since_s` is when every figure became calm, None while one is not; `rose` that the last step was one up;
    `patience` how often one up had to be taken back; `remedy` what a person can do about the cause.
    """

    level: int = 0
    since_s: float = float("-inf")
    calm_since_s: float | None = None
    rose: bool = False
    patience: int = 0
    cause: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Strain:
    """What is too much, in words, each with what a person can do about it; and whether everything is well clear of its
    threshold."""

    causes: tuple[tuple[str, str], ...]
    calm: bool


def strain(config: GovernorConfig, vitals: Vitals) -> Strain:
    """Hold `vitals` against the thresholds of `config`; what the board does not tell is neither."""
    causes: list[tuple[str, str]] = []
    calm = not vitals.throttled
    t, room = vitals.temperature_c, vitals.headroom_k
    if config.hot_c and t is not None:
        if t >= config.hot_c:
            causes.append((f"{t:.1f} °C, {config.hot_c:g} allowed", COOL))
        calm &= t <= (config.cool_c or config.hot_c - HYSTERESIS_K)
    elif room is not None:
        if room <= HEADROOM_K:
            causes.append((f"{room:.1f} °C below the temperature at which the board switches off", COOL))
        calm &= room >= HEADROOM_K + HYSTERESIS_K
    causes += [
        (f"the processor is slowed down: {reason}", FEED if reason == "under_voltage" else COOL)
        for reason in vitals.throttled
    ]
    if config.pressure_percent and vitals.pressure_percent is not None:
        if vitals.pressure_percent >= config.pressure_percent:
            what = f"processor pressure {vitals.pressure_percent:.0f} %, {config.pressure_percent:g} allowed"
            causes.append((what, LESS))
        calm &= vitals.pressure_percent < CALM_PRESSURE * config.pressure_percent
    if config.power_w and vitals.power_w is not None:
        if vitals.power_w >= config.power_w:
            causes.append((f"{vitals.power_w:.1f} W, {config.power_w:g} allowed", LESS))
        calm &= vitals.power_w < CALM_POWER * config.power_w
    if config.battery_percent and vitals.battery_percent is not None:
        if vitals.battery_percent <= config.battery_percent:
            what = f"battery at {vitals.battery_percent:.0f} %, {config.battery_percent:g} is the least"
            causes.append((what, "charge it"))
        calm &= vitals.battery_percent > config.battery_percent + CALM_BATTERY
    return Strain(tuple(causes), calm)


def acts_on(config: GovernorConfig, tells: Iterable[str]) -> list[str]:
    """Those of the figures that a board tells which can make it act; `tells` as of `VitalsReader`."""
    looked_at = {
        "temperature": config.hot_c,
        "headroom": not config.hot_c,
        "throttling": True,
        "pressure": config.pressure_percent,
        "power": config.power_w,
        "battery": config.battery_percent,
    }
    return [figure for figure in tells if looked_at[figure]]


def decide(config: GovernorConfig, stand: Stand, vitals: Vitals, now_s: float) -> Stand:
    """Where things stand after this look."""
    found = strain(config, vitals)
    if found.causes:
        stand = replace(stand, calm_since_s=None)
        if stand.level == len(config.ladder) or now_s - stand.since_s < config.hold_s:
            return stand
        patience = min(stand.patience + 1, MAX_PATIENCE) if stand.rose else stand.patience
        return Stand(stand.level + 1, now_s, None, False, patience, *found.causes[0])
    if not found.calm:
        return replace(stand, calm_since_s=None)
    calm_since_s = now_s if stand.calm_since_s is None else stand.calm_since_s
    stand = replace(stand, calm_since_s=calm_since_s)
    if stand.level == 0:
        return replace(stand, rose=False, patience=0) if now_s - stand.since_s >= FORGET_S else stand
    wait_s = config.recover_s * 2**stand.patience
    if now_s - calm_since_s < wait_s or now_s - stand.since_s < config.hold_s:
        return stand
    level = stand.level - 1
    why = (stand.cause, stand.remedy) if level else ()
    return Stand(level, now_s, now_s, True, stand.patience, *why)


class Paced(Protocol):
    """A source whose pace can be lowered."""

    def set_pace(self, divisor: int) -> None:
        """Deliver only so much of the frames; see `protocol.SetPace`."""


class Governor:
    """Looks at the board from time to time and sets the pace of the sources.

    Args:
        config: what holds on this device, see `agent.governorconfig.merged`.
        read: one look at the board.
        sources: all of them.
        tell: hears of every change.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: GovernorConfig,
        read: Callable[[], Vitals],
        sources: Iterable[Paced],
        *,
        tell: Callable[[dict[str, Any]], None],
        clock: Callable[[], float],
    ) -> None:
        self._config, self._read, self._sources = config, read, sources
        self._tell, self._clock = tell, clock
        self._ticks = 0
        self.stand = Stand()
        self.vitals = Vitals()

    @property
    def rung(self) -> str:
        """The rung of the ladder that is taken, empty for none."""
        return self._config.ladder[self.stand.level - 1] if self.stand.level else ""

    @property
    def paused(self) -> str:
        """Why all sources are paused, empty while they are not."""
        return self.stand.cause if self.rung == PAUSE else ""

    def tick(self) -> None:
        """Called once a second."""
        self._ticks += 1
        if self._ticks % LOOK_EVERY_TICKS:
            return
        self.vitals = self._read()
        if not self._config.enabled:
            return
        before, now_s = self.stand, self._clock()
        self.stand = decide(self._config, before, self.vitals, now_s)
        if self.stand.level == before.level:
            return
        share = divisor(self.rung) if self.rung else 1
        for source in self._sources:
            source.set_pace(0 if self.rung == PAUSE else int(share))
        down = self.stand.level > before.level
        log.log(
            logging.WARNING if down else logging.INFO,
            "governor: %s%s",
            self.rung or "full rate",
            f": {self.stand.cause}" if down else "",
        )
        figures = {k: v for k, v in asdict(self.vitals).items() if v not in (None, ())}
        self._tell({"rung": self.rung, "level": self.stand.level, "cause": self.stand.cause, **figures})

    def status(self) -> dict[str, Any]:
        """The governor's section of the status document."""
        return {
            "enabled": self._config.enabled,
            "level": self.stand.level,
            "rung": self.rung,
            "cause": self.stand.cause,
            "ladder": list(self._config.ladder),
            "hot_c": self._config.hot_c,
            "vitals": {**asdict(self.vitals), "throttled": list(self.vitals.throttled)},
        }

    def conditions(self) -> list[dict[str, str]]:
        """What a person should know while a rung is taken."""
        if not self.rung:
            return []
        what = (
            "all sources are paused" if self.rung == PAUSE else f"sources give one of {int(divisor(self.rung))} frames"
        )
        message = f"{what}: {self.stand.cause}; {self.stand.remedy}, or see [governor] in agent.toml"
        return [{"type": "FullRate", "status": "False", "reason": "governed", "message": message}]


def governor_of(config: GovernorConfig, sources: Iterable[Paced], tell: Callable[[dict[str, Any]], None]) -> Governor:
    """The governor of this board."""
    reader = VitalsReader()
    if config.enabled and not acts_on(config, reader.tells):
        log.info("governor: it never acts, because it looks at nothing that this board tells")
    return Governor(config, reader.read, sources, tell=tell, clock=time.monotonic)
