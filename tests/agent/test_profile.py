"""Device profiles: whose files lead to which one, where each fact is from, and that the ledger claims what was run."""

from __future__ import annotations

import itertools
import json
import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import cli, explain, profile, profileverbs
from agent.board import Board, read_board
from agent.errors import ConfigError, Reason
from agent.worker.delegates import DELEGATES as WORKER_DELEGATES

ROOT = Path(__file__).resolve().parents[2]
BOARDS = ROOT / "tests" / "vectors" / "boards"
PROFILES = profile.load_all()
ACCESSORIES = profile.load_accessories()
# folder of a fixture: its profile, and what is plugged in
EXPECTED: dict[str, tuple[str, list[str]]] = {
    "generic-x86_64": ("generic-x86_64", []),
    "generic-aarch64": ("generic-aarch64", []),
    "raspberry-pi-4": ("raspberry-pi-4", []),
    "raspberry-pi-4-coral-usb": ("raspberry-pi-4", ["coral-usb"]),
    "raspberry-pi-cm4": ("raspberry-pi-4", []),
    "raspberry-pi-5": ("raspberry-pi-5", []),
    "raspberry-pi-5-coral-pcie": ("raspberry-pi-5", ["coral-pcie"]),
    "raspberry-pi-5-hailo-8l": ("raspberry-pi-5", ["hailo-8"]),
    "jetson-orin-nano": ("jetson-orin-nano", []),
    "jetson-agx-orin": ("jetson-agx-orin", []),
    "jetson-agx-orin-64gb": ("jetson-agx-orin", []),
    "intel-core-ultra": ("intel-core-ultra", []),
    "intel-n100": ("intel-n100", []),
}
ASKED = {
    *("generic-x86_64", "generic-aarch64", "raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano", "jetson-orin-nx"),
    *("jetson-agx-orin", "intel-core-ultra", "intel-n100", "rk3588", "imx8mplus"),
}


def recognised(board: str) -> profile.Recognised:
    return profile.examine("auto", PROFILES, ACCESSORIES, read_board(BOARDS / board))


# --- recognition -----------------------------------------------------------------------------------------------------


def test_there_is_a_profile_for_every_board_that_is_promised() -> None:
    assert PROFILES.keys() == ASKED


def test_every_fixture_is_expected_somewhere_and_names_where_it_is_from() -> None:
    assert {p.name for p in BOARDS.iterdir()} == EXPECTED.keys()
    for board in EXPECTED:
        text = (BOARDS / board / "README.md").read_text()
        assert "https://github.com/" in text or "Captured on" in text, board


@pytest.mark.parametrize("board", EXPECTED)
def test_a_board_is_recognised_by_its_files(board: str) -> None:
    found = recognised(board)
    assert (found.profile.name, [a.name for a in found.accessories]) == EXPECTED[board]


@pytest.mark.parametrize("board", EXPECTED)
def test_no_board_fits_two_narrow_profiles(board: str) -> None:
    fitting = [p.name for p in PROFILES.values() if p.narrowness and p.fits(read_board(BOARDS / board))]
    assert len(fitting) <= 1


@pytest.mark.parametrize("name", sorted(ASKED))
def test_recognition_is_called_untested_exactly_when_there_is_no_fixture(name: str) -> None:
    fixtures = [board for board, (expected, _) in EXPECTED.items() if expected == name]
    assert (PROFILES[name].recognition == "untested") == (not fixtures)


def test_files_called_captured_say_so() -> None:
    for board, (name, _) in EXPECTED.items():
        captured = "Captured on" in (BOARDS / board / "README.md").read_text()
        assert captured == (PROFILES[name].recognition == "captured"), board


@pytest.mark.parametrize("name", sorted(ASKED))
def test_a_board_that_shows_the_needed_facts_has_this_profile_and_no_other(name: str) -> None:
    chosen = PROFILES[name]
    needed = [fact for fact in chosen.facts if fact.needed]
    for machine, values in itertools.product(chosen.machines, itertools.product(*(fact.values for fact in needed))):
        shown: dict[str, Any] = {"machine": machine}
        for fact, value in zip(needed, values, strict=True):
            shown[fact.kind] = value if fact.kind == "model" else (value,)
        board = Board(**shown)
        assert profile.examine("auto", PROFILES, ACCESSORIES, board).profile.name == name
        assert [p.name for p in PROFILES.values() if p.narrowness and p.fits(board)] in ([name], [])


def test_a_board_of_another_instruction_set_is_not_taken_for_one_by_its_facts() -> None:
    board = replace(read_board(BOARDS / "raspberry-pi-5"), machine="x86_64")
    assert profile.examine("auto", PROFILES, ACCESSORIES, board).profile.name == "generic-x86_64"


def test_a_board_without_any_file_is_taken_by_its_instruction_set_alone(tmp_path: Path) -> None:
    board = read_board(tmp_path)
    assert board == Board()
    assert profile.examine("auto", PROFILES, ACCESSORIES, replace(board, machine="aarch64")).evidence == (
        "machine aarch64"
    )
    with pytest.raises(ConfigError, match="no profile fits") as refusal:
        profile.examine("auto", PROFILES, ACCESSORIES, replace(board, machine="riscv64"))
    assert refusal.value.reason is Reason.BAD_PROFILE


def test_a_profile_that_is_named_is_taken_as_it_is() -> None:
    found = profile.examine("rk3588", PROFILES, ACCESSORIES, read_board(BOARDS / "raspberry-pi-5-coral-pcie"))
    assert (found.profile.name, found.evidence) == ("rk3588", "named in agent.toml")
    assert found.profile.delegates[0] == "litert:edgetpu"
    with pytest.raises(ConfigError, match="does not exist"):
        profile.examine("raspberry-pi-6", PROFILES, ACCESSORIES, Board())


def test_an_accelerator_that_is_plugged_in_leads_the_ladder_and_is_for_one_process() -> None:
    bare, with_coral = recognised("raspberry-pi-4").profile, recognised("raspberry-pi-4-coral-usb").profile
    assert with_coral.delegates == ("litert:edgetpu", *bare.delegates)
    assert (bare.exclusive, with_coral.exclusive) == ((), ("litert:edgetpu",))


def test_an_accelerator_without_support_is_named_and_adds_nothing() -> None:
    bare, with_hailo = recognised("raspberry-pi-5"), recognised("raspberry-pi-5-hailo-8l")
    assert with_hailo.profile.delegates == bare.profile.delegates
    assert "Nothing of this program runs on it" in with_hailo.accessories[0].note


def test_an_intel_npu_is_found_by_its_pci_id() -> None:
    board = replace(read_board(BOARDS / "intel-core-ultra"), pci=frozenset({"8086:7d1d"}))
    assert profile.examine("auto", PROFILES, ACCESSORIES, board).profile.delegates[0] == "openvino:npu"


def test_a_file_without_end_and_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "proc" / "device-tree" / "compatible").write_bytes(b"\xff\xfe\0raspberrypi,5-model-b\0")
    (tmp_path / "proc" / "device-tree" / "model").symlink_to("/dev/zero")
    (tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:00:00.0").mkdir(parents=True)
    (tmp_path / "sys" / "bus" / "usb").mkdir()
    (tmp_path / "sys" / "bus" / "usb" / "devices").symlink_to("devices")
    os.mkfifo(tmp_path / "proc" / "cpuinfo")
    board = read_board(tmp_path)
    assert "raspberrypi,5-model-b" in board.compatible
    assert (board.model, board.pci, board.usb, board.cpu) == ("", frozenset(), frozenset(), ())


def test_the_device_tree_is_read_where_the_kernel_has_it_too(tmp_path: Path) -> None:
    base = tmp_path / "sys" / "firmware" / "devicetree" / "base"
    base.mkdir(parents=True)
    (base / "compatible").write_bytes(b"fsl,imx8mp-evk\0fsl,imx8mp\0")
    assert read_board(tmp_path).compatible == ("fsl,imx8mp-evk", "fsl,imx8mp")


def test_dmi_tells_a_board_by_a_part_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "sys" / "class" / "dmi" / "id").mkdir(parents=True)
    (tmp_path / "sys" / "class" / "dmi" / "id" / "product_name").write_text("LattePanda Mu\n")
    fact = profile.Fact("dmi", ("LattePanda",), "a document", needed=True)
    assert fact.seen(read_board(tmp_path)) == "LattePanda Mu"


# --- sources and ledger ----------------------------------------------------------------------------------------------

SOURCE = re.compile(r"https://\S+|Linux (\S+ )?(arch|drivers)/\S+|pci\.ids, vendor [0-9a-f]{4}|usb\.ids, vendor")


def _facts() -> list[tuple[str, profile.Fact]]:
    own = [(p.name, fact) for p in PROFILES.values() for fact in p.facts]
    return own + [(a.name, fact) for a in ACCESSORIES.values() for fact in a.facts]


@pytest.mark.parametrize(("owner", "fact"), _facts(), ids=lambda v: v if isinstance(v, str) else v.kind)
def test_every_fact_names_a_public_document(owner: str, fact: profile.Fact) -> None:
    assert SOURCE.search(fact.source), f"{owner}: {fact}"
    assert fact.values
    if fact.kind in ("pci", "usb"):
        assert all(re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{4}", value) for value in fact.values)


@pytest.mark.parametrize("name", sorted(ASKED))
def test_the_ledger_has_one_line_for_each_claim_and_says_what_ran_it(name: str) -> None:
    chosen = PROFILES[name]
    brought = {d for a in chosen.accessories for d in ACCESSORIES[a].delegates}
    claims = [line.claim for line in chosen.ledger]
    assert sorted(claims) == sorted({"recognition", "camera", "governor", *chosen.delegates, *brought})
    for line in chosen.ledger:
        if line.run == "never":
            assert (line.date, line.by) == ("", "")
            continue
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", line.date)
        first = line.by.split()[0]
        assert first in ("edge-agent", "make") or (ROOT / first).exists(), line


def test_a_board_that_is_only_known_from_documents_claims_nothing_of_its_hardware() -> None:
    for chosen in PROFILES.values():
        if chosen.recognition != "captured":
            assert not [line for line in chosen.ledger if line.run == "hardware"], chosen.name


def test_every_profile_has_a_camera_to_start_from() -> None:
    assert all(chosen.camera for chosen in PROFILES.values())


def test_every_delegate_of_every_ladder_exists_here_and_in_the_worker() -> None:
    used = {d for p in PROFILES.values() for d in p.delegates} | {d for a in ACCESSORIES.values() for d in a.delegates}
    assert used <= profile.DELEGATES.keys()
    assert profile.DELEGATES.keys() == WORKER_DELEGATES.keys()
    assert profile.DELEGATES.keys() <= explain.NEEDS.keys()


def test_what_a_delegate_needs_is_what_the_worker_looks_for() -> None:
    external = pytest.importorskip("agent.worker.delegates.external", exc_type=ImportError)
    for name, library in external.LIBRARIES.items():
        names = {Path(pattern).name for pattern in explain.NEEDS[name].libraries}
        assert names == {Path(library.path).name}


# --- the files -------------------------------------------------------------------------------------------------------


def _valid(value: Any, schema: dict[str, Any], defs: dict[str, Any], where: str) -> list[str]:
    """What is wrong with `value`, for the few words of JSON Schema that schema.json uses."""
    if "$ref" in schema:
        return _valid(value, defs[schema["$ref"].rsplit("/", 1)[-1]], defs, where)
    if "oneOf" in schema:
        fits = [s for s in schema["oneOf"] if not _valid(value, s, defs, where)]
        return [] if len(fits) == 1 else [f"{where}: fits {len(fits)} of the alternatives"]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where}: {value!r} is not one of {schema['enum']}"]
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
    }
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{where}: {value!r} is not {schema['type']}"]
    wrong = []
    if schema["type"] == "object" and "properties" in schema:
        wrong += [f"{where}: {key} is missing" for key in schema.get("required", ()) if key not in value]
        wrong += [f"{where}: {key} is unknown" for key in value if key not in schema["properties"]]
        known = [key for key in value if key in schema["properties"]]
        wrong += [w for k in known for w in _valid(value[k], schema["properties"][k], defs, f"{where}.{k}")]
    elif schema["type"] == "array":
        wrong += [w for i, item in enumerate(value) for w in _valid(item, schema["items"], defs, f"{where}[{i}]")]
    elif schema["type"] == "string" and not re.search(schema.get("pattern", ""), value):
        wrong.append(f"{where}: {value!r} does not match {schema['pattern']}")
    elif "minimum" in schema and value < schema["minimum"]:
        wrong.append(f"{where}: {value} is below {schema['minimum']}")
    return wrong


@pytest.mark.parametrize("path", sorted(profile.folder().glob("*.toml")), ids=lambda p: p.name)
def test_every_file_is_as_the_schema_says(path: Path) -> None:
    schema = json.loads((profile.folder() / "schema.json").read_text())
    data = tomllib.loads(path.read_text())
    assert _valid(data, schema["$defs"]["accessories" if "accessory" in data else "profile"], schema["$defs"], "") == []
    assert path.read_text().startswith("#:schema ./schema.json\n")


def test_the_schema_knows_the_words_that_the_parser_knows() -> None:
    defs = json.loads((profile.folder() / "schema.json").read_text())["$defs"]
    assert tuple(defs["fact"]["properties"]["kind"]["enum"]) == profile.FACT_KINDS
    assert tuple(defs["profile"]["properties"]["recognition"]["enum"]) == profile.RECOGNITIONS
    assert tuple(defs["claim"]["properties"]["run"]["enum"]) == profile.RUNS
    assert all(re.search(defs["delegate"]["pattern"], name) for name in profile.DELEGATES)


MINIMAL: dict[str, Any] = {
    "name": "b", "title": "a board", "recognition": "untested", "recognise": {"machine": ["x86_64"]},
    "delegates": ["onnx:cpu"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nmae": "b"}, "unknown key 'nmae'"),
        ({"delegates": ["onnx:gpu"]}, "onnx:gpu"),
        ({"delegates": []}, "delegates is empty"),
        ({"exclusive": ["onnx:cuda"]}, "onnx:cuda"),
        ({"recognition": "guessed"}, "guessed"),
        ({"ledger": [{"claim": "onnx:cpu", "run": "hardware"}]}, "not when nor by what"),
        ({"ledger": [{"claim": "onnx:cpu", "run": "sometimes"}]}, "sometimes"),
        ({"recognise": {"machine": ["x86_64"], "fact": [{"kind": "smell", "any": ["x"], "source": "s"}]}}, "smell"),
        ({"recognise": {"machine": ["x86_64"], "fact": [{"kind": "cpu", "any": ["x"]}]}}, "source is missing"),
        ({"camera": {"kind": "no such kind"}}, "no such kind"),
        ({"governor": {"ladder": ["fps/1"]}}, "fps/1"),
        ({"limits": {"threads": 0}}, "threads"),
        ({"zygote": "yes"}, "zygote"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_profile_that_is_wrong_is_refused_with_the_key_that_is(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refusal:
        profile.parse({**MINIMAL, **change}, "b.toml")
    assert refusal.value.reason is Reason.BAD_PROFILE
    assert refusal.value.message.startswith("b.toml")


def test_switches_are_off_where_a_profile_says_nothing() -> None:
    parsed = profile.parse(MINIMAL, "b.toml")
    assert (parsed.zygote, parsed.fused, parsed.python, parsed.exclusive) == (False, False, None, ())
    assert profile.parse({**MINIMAL, "zygote": True, "python": "/usr/bin/python3"}, "b.toml").zygote


def test_the_reference_lists_every_profile_and_accessory_as_it_is() -> None:
    text = (ROOT / "docs" / "reference" / "profiles.md").read_text()
    for chosen in PROFILES.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{chosen.name}` |"))
        assert chosen.title in row
        assert row.endswith(f"| {chosen.recognition} |")
    for accessory in ACCESSORIES.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{accessory.name}` |"))
        for word in (*(value for fact in accessory.facts for value in fact.values), *accessory.delegates):
            assert f"`{word}`" in row
        assert ("for one process alone" in row) == bool(accessory.exclusive)


# --- edge-agent profile ----------------------------------------------------------------------------------------------


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert cli.main(["profile", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_explain_shows_what_was_seen_and_what_not(capsys: pytest.CaptureFixture[str]) -> None:
    told = asked(capsys, "explain", "--root", str(BOARDS / "raspberry-pi-5-hailo-8l"))
    assert told["profile"] == "raspberry-pi-5"
    assert [f["seen"] for f in told["facts"]] == [
        "raspberrypi,5-model-b", "Raspberry Pi 5 Model B Rev 1.0", "asimddp",
    ]  # fmt: skip
    assert all(f["source"] for f in told["facts"])
    assert {a["name"]: a["plugged"] for a in told["accessories"]} == {
        "coral-usb": False, "coral-pcie": False, "hailo-8": True,
    }  # fmt: skip
    assert told["also_fit"] == ["generic-aarch64"]
    assert {line["run"] for line in told["ledger"]} == {"never"}


def test_explain_says_what_each_delegate_lacks(tmp_path: Path) -> None:
    chosen = replace(PROFILES["generic-x86_64"], delegates=("litert:vx", "onnx:cpu", "openvino:npu"))
    (tmp_path / "usr" / "lib").mkdir(parents=True)
    told = {d["name"]: d["missing"] for d in explain.delegates(chosen, tmp_path)}
    assert told["litert:vx"] == ["library /usr/lib/libvx_delegate.so", "device /dev/galcore"]
    assert told["openvino:npu"] == ["device /dev/accel/accel*"]
    (tmp_path / "usr" / "lib" / "libvx_delegate.so").touch()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "galcore").touch()
    assert {d["name"]: d["missing"] for d in explain.delegates(chosen, tmp_path)}["litert:vx"] == []


def test_explain_asks_the_workers_interpreter_and_imports_nothing(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho onnxruntime /nowhere\n")
    other.chmod(0o755)
    chosen = replace(PROFILES["generic-x86_64"], delegates=("onnx:cpu", "onnx:cuda", "openvino:cpu"), python=other)
    told = {d["name"]: d for d in explain.delegates(chosen, Path("/"))}
    assert told["onnx:cpu"]["possible"]
    assert "capi/libonnxruntime_providers_cuda.so in onnxruntime" in told["onnx:cuda"]["missing"]
    assert told["openvino:cpu"]["missing"] == ["Python package openvino"]
    gone = replace(chosen, python=tmp_path / "gone")
    for rung in explain.delegates(gone, Path("/")):
        assert not rung["possible"]
        assert rung["missing"] == [f"interpreter {gone.python}, or it does not start"]


def test_explain_takes_the_profile_that_agent_toml_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('profile = "rk3588"\n')
    told = asked(capsys, "explain", "--config", str(path))
    assert (told["profile"], told["evidence"]) == ("rk3588", "named in agent.toml")
    assert told["config"] == str(path)


def test_explain_warns_of_a_profile_that_is_named_for_another_board(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profileverbs, "read_board", lambda _: read_board(BOARDS / "raspberry-pi-5"))
    path = tmp_path / "agent.toml"
    path.write_text('profile = "rk3588"\n')
    assert cli.main(["profile", "explain", "--config", str(path)]) == 0
    text = capsys.readouterr().out
    assert "does not show what rk3588 asks for; it fits generic-aarch64, raspberry-pi-5" in text
    assert "also fit" not in text


def test_explain_says_what_the_governor_goes_by_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zone = tmp_path / "sys" / "class" / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("61500\n")
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "proc" / "device-tree" / "model").write_bytes(b"Raspberry Pi 4 Model B Rev 1.1\0")
    assert cli.main(["profile", "explain", "--root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "governor   looks at temperature, hot from 78 °C; ladder fps/2, fps/4, pause" in text
    (tmp_path / "proc" / "device-tree" / "model").write_bytes(b"")
    (tmp_path / "proc" / "cpuinfo").write_text("CPU architecture: 8\n")
    assert cli.main(["profile", "explain", "--root", str(tmp_path)]) == 0
    assert "never acts: it looks at nothing that this board tells (temperature)" in capsys.readouterr().out


def test_explain_shows_the_governor_as_agent_toml_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('profile = "raspberry-pi-4"\n[governor]\nhot_c = 75\n')
    told = asked(capsys, "explain", "--config", str(path))["governor"]
    assert (told["hot_c"], told["cool_c"], told["recover_s"]) == (75, 70, 120)


@pytest.mark.parametrize("board", EXPECTED)
def test_a_person_is_told_every_fact_claim_and_delegate(board: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "explain", "--root", str(BOARDS / board)]) == 0
    text = capsys.readouterr().out
    chosen = recognised(board).profile
    assert f"profile    {chosen.name}" in text
    for word in (*chosen.delegates, *(line.claim for line in chosen.ledger), *(f.source for f in chosen.facts)):
        assert word in text


def test_list_names_every_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["profile"] for row in asked(capsys, "list")} == ASKED
    assert cli.main(["profile", "list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ASKED)


def test_a_root_that_is_no_folder_is_a_wrong_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "explain", "--root", str(tmp_path / "gone")]) == 64
    assert "is not a folder" in capsys.readouterr().err
