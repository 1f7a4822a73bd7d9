"""The demo's cast, all of it real and in child processes: publisher, broker, block server, device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ota.publisher import spec as specs
from ota.publisher.build import build_release
from ota.publisher.recorder import ModelFacts
from ota.publisher.repository import Repository
from tests.fakes.broker import Broker, Identity
from tests.workerpython import configured

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "models" / "parts"
VECTORS = ROOT / "tests" / "vectors"
BIN = Path(sys.executable).parent


class CommandError(RuntimeError):
    """A command of the demo failed; its text is the command's own error."""


def command(*words: object, folder: Path) -> str:
    """Run one command as a user would; returns its stdout.

    Raises:
        CommandError: it ended with another code than 0.
    """
    program, *arguments = map(str, words)
    done = subprocess.run(
        [str(BIN / program), *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0:
        raise CommandError(f"{' '.join(map(str, words))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Fleet:
    """A repository, a broker with mutual TLS and ACL, a block server and one enrolled device below `folder`."""

    def __init__(self, folder: Path, *, device: str = "belt-01", tenant: str = "edge") -> None:
        self.folder = folder
        self.device = device
        self.tenant = tenant
        self.keys = folder / "repo" / "keys"
        self.broker: Broker | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._log = (folder / "processes.log").open("ab")
        self.agent: subprocess.Popen[bytes] | None = None

    def make_repository(self) -> None:
        """`edge-ota init`, and an identity for whoever watches: the operator's own is used by `edge-ota grant`."""
        command("edge-ota", "init", "repo", "--tenant", self.tenant, folder=self.folder)
        command("edge-ota", "identity", "repo", "ota_dashboard", folder=self.folder)

    def release(self, spec: Path) -> str:
        """`edge-ota release`."""
        return command("edge-ota", "release", "repo", "--spec", spec, folder=self.folder)

    def publish(self, line: str, version: str) -> str:
        """`edge-ota publish` one release."""
        return command("edge-ota", "publish", "repo", line, version, folder=self.folder)

    def grant(self, line: str, version: str) -> str:
        """`edge-ota grant` one release to the device, with a hint over the broker."""
        assert self.broker is not None
        where = f"127.0.0.1:{self.broker.port}"
        words = ("grant", "repo", self.device, line, version, "--broker", where, "--spread", "0")
        return command("edge-ota", *words, folder=self.folder)

    def start_broker(self) -> int:
        """Mosquitto with the shipped configuration; returns its port."""
        server = Identity("broker", *(str(self.keys / name) for name in ("ca.pem", "broker.pem", "broker.key")))
        self.broker = Broker(self.folder / "broker", server, crl=str(self.keys.parent / "revoked.pem"))
        self.broker.start()
        return self.broker.port

    def enroll(self, config: str) -> None:
        """Request, answer and bundle, as a device engineer and an operator exchange them."""
        assert self.broker is not None
        (self.folder / "agent.toml").write_text(configured(config))
        where = f"127.0.0.1:{self.broker.port}"
        device, folder = ("edge-agent", "enroll", "--config", "agent.toml"), self.folder
        command(*device, "--device", self.device, "--out", "enroll-request.json", folder=folder)
        words = ("enroll", "repo", "enroll-request.json", "--broker", where, "--out", "bundle.json")
        command("edge-ota", *words, folder=folder)
        command(*device, "--bundle", "bundle.json", folder=folder)

    def start_server(self) -> subprocess.Popen[bytes]:
        """`edge-ota serve`."""
        assert self.broker is not None
        return self._start("edge-ota", "serve", "repo", "--broker", f"127.0.0.1:{self.broker.port}")

    def start_agent(self, **environment: str) -> subprocess.Popen[bytes]:
        """`edge-agent run`, with more in its environment."""
        self.agent = self._start("edge-agent", "run", "--config", "agent.toml", environment=environment)
        return self.agent

    def status(self) -> dict[str, Any]:
        """`edge-agent status --json`."""
        status: dict[str, Any] = json.loads(self.device_command("status", "--json"))
        return status

    def modules(self) -> list[str]:
        """Modules that the running daemon has loaded."""
        loaded: list[str] = json.loads(self.device_command("status", "--modules", "--json"))["modules"]
        return loaded

    def device_command(self, verb: str, *words: str) -> str:
        """Any verb of `edge-agent` against the running device."""
        return command("edge-agent", verb, "--config", "agent.toml", *words, folder=self.folder)

    def log(self) -> str:
        """What the processes wrote."""
        return (self.folder / "processes.log").read_text(errors="replace")

    def stop(self) -> None:
        """End everything, the device first and gracefully."""
        for child in reversed(self._children):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(20)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        if self.broker is not None:
            self.broker.stop()
        self._log.close()

    def _start(
        self, program: str, *words: str, environment: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [str(BIN / program), *words], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=self._log,
            stderr=self._log, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )  # fmt: skip
        self._children.append(child)
        return child


def build_bad_release(repository: Path, version: str, model: Path, delegate: str, like: str = "1.0.0") -> None:
    """Sign a release as its publisher would, of a model that cannot be run: with the tensor specs and the golden
    vectors of the good release `like`. What is wrong with it is the file itself."""
    opened = Repository.open(repository)
    good = next(r for r in opened.releases("parts") if r.version == like)
    component = next(c for c in good.components if c.format == model.suffix.lstrip("."))
    table = {
        "line": "parts", "version": version, "task": "detection", "licence": "Apache-2.0",
        "labels": good.graph["labels"],
        "preprocess": {key: value for key, value in good.graph["preprocess"].items() if value != ""},
        "postprocess": good.graph["postprocess"], "golden": {"images": ["day.jpg"]},
        "component": [{"file": model.name, "name": component.name}],
    }  # fmt: skip
    facts = ModelFacts(component.format, (delegate,), component.inputs, component.outputs)
    build_release(
        opened,
        specs.parse(table, model.parent),
        facts=[facts],
        golden=(repository / "vault" / "plain" / good.golden.plain_sha256).read_bytes(),
        tolerance=good.graph["golden"],
    )


def damaged_copy(model: Path, to: Path) -> Path:
    """The ONNX file `model` with the largest of its weights inverted: it loads, runs and answers nonsense."""
    import onnx

    loaded = onnx.load(str(model))
    weights = max(loaded.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights.raw_data = bytes(byte ^ 0xFF for byte in weights.raw_data)
    onnx.save(loaded, str(to))
    return to
