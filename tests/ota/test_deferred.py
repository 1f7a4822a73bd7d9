"""Stand-ins for modules that a dependency imports for nothing: loaded by their first use, invisible to others."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ota.deferred import deferred

DEPENDENCY = {
    "deferred_pack/__init__.py": "",
    "deferred_pack/heavy.py": "import time; time.sleep(0.05); loads = []; value = 42",
    "deferred_pack/user.py": "import deferred_pack.heavy\ndef use(): return deferred_pack.heavy.value",
    "deferred_pack/other.py": "from deferred_pack import heavy as h\ndef use(): return h.value",
    "deferred_pack/eager.py": "from deferred_pack.heavy import value",
    "deferred_parent/__init__.py": "import deferred_parent.heavy",
    "deferred_parent/heavy.py": "",
    "deferred_broken.py": "raise RuntimeError('as it is')",
}


@pytest.fixture(autouse=True)
def dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package whose modules `user` and `other` import a heavy one that they rarely use."""
    for name, text in DEPENDENCY.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("deferred_")]:
        del sys.modules[name]


def imported(name: str) -> ModuleType:
    """A module of the dependency, imported with its heavy one deferred."""
    with deferred("deferred_pack.heavy"):
        return importlib.import_module(f"deferred_pack.{name}")


@pytest.mark.parametrize("name", ["user", "other"])
def test_a_deferred_module_is_loaded_when_something_of_it_is_used(name: str) -> None:
    module = imported(name)
    assert "deferred_pack.heavy" not in sys.modules
    assert module.use() == 42
    assert "deferred_pack.heavy" in sys.modules


def test_whoever_takes_a_name_out_of_it_at_once_gets_the_real_thing() -> None:
    assert imported("eager").value == 42
    real = sys.modules["deferred_pack.heavy"]
    assert type(real) is ModuleType
    assert real.__spec__ is not None


def test_everybody_else_imports_the_real_module_and_all_see_the_same() -> None:
    user = imported("user")
    real = importlib.import_module("deferred_pack.heavy")
    assert type(real) is ModuleType
    real.value = 43  # type: ignore[attr-defined]
    assert user.use() == 43


def test_a_module_that_is_loaded_already_stays() -> None:
    real = importlib.import_module("deferred_pack.heavy")
    imported("user")
    assert sys.modules["deferred_pack.heavy"] is real


def test_threads_that_use_it_first_at_the_same_time_all_get_it() -> None:
    user = imported("user")
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(user.use())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [42] * 8


def test_a_failure_inside_the_block_leaves_no_stand_in_behind() -> None:
    with pytest.raises(RuntimeError, match="as it is"), deferred("deferred_pack.heavy"):
        importlib.import_module("deferred_broken")
    assert "deferred_pack.heavy" not in sys.modules


def test_a_name_that_another_version_of_a_dependency_has_not_is_passed_over() -> None:
    with deferred("deferred_pack.gone.heavy", "deferred_gone.heavy"):
        assert importlib.import_module("deferred_pack.user").use() == 42


def test_a_name_that_its_own_package_imports_stays_what_it_is() -> None:
    with deferred("deferred_parent.heavy"):
        real = sys.modules["deferred_parent.heavy"]
        assert type(real) is ModuleType
    assert sys.modules["deferred_parent.heavy"] is real
    assert sys.modules["deferred_parent"].heavy is real


def test_what_paho_and_tuf_would_use_is_there_when_they_do() -> None:
    from ota import mqttconnection
    from ota.client import tufmetadata

    assert callable(mqttconnection.paho.urllib.request.getproxies)
    assert mqttconnection.paho.uuid.uuid4().version == 4
    assert sys.modules[tufmetadata.Metadata.__module__].tempfile.gettempdir()
