"""What the board says of its own well-being: temperature, throttling, power, pressure. It reads and decides nothing.

Every figure is None, or empty, where the board does not tell; reads are of /sys and /proc, bounded, and never raise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 4096
# below it a trip point is not one of a processor, above it none at all: drivers leave odd values in unused ones
SANE_C = (40.0, 150.0)
# what a thermometer may read: a dead one says -274, or what its bits are
READABLE_C = (-60.0, 150.0)
# Raspberry Pi firmware, live bits: kernel commit be3035e3627d, and bit 3 of the vcgencmd documentation
THROTTLED_BITS = ("under_voltage", "frequency_capped", "throttled", "soft_limit")
# cooling devices that slow the processor down; others turn a fan
SLOWING = ("thermal-cpufreq", "cpufreq", "Processor")


@dataclass(frozen=True, slots=True)
class Vitals:
    """One look at the board.

    `temperature_c` is the hottest zone's; `headroom_k` what the zone that is closest has left to the temperature at
    which the kernel switches off; `throttled` why the processor is slowed down now, by names of `THROTTLED_BITS` or
    `cooling`; `pressure_percent` the share of the last ten seconds in which a task waited for a processor; `power_w`
    what the board's own meter reads; `battery_percent` what is left, only while nothing else feeds the board;
    `processor_mhz` the fastest core's clock.
    """

    temperature_c: float | None = None
    headroom_k: float | None = None
    throttled: tuple[str, ...] = ()
    pressure_percent: float | None = None
    power_w: float | None = None
    battery_percent: float | None = None
    processor_mhz: float | None = None


class VitalsReader:
    """Knows which files this board has; they are looked for once.

    Args:
        root: where proc and sys are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        thermal = root / "sys/class/thermal"
        self._zones = [(zone / "temp", _trips(zone)) for zone in sorted(thermal.glob("thermal_zone*"))]
        self._cooling = [
            device / "cur_state"
            for device in sorted(thermal.glob("cooling_device*"))
            if _text(device / "type").startswith(SLOWING)
        ]
        # the firmware's node is called soc:firmware on one board, and by its address on another
        self._throttled = sorted((root / "sys/devices/platform").glob("soc*/*firmware/get_throttled"))
        self._meters = _meters(root / "sys/class/hwmon")
        self._supplies = sorted((root / "sys/class/power_supply").glob("*"))
        self._clocks = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*/scaling_cur_freq"))
        self._pressure = root / "proc/pressure/cpu"

    @property
    def tells(self) -> tuple[str, ...]:
        """Which figures this board has files for; empty for one that tells nothing."""
        there = {
            "temperature": self._zones,
            "headroom": any(trips for _, trips in self._zones),
            "throttling": self._throttled or self._cooling,
            "pressure": self._pressure.exists(),
            "power": self._meters,
            "battery": any(_text(s / "type") == "Battery" and _text(s / "scope") != "Device" for s in self._supplies),
        }
        return tuple(name for name, found in there.items() if found)

    def read(self) -> Vitals:
        """One look."""
        degrees = [(t, trips) for path, trips in self._zones if (t := _celsius(path)) is not None]
        clocks = [khz for path in self._clocks if (khz := _number(path)) is not None]
        return Vitals(
            temperature_c=max((t for t, _ in degrees), default=None),
            headroom_k=min((trip - t for t, trips in degrees for trip in trips), default=None),
            throttled=self._reasons(),
            pressure_percent=_pressure(_text(self._pressure)),
            power_w=next((watts for meter in self._meters if (watts := meter.watts()) is not None), None),
            battery_percent=self._battery(),
            processor_mhz=max(clocks) / 1000 if clocks else None,
        )

    def _reasons(self) -> tuple[str, ...]:
        found = []
        for path in self._throttled:
            try:
                bits = int(_text(path), 16)
            except ValueError:
                continue
            found += [name for bit, name in enumerate(THROTTLED_BITS) if bits >> bit & 1]
        if any((_number(path) or 0) > 0 for path in self._cooling):
            found.append("cooling")
        return tuple(dict.fromkeys(found))

    def _battery(self) -> float | None:
        """What the emptiest battery has left, unless something else feeds the board."""
        left = []
        for supply in self._supplies:
            if _text(supply / "scope") == "Device":
                continue  # a mouse's or a headset's, not the board's
            if _text(supply / "type") == "Battery":
                share = _number(supply / "capacity")
                if _text(supply / "status") == "Discharging" and share is not None and 0 <= share <= 100:
                    left.append(share)
            elif _number(supply / "online") == 1:
                return None
        return min(left, default=None)


@dataclass(frozen=True, slots=True)
class _Meter:
    """A power meter: in microwatts, or as millivolts and milliamperes."""

    factors: tuple[Path, ...]
    scale: float

    def watts(self) -> float | None:
        product = self.scale
        for path in self.factors:
            number = _number(path)
            if number is None:
                return None
            product *= number
        return product


def _meters(hwmon: Path) -> list[_Meter]:
    found = []
    for chip in sorted(hwmon.glob("hwmon*")):
        power = chip / "power1_input"
        if power.exists():
            found.append(_Meter((power,), 1e-6))
        elif _text(chip / "name") == "ina3221" and (chip / "curr1_input").exists():
            # a Jetson's first channel is the whole board's input
            found.append(_Meter((chip / "in1_input", chip / "curr1_input"), 1e-6))
    return found


def _trips(zone: Path) -> tuple[float, ...]:
    """Where the kernel switches off, °C."""
    found = []
    for path in sorted(zone.glob("trip_point_*_temp")):
        kind, number = _text(path.with_name(path.name.removesuffix("temp") + "type")), _number(path)
        if kind in ("hot", "critical") and number is not None and SANE_C[0] <= number / 1000 <= SANE_C[1]:
            found.append(number / 1000)
    return tuple(found)


def _pressure(text: str) -> float | None:
    """`some avg10=12.34 …` as 12.34 (kernel Documentation/accounting/psi.rst)."""
    for word in text.split():
        if word.startswith("avg10="):
            try:
                return float(word.removeprefix("avg10="))
            except ValueError:
                return None
    return None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _celsius(path: Path) -> float | None:
    number = _number(path)
    return number / 1000 if number is not None and READABLE_C[0] <= number / 1000 <= READABLE_C[1] else None


def _number(path: Path) -> float | None:
    try:
        return float(int(_text(path)))
    except (ValueError, OverflowError):
        return None
