"""A line at work with the real host, source and model workers, and hostile stand-ins for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agent import memfd
from agent.recording import WorkerRecorder
from ota.client.ports import Candidate
from ota.publisher import spec
from ota.publisher.build import build_release
from ota.publisher.create import create
from ota.release import Component
from tests.shared import belt_clip

PARTS = Path(__file__).resolve().parents[3] / "models" / "parts"


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of parts on a belt."""
    return belt_clip(tmp_path_factory)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    """Release parts 1.0.0 with both components, its files opened from the publisher's own plaintexts."""
    folder = tmp_path_factory.mktemp("parts")
    repository = create(folder / "repo")
    release = build_release(repository, spec.load(PARTS / "1.0.0" / "spec.toml"), recorder=WorkerRecorder())

    async def open_plain(component: Component) -> int:
        return memfd.of_bytes(component.name, (folder / "repo/vault/plain" / component.plain_sha256).read_bytes())

    first, *others = sorted(release.components, key=lambda c: "litert:xnnpack" not in c.delegates)
    return Candidate(release, first, open_plain, alternatives=tuple(others))


@pytest.fixture(scope="session")
def newer(parts: Candidate) -> Candidate:
    """A release after `parts`, of the same files."""
    release = replace(parts.release, version="1.0.1", release_counter=2, sha256="f" * 64)
    return replace(parts, release=release)
