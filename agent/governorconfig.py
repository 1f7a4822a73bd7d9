"""How a device saves itself from heat, a weak supply or overload: the `[governor]` table of profiles and `agent.toml`.

What is done with them is `agent.daemon.governor`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from agent.configtable import Table

PAUSE = "pause"
MAX_DIVISOR = 100
_FPS = re.compile(r"fps/([1-9][0-9]{0,2})")


@dataclass(frozen=True, slots=True)
class GovernorConfig:
    """Thresholds above which a rung of `ladder` is taken, and below which it is left again; 0 leaves one out.

    `hot_c` and `cool_c` are of the hottest thermal zone; `pressure_percent` is the share of the last ten seconds in
    which a task waited for a processor, `power_w` what the board draws, `battery_percent` what is left without mains. A
    rung stays for at least `hold_s`; the way back up takes `recover_s` below the thresholds. `ladder` holds `fps/N`,
    which divides the frame rate of every source, and `pause`, which stops them.
    """

    enabled: bool = True
    hot_c: float = 0.0
    cool_c: float = 0.0
    pressure_percent: float = 0.0
    power_w: float = 0.0
    battery_percent: float = 0.0
    hold_s: float = 0.0
    recover_s: float = 0.0
    ladder: tuple[str, ...] = ()


DEFAULT = GovernorConfig(hold_s=10.0, recover_s=120.0, ladder=("fps/2", "fps/4", PAUSE))
"""Where neither profile nor agent.toml says otherwise."""


def parse_governor(table: Table) -> GovernorConfig:
    """Check a `[governor]` table; what it leaves out is 0 or empty.

    Raises:
        ConfigError: as `Table`.
    """
    config = GovernorConfig(
        enabled=table.flag("enabled", True),
        hot_c=table.number("hot_c", 0, 0, 150),
        cool_c=table.number("cool_c", 0, 0, 150),
        pressure_percent=table.number("pressure_percent", 0, 0, 100),
        power_w=table.number("power_w", 0, 0, 10000),
        battery_percent=table.number("battery_percent", 0, 0, 100),
        hold_s=table.number("hold_s", 0, 0, 3600),
        recover_s=table.number("recover_s", 0, 0, 86400),
        ladder=tuple(table.parsed("ladder", divisor)),
    )
    table.finish()
    if config.hot_c and config.cool_c >= config.hot_c:
        raise table.bad(f"cool_c = {config.cool_c:g} is not below hot_c = {config.hot_c:g}", "lower cool_c")
    steps = [divisor(rung) for rung in config.ladder]
    if any(a >= b for a, b in pairwise(steps)):
        raise table.bad("ladder: a rung saves no more than the one before it", 'such as ["fps/2", "fps/4", "pause"]')
    return config


def divisor(rung: str) -> float:
    """By how much a rung divides the frame rate; infinity for `pause`.

    Raises:
        ValueError: it is no rung.
    """
    if rung == PAUSE:
        return float("inf")
    match = _FPS.fullmatch(rung)
    if match is None or not 2 <= int(match[1]) <= MAX_DIVISOR:
        raise ValueError(f"{rung!r} is neither fps/N, N from 2 to {MAX_DIVISOR}, nor {PAUSE}")
    return float(match[1])


def merged(profile: GovernorConfig, own: GovernorConfig) -> GovernorConfig:
    """What holds on this device: its own settings, then its profile's, then the defaults. A `cool_c` that is not below
    the `hot_c` of another layer is left out: between both there would be no room.
    """
    result = DEFAULT
    for layer in (profile, own):
        said = {f.name: value for f in fields(layer) if (value := getattr(layer, f.name)) and f.name != "enabled"}
        result = replace(result, **said)
    if result.hot_c and result.cool_c >= result.hot_c:
        result = replace(result, cool_c=0.0)
    return replace(result, enabled=profile.enabled and own.enabled)
