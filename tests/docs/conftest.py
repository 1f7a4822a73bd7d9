"""One world in which the guides are carried out, in the order a fleet grows: operator, own model, technician."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.documents import GUIDES, blocks
from tests.docs.listener import Listener
from tests.docs.world import World
from tests.fakes.broker import Broker


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An empty folder and a free port."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    made = World(tmp_path_factory.mktemp("guides"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def fleet(world: World) -> str:
    """What the operator's guide printed."""
    return world.run(blocks(GUIDES / "fleet.md"))


@pytest.fixture(scope="module")
def heard(world: World, fleet: str) -> Iterator[Listener]:
    """A dashboard that listens while the guides after the operator's are carried out."""
    listener = Listener(world.folder / "repo" / "keys", world.port)
    yield listener
    listener.close()


@pytest.fixture(scope="module")
def own_model(world: World, fleet: str, heard: Listener) -> str:
    """What the guide about one's own model printed."""
    return world.run(blocks(GUIDES / "own-model.md"))


@pytest.fixture(scope="module")
def sensors(world: World, own_model: str) -> str:
    """What the guide about sensors printed."""
    return world.run(blocks(GUIDES / "sensors.md"))


@pytest.fixture(scope="module")
def lifecycle(world: World, fleet: str) -> str:
    """What the guide about devices that come and go printed; its device is another one than the other guides'."""
    return world.run(blocks(GUIDES / "lifecycle.md"))


@pytest.fixture(scope="module")
def field(world: World, own_model: str) -> str:
    """What the technician's guide printed, with the network gone and a release waiting that the device has not seen."""
    spec = world.folder / "spec.toml"
    spec.write_text(spec.read_text().replace('"1.0.0"', '"1.1.0"'))
    world.shell("edge-ota release repo --from model.onnx --spec spec.toml; edge-ota publish repo")
    world.end("mosquitto")
    world.shell("edge-ota grant repo belt-01 digits 1.1.0")
    return world.run(blocks(GUIDES / "field.md"))
