"""A whole fleet of one for each test: publisher, Mosquitto, block server and device as processes of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo.fleet import PARTS, Fleet
from tests.demo.observer import Observer
from tests.fakes.broker import Broker
from tests.integration.console import watching
from tests.shared import belt_clip, once

CONFIG = """\
state_dir = "state"
run_dir = "run"
[[source]]
name = "belt"
kind = "video"
path = "{clip}"
policy = "live"
loop = true
[[line]]
name = "parts"
source = "belt"
explore = "never"
delegates = ["litert:xnnpack", "onnx:cpu"]
[update]
probation_scale = 0.002
run_timeout_s = 3
"""


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of the demo's clip."""
    return belt_clip(tmp_path_factory)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A publisher's folder to copy: its repository `repo` has parts 1.0.0 published."""

    def make(folder: Path) -> None:
        made = Fleet(folder)
        made.make_repository()
        made.release(PARTS / "1.0.0" / "spec.toml")
        made.publish("parts", "1.0.0")
        made.stop()

    return once(tmp_path_factory, "published", make)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory, published: Path) -> Path:
    """A publisher's folder to copy: its repository `repo` has parts 1.0.0 published and 1.1.0 built."""

    def make(folder: Path) -> None:
        shutil.copytree(published, folder, dirs_exist_ok=True)
        made = Fleet(folder)
        made.release(PARTS / "1.1.0" / "spec.toml")
        made.stop()

    return once(tmp_path_factory, "publisher", make)


@pytest.fixture
def fleet(tmp_path: Path, published: Path, clip: Path) -> Iterator[Fleet]:
    """Release parts 1.0.0 published, device enrolled, broker and block server up, nothing granted, no daemon yet."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    made = Fleet(tmp_path)
    try:
        made.start_broker()
        made.enroll(CONFIG.format(clip=clip))
        made.start_server()
        yield made
    finally:
        made.stop()


@pytest.fixture
def observer(fleet: Fleet) -> Iterator[Observer]:
    """Hears what the device says."""
    with watching(fleet) as seen:
        yield seen
