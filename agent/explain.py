"""Why this device has the profile it has, and which of its delegates can be expected to work.

It looks for files and imports no runtime. That everything a delegate needs is there is no proof that it computes: the
trial of a model says that.
"""

from __future__ import annotations

import glob
import importlib.util
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agent.daemon.governor import acts_on
from agent.daemon.vitals import VitalsReader
from agent.governorconfig import GovernorConfig, merged
from agent.profile import Accessory, Fact, Profile, Recognised

PYTHON_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Needs:
    """What has to be there for a delegate: one of `modules` (Python packages), in it one file of `files`, one of
    `libraries` (patterns below the root), and one of `nodes` (patterns below /dev). Empty where it needs none.
    """

    modules: tuple[str, ...]
    files: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


_TFLITE = ("ai_edge_litert", "tflite_runtime")
_LINKED = ("usr/lib/", "usr/lib/*-linux-gnu/", "usr/local/lib/", "lib/", "lib/*-linux-gnu/")
_NVIDIA = ("dev/nvidia0", "dev/nvmap")
_RENDER = ("dev/dri/renderD*",)
NEEDS: Mapping[str, Needs] = {
    "litert:xnnpack": Needs(("ai_edge_litert",)),
    "litert:cpu": Needs(("ai_edge_litert",)),
    "litert:edgetpu": Needs(
        _TFLITE,
        libraries=tuple(f"{where}libedgetpu.so.1" for where in _LINKED),
        nodes=("dev/apex_*", "dev/bus/usb/*/*"),
    ),
    "litert:ethosu": Needs(_TFLITE, libraries=("usr/lib/libethosu_delegate.so",), nodes=("dev/ethosu*",)),
    "litert:vx": Needs(_TFLITE, libraries=("usr/lib/libvx_delegate.so",), nodes=("dev/galcore",)),
    "tflite:cpu": Needs(("tflite_runtime",)),
    "onnx:cpu": Needs(("onnxruntime",)),
    "onnx:cuda": Needs(("onnxruntime",), files=("capi/libonnxruntime_providers_cuda.so",), nodes=_NVIDIA),
    "onnx:tensorrt": Needs(("onnxruntime",), files=("capi/libonnxruntime_providers_tensorrt.so",), nodes=_NVIDIA),
    "onnx:openvino": Needs(("onnxruntime",), files=("capi/libonnxruntime_providers_openvino.so",)),
    "onnx:qnn": Needs(("onnxruntime",), files=("capi/libonnxruntime_providers_qnn.so", "capi/libQnnHtp.so")),
    "openvino:cpu": Needs(
        ("openvino",), files=("libs/libopenvino_intel_cpu_plugin.so", "libs/libopenvino_arm_cpu_plugin.so")
    ),
    "openvino:gpu": Needs(("openvino",), files=("libs/libopenvino_intel_gpu_plugin.so",), nodes=_RENDER),
    "openvino:npu": Needs(("openvino",), files=("libs/libopenvino_intel_npu_plugin.so",), nodes=("dev/accel/accel*",)),
    "reference": Needs(("numpy",)),
}


def explain(
    recognised: Recognised,
    profiles: Mapping[str, Profile],
    accessories: Mapping[str, Accessory],
    *,
    root: Path = Path("/"),
    python: Path | None = None,
    governor: GovernorConfig | None = None,
) -> dict[str, Any]:
    """The whole account as a document for JSON. `python` is the workers' interpreter where agent.toml names one,
    `governor` what it says of that."""
    profile, board = recognised.profile, recognised.board
    heat, vitals = merged(profile.governor, governor or GovernorConfig()), VitalsReader(root)
    plugged = [accessory.name for accessory in recognised.accessories]
    return {
        "profile": profile.name,
        "title": profile.title,
        "evidence": recognised.evidence,
        "fits": profile.fits(board),
        "recognition": profile.recognition,
        "notes": list(profile.notes),
        "facts": [_fact(recognised, fact) for fact in profile.facts],
        "also_fit": sorted(p.name for p in profiles.values() if p.name != profile.name and p.fits(board)),
        "board": {
            "machine": board.machine,
            "model": board.model,
            "compatible": list(board.compatible),
            "dmi": list(board.dmi),
            "cpu": list(board.cpu),
            "pci": sorted(board.pci),
            "usb": sorted(board.usb),
        },
        "accessories": [
            {
                "name": name,
                "title": accessories[name].title,
                "plugged": name in plugged,
                "facts": [_fact(recognised, fact) for fact in accessories[name].facts],
                "delegates": list(accessories[name].delegates),
                "note": accessories[name].note,
            }
            for name in profile.accessories
            if name in accessories
        ],
        "delegates": delegates(replace(profile, python=python or profile.python), root),
        "exclusive": list(profile.exclusive),
        "limits": {"threads": profile.threads, "ram_mb": profile.ram_mb, "temperature_c": profile.temperature_c},
        "camera": dict(profile.camera),
        "python": str(python or profile.python or ""),
        "zygote": profile.zygote,
        "fused": profile.fused,
        "governor": {**asdict(heat), "acts_on": acts_on(heat, vitals.tells), "board_tells": list(vitals.tells)},
        "ledger": [asdict(claim) for claim in profile.ledger],
    }


def delegates(profile: Profile, root: Path) -> list[dict[str, Any]]:
    """The ladder, and for each rung whether what it needs is there and what is missing."""
    modules = {module for name in profile.delegates for module in NEEDS[name].modules}
    own = root == Path("/")
    found = _locations(profile.python, sorted(modules)) if own else {}
    if found is None:
        lost = f"interpreter {profile.python}, or it does not start"
        return [{"name": name, "missing": [lost], "possible": False} for name in profile.delegates]
    return [
        {"name": name, "missing": missing, "possible": not missing if own else None}
        for name in profile.delegates
        for missing in [[*(_missing_package(NEEDS[name], found) if own else []), *_missing_files(NEEDS[name], root)]]
    ]


def _fact(recognised: Recognised, fact: Fact) -> dict[str, Any]:
    shown = {"kind": fact.kind, "any": list(fact.values), "needed": fact.needed, "source": fact.source}
    return {**shown, "seen": fact.seen(recognised.board)}


def _missing_package(needs: Needs, found: Mapping[str, str]) -> list[str]:
    places = [Path(found[module]) for module in needs.modules if module in found]
    if not places:
        return [f"Python package {' or '.join(needs.modules)}"]
    if needs.files and not any((place / file).exists() for place in places for file in needs.files):
        return [f"{' or '.join(needs.files)} in {' or '.join(needs.modules)}"]
    return []


def _missing_files(needs: Needs, root: Path) -> list[str]:
    missing = []
    for what, patterns in (("library", needs.libraries), ("device", needs.nodes)):
        if patterns and not any(glob.glob(pattern, root_dir=root) for pattern in patterns):
            missing.append(f"{what} {' or '.join(dict.fromkeys('/' + p for p in _shortened(patterns)))}")
    return missing


def _shortened(patterns: Sequence[str]) -> Sequence[str]:
    """A library that the linker may find in several folders is told by the first of them."""
    return patterns[:1] if len({Path(p).name for p in patterns}) == 1 else patterns


def _locations(python: Path | None, modules: Sequence[str]) -> dict[str, str] | None:
    """Folder of each of `modules` that the workers' interpreter has, none of them imported; None where there is no
    interpreter that starts."""
    if python is None:
        specs = {module: importlib.util.find_spec(module) for module in modules}
        places = {m: list(s.submodule_search_locations or ()) for m, s in specs.items() if s is not None}
        return {module: folders[0] for module, folders in places.items() if folders}
    code = (
        "import importlib.util, sys\n"
        "specs = {m: importlib.util.find_spec(m) for m in sys.argv[1:]}\n"
        "places = {m: list(s.submodule_search_locations or ()) for m, s in specs.items() if s}\n"
        "print(*(m + ' ' + p[0] for m, p in places.items() if p), sep='\\n')\n"
    )
    try:
        done = subprocess.run(
            [python, "-I", "-c", code, *modules], capture_output=True, text=True, timeout=PYTHON_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    pairs = (line.partition(" ") for line in done.stdout.splitlines())
    return {module: place for module, _, place in pairs if module in modules and place}
