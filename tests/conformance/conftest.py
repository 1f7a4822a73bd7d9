from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.served import Commands, Server, Site


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync is worth is tested in tests/crash; here it would cost more than everything else."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def command(tmp_path: Path, server: Server, site: Site) -> Commands:
    """An initialised client of `site`."""
    commands = Commands(tmp_path / "client", server, site)
    assert commands.init() == 0
    return commands


MakeCommand = Callable[[Site], Commands]


@pytest.fixture
def command_for(tmp_path: Path, server: Server) -> MakeCommand:
    """An initialised client of another site."""

    def make(site: Site) -> Commands:
        commands = Commands(tmp_path / f"client-{id(site)}", server, site)
        assert commands.init() == 0
        return commands

    return make
