"""A committed release that begins to eat memory in service, through the whole daemon: its worker is ended at the line's
own limit, and the release before serves again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import workerpython
from tests.demo.fleet import PARTS, ROOT, build_bad_release
from tests.fakes.broker import Broker
from tests.integration.console import make_fleet, until, watching

UPDATE = "probation_scale = 0.001\ncrash_limit = 3\ncrash_window_s = 600"
LEAKING = ROOT / "tests" / "agent" / "daemon" / "leaking.py"
# what a device may name as worker_python: checked like any interpreter, and then a host that leaks
INTERPRETER = """\
#!/bin/sh
[ "$3" = --check ] && exec {python} "$@"
shift 2
exec {python} {leaking} --when {file} onnx:cpu "$@"
"""


@pytest.mark.fault("F69")
def test_a_committed_release_that_eats_memory_is_ended_at_the_lines_limit_and_rolled_back(
    tmp_path: Path, repository: Path, clip: Path
) -> None:
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet, device = make_fleet(tmp_path / "fleet", repository, clip, update=UPDATE)
    leak, python = tmp_path / "leak", tmp_path / "python"
    python.write_text(INTERPRETER.format(python=" ".join(workerpython.program()), leaking=LEAKING, file=leak))
    python.chmod(0o755)
    text = device.config.read_text().replace("[[line]]", "[[line]]\nmemory_mb = 512")
    named = workerpython.configured("")  # this run's own interpreter
    device.config.write_text(f'worker_python = "{python}"\n{text.removeprefix(named)}')
    try:
        device.start()
        with watching(fleet) as observer:
            assert device.grant(observer, "1.0.0")["outcome"] == "committed"
            build_bad_release(fleet.folder / "repo", "1.2.0", PARTS / "1.0.0" / "int8.onnx", "onnx:cpu")  # a good one
            assert device.install(observer, "1.2.0")["outcome"] == "committed"
            daemon = device.ask()["process"]["pid"]
            leak.touch()

            def back() -> Any:
                return next((e for e in observer.events if e.get("outcome") == "rolled_back"), None)

            event = observer.wait("the roll-back", back, 120)
            assert (event["version"], event["reason"]) == ("1.0.0", "worker_out_of_memory")
            ends = [e["reason"] for e in observer.events if e["kind"] == "worker_exit"]
            assert ends[:3] == ["worker_out_of_memory"] * 3
            until("serving 1.0.0", lambda: device.serving()["version"] == "1.0.0")
            results = device.serving()["results"]
            until("results of 1.0.0", lambda: device.serving()["results"] > results + 5)
            assert device.ask()["process"]["pid"] == daemon
    finally:
        fleet.stop()
