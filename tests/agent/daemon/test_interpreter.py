"""Workers under another interpreter: what it must be, how a wrong one is told, and that its packages are its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from agent import cli, config, workbench
from agent.daemon import interpreter
from agent.daemon.interpreter import check_interpreter
from agent.daemon.supervisor import Supervisor, default_host_command
from agent.errors import ConfigError, Reason
from agent.worker import start
from tests import workerpython

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "models" / "digits"


def fake(folder: Path, script: str) -> Path:
    """Something that is no Python, at a place where one could be."""
    path = folder / "python3"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This Python without a single package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def refusal(python: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_interpreter(python)
    assert caught.value.reason is Reason.BAD_CONFIG
    assert "\n" not in caught.value.message
    assert str(python) in caught.value.message
    assert caught.value.hint
    return caught.value


# --- what it must be -------------------------------------------------------------------------------------------------


def test_this_interpreter_can_run_workers() -> None:
    assert check_interpreter(Path(sys.executable)) == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 0", "it does not answer as a Python"),
        ("echo hello", "it does not answer as a Python"),
        ("echo 'unknown option -I' >&2; exit 2", "it does not answer as a Python (unknown option -I)"),
        ("echo 'Traceback' >&2; echo 'ImportError: x' >&2; exit 1", "(ImportError: x)"),
    ],
)
def test_what_is_no_interpreter_for_workers_is_told_in_one_line(tmp_path: Path, script: str, why: str) -> None:
    assert why in refusal(fake(tmp_path, script)).message


def test_one_that_is_not_there_or_may_not_be_run_is_told_in_one_line(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nowhere").message
    (tmp_path / "text").write_text("text")
    assert "cannot be run" in refusal(tmp_path / "text").message


def test_one_that_hangs_is_waited_for_so_long_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "ANSWER_TIMEOUT_S", 0.3)
    began = time.monotonic()
    assert "did not answer in 0.3 s" in refusal(fake(tmp_path, "exec sleep 600")).message
    assert time.monotonic() - began < 60


def test_one_without_numpy_is_told_what_to_install(bare: Path) -> None:
    told = refusal(bare)
    assert told.message.endswith("cannot run workers: it does not have numpy, cv2, zstandard")
    assert told.hint == f"{bare} -m pip install numpy opencv-python-headless zstandard"


# --- where it is named -----------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(f'state_dir = "state"\nrun_dir = "run"\n{text}')
    return path


@pytest.mark.parametrize("verb", [("run",), ("config", "check")], ids=" ".join)
def test_a_daemon_with_a_wrong_interpreter_says_so_and_does_not_start(
    verb: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, 'worker_python = "nowhere"\n')
    assert cli.main([*verb, "--config", str(path)]) == 78
    said = capsys.readouterr().err.splitlines()
    assert (
        said[0] == f"error: worker_python {tmp_path / 'nowhere'} cannot be run: No such file or directory [bad_config]"
    )
    assert said[1].startswith("hint: ")
    assert len(said) == 2
    assert not (tmp_path / "state").exists()


def test_config_check_says_which_interpreter_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, f'worker_python = "{sys.executable}"\n')
    assert cli.main(["config", "check", "--config", str(path)]) == 0
    assert f"workers: {sys.executable}, Python {sys.version_info[0]}." in capsys.readouterr().out


def test_an_interpreter_beside_a_unit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(written(tmp_path, 'workers = "unit"\nworker_python = "/usr/bin/python3"\n'))
    assert "a unit names its own interpreter" in caught.value.message
    assert "drop-in" in caught.value.hint


def test_settings_of_the_fleet_cannot_name_a_program_to_run(tmp_path: Path) -> None:
    own = config.load(written(tmp_path, 'worker_python = "/usr/bin/python3"\n'))
    assert config.parse_settings('worker_python = "/usr/bin/python3"\n', own).worker_python == Path("/usr/bin/python3")
    assert config.parse_settings("", own).worker_python == Path("/usr/bin/python3")
    with pytest.raises(ConfigError) as caught:
        config.parse_settings('worker_python = "/tmp/evil"\n', own)
    assert "worker_python" in caught.value.message
    with pytest.raises(ConfigError):
        config.parse_settings('worker_python = "/tmp/evil"\n', config.load(written(tmp_path, "")))


# --- how it is started -----------------------------------------------------------------------------------------------


def test_of_the_daemons_packages_it_sees_this_program_and_no_other(bare: Path, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    site.mkdir()
    for name in ("agent", "ota"):
        (site / name).symlink_to(ROOT / name)
    (site / "numpy").mkdir()
    (site / "numpy" / "__init__.py").write_text("raise SystemExit('the numpy of another Python')")
    code = (
        f"import sys, runpy; lent = runpy.run_path({str(site / 'agent/worker/start.py')!r})['Lent']\n"
        f"sys.meta_path.insert(0, lent({str(site)!r}))\n"
        "import agent.protocol, ota.errors\n"
        "print(agent.__file__)\n"
        "import numpy\n"
    )
    done = subprocess.run([str(bare), "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [str(site / "agent" / "__init__.py")]
    assert done.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'numpy'"


def test_a_host_of_an_interpreter_that_is_too_old_says_so_and_starts_no_worker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "OLDEST", (3, 99))
    assert start.run(["host", "--connect", "/nowhere"]) == 78
    why, hint = capsys.readouterr().err.splitlines()
    assert why.startswith(f"error: {sys.executable} cannot run workers: it is Python 3.")
    assert why.endswith(", a worker needs 3.99 or newer")
    assert hint == "hint: name a newer Python"


def old_pythons() -> list[Path]:
    return [path for minor in (6, 7, 8, 9) for path in workerpython.versions().glob(f"3.{minor}.*/bin/python3.{minor}")]


@pytest.mark.parametrize("python", old_pythons(), ids=lambda path: path.name)
def test_a_python_that_is_really_too_old_is_told_its_version(python: Path) -> None:
    told = refusal(python)
    assert f"it is Python {python.name.removeprefix('python')}." in told.message
    assert told.message.endswith(", a worker needs 3.10 or newer")


async def _host_of(python: Path) -> tuple[str, int]:
    supervisor = Supervisor(listen=None, host_command=default_host_command(python), on_lost=lambda: None)
    await supervisor.start()
    try:
        worker = await supervisor.spawn("transform")
        assert supervisor.host is not None
        return supervisor.host.python, worker.pid
    finally:
        await supervisor.stop()


def test_a_worker_runs_under_the_interpreter_that_is_named(tmp_path: Path) -> None:
    log = tmp_path / "started"
    named = fake(tmp_path, f'echo "$@" >>{log}\nexec {sys.executable} "$@"')
    version, pid = asyncio.run(_host_of(named))
    assert version == ".".join(map(str, sys.version_info[:3]))
    assert pid > 0
    assert log.read_text().splitlines()[0].startswith(f"-I {Path(start.__file__).resolve()} host --fd ")


def test_a_model_answers_alike_under_another_python() -> None:
    other = workerpython.another()
    if other is None:
        pytest.skip("no Python of another version with numpy, OpenCV and zstandard on this machine")
    model, image = DIGITS / "1.0.0" / "int8.tflite", DIGITS / "golden" / "seven.png"
    graph = workbench.DEFAULT_GRAPH
    found = [
        asyncio.run(workbench.infer(model, image, "reference", graph, (), python))[1].items for python in (None, other)
    ]
    assert found[0] == found[1]
    assert asyncio.run(_host_of(other))[0] == check_interpreter(other)
