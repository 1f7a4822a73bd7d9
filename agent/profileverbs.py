"""`edge-agent profile`: which profile this device has and why, and which profiles there are.

Works with and without a daemon, and without `agent.toml`; where that names a profile, it is the one explained.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent import config, profile, screen
from agent.board import read_board
from agent.errors import ConfigError, Reason
from agent.explain import explain

MATCHED, NOT_MATCHED = "+", "-"


def run(args: argparse.Namespace) -> int:
    """One `profile` command.

    Raises:
        ConfigError: `bad_profile`, `bad_usage`; `bad_config` of an `agent.toml` that is there and broken.
    """
    if args.root is not None and not args.root.is_dir():
        raise ConfigError(Reason.BAD_USAGE, f"{args.root} is not a folder", hint="name one with proc and sys in it")
    profiles, accessories = profile.load_all(), profile.load_accessories()
    root: Path = args.root or Path("/")
    board = read_board(root)
    if args.action == "list":
        return _list(args, profiles, accessories)
    own = _configured(args.config) if args.root is None else None
    recognised = profile.examine("auto" if own is None else own.profile, profiles, accessories, board)
    python, governor = (None, None) if own is None else (own.worker_python, own.governor)
    document = explain(recognised, profiles, accessories, root=root, python=python, governor=governor)
    document["root"], document["config"] = str(root), "" if own is None else str(args.config)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        _show(document)
    return 0


def _configured(path: Path) -> config.Config | None:
    """What agent.toml says, which only its owner and the daemon may read; a board has a profile without it, too."""
    return config.load(path) if os.access(path, os.R_OK) else None


def _list(
    args: argparse.Namespace, profiles: Mapping[str, profile.Profile], accessories: Mapping[str, profile.Accessory]
) -> int:
    rows = [
        {
            "profile": p.name,
            "title": p.title,
            "recognition": p.recognition,
            "delegates": list(p.delegates),
            "accessories": [a for a in p.accessories if a in accessories],
            "hardware": [c.claim for c in p.ledger if c.run == "hardware"],
            "emulation": [c.claim for c in p.ledger if c.run == "emulation"],
        }
        for p in sorted(profiles.values(), key=lambda p: p.name)
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(f"{row['profile']:<18} {row['title']}  [recognition {row['recognition']}]")
        print(f"{'':<18} delegates    {', '.join(row['delegates'])}")
        if row["accessories"]:
            print(f"{'':<18} accessories  {', '.join(row['accessories'])}")
        for where in ("hardware", "emulation"):
            if row[where]:
                print(f"{'':<18} run on {where}: {', '.join(row[where])}")
    return 0


def _show(document: Mapping[str, Any]) -> None:
    said = screen.printable
    board = document["board"]
    print(f"profile    {document['profile']}  {document['title']}")
    print(f"because    {said(document['evidence'])}")
    print(f"board      {said(board['machine'])} {said(board['model'] or ', '.join(board['dmi']))}".rstrip())
    for key in ("compatible", "cpu", "pci", "usb"):
        if board[key]:
            print(f"           {key:<10} {said(', '.join(board[key]))}")
    if document["root"] == "/":
        print(f"config     {said(document['config']) or 'none was read: profile and governor are as without one'}")
    for fact in document["facts"]:
        _show_fact(fact)
    if not document["fits"]:
        other = ", ".join(document["also_fit"]) or "no other"
        print(f"attention  this board does not show what {document['profile']} asks for; it fits {other}")
    elif document["also_fit"]:
        print(f"also fit   {', '.join(document['also_fit'])}: none asks for more")
    for accessory in document["accessories"]:
        mark = MATCHED if accessory["plugged"] else NOT_MATCHED
        print(f"accessory  {mark} {accessory['name']}  {accessory['title']}")
        if accessory["plugged"]:
            for fact in accessory["facts"]:
                _show_fact(fact)
            print(f"           {accessory['note']}")
    for delegate in document["delegates"]:
        mark = {True: MATCHED, False: NOT_MATCHED, None: "?"}[delegate["possible"]]
        alone = "  (one process alone)" if delegate["name"] in document["exclusive"] else ""
        missing = f"  missing: {'; '.join(delegate['missing'])}" if delegate["missing"] else ""
        print(f"delegate   {mark} {delegate['name']}{alone}{missing}")
    if document["camera"]:
        keys = "  ".join(f"{key} = {json.dumps(value)}" for key, value in document["camera"].items())
        print(f"camera     {said(keys)}")
    for note in document["notes"]:
        print(f"note       {note}")
    if document["root"] == "/" or document["governor"]["board_tells"]:
        print(f"governor   {said(_governor(document['governor']))}")
    limits = document["limits"]
    hot = f", {limits['temperature_c']:g} °C" if limits["temperature_c"] else ""
    print(f"limits     {limits['threads']} thread(s) for a model{hot}")
    print(f"known      recognition {document['recognition']}: {_RECOGNITION[document['recognition']]}")
    for claim in document["ledger"]:
        when = f" on {claim['date']} by {claim['by']}" if claim["run"] != "never" else ""
        print(f"           {claim['claim']:<16} {_RUN[claim['run']]}{when}")


def _governor(governor: Mapping[str, Any]) -> str:
    if not governor["enabled"]:
        return "switched off"
    if not governor["acts_on"]:
        told = ", ".join(governor["board_tells"]) or "nothing"
        return f"never acts: it looks at nothing that this board tells ({told})"
    hot = f", hot from {governor['hot_c']:g} °C" if governor["hot_c"] else ""
    return f"looks at {', '.join(governor['acts_on'])}{hot}; ladder {', '.join(governor['ladder'])}"


_RECOGNITION = {
    "captured": "tested with files from such a board",
    "assembled": "tested with published dumps of such a board",
    "untested": "its facts are published, no dump of such a board was at hand",
}
_RUN = {"hardware": "run on the hardware", "emulation": "run under emulation", "never": "never run"}


def _show_fact(fact: Mapping[str, Any]) -> None:
    mark = MATCHED if fact["seen"] else NOT_MATCHED
    value = screen.printable(fact["seen"]) or " or ".join(fact["any"][:3]) + (" …" if len(fact["any"]) > 3 else "")
    needed = "" if fact["needed"] else ", not needed"
    print(f"fact       {mark} {fact['kind']} {value}{needed}  [{fact['source']}]")
