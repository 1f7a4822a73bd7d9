"""A host without models: implements `ota.client.ports.Host` and checks what the port promises to it.

A "model" here is any byte string, its golden vectors a list of the SHA-256 of the models that reproduce them; so a
wrong model really fails its golden test. Faults are data: `faults[(step, version)]` is raised by that step.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from ota import delta
from ota.client import memfd
from ota.client.ports import Candidate, Choice, Probation, Tested
from ota.errors import OtaError, Reason, Rejected
from ota.release import Release


def read_and_close(fd: int) -> bytes:
    """Content of a sealed memfd; fails on one that could still change."""
    try:
        assert memfd.is_sealed(fd), "a host must only ever see sealed memfds"
        return b"".join(memfd.chunks(fd))
    finally:
        os.close(fd)


def golden_for(*models: bytes) -> bytes:
    """Golden vectors that exactly these models reproduce."""
    return "\n".join(hashlib.sha256(model).hexdigest() for model in models).encode()


@dataclass
class FakeHost:
    """Serves byte strings. `serving` maps a line to (version, model); `calls` logs (step, line, version, component).

    `delegates` are the component names it can run, best first; None means all. With `explore` the last
    component that reproduces its golden vectors wins. `hold` steps wait for their event. `accelerators` are those that
    every candidate needs for itself.
    """

    delegates: Sequence[str] | None = None
    explore: bool = False
    faults: dict[tuple[str, str], OtaError] = field(default_factory=dict)
    hold: dict[tuple[str, str], asyncio.Event] = field(default_factory=dict)
    accelerators: Sequence[str] = ()
    serving: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    calls: list[tuple[str, str, str, str]] = field(default_factory=list)
    transforms: list[str] = field(default_factory=list)

    async def choose(self, release: Release) -> Choice:
        names = [component.name for component in release.components]
        if self.delegates is not None:
            names = [name for name in self.delegates if name in names]
        if not names:
            raise Rejected(Reason.NO_DELEGATE, f"nothing here runs {release.line} {release.version}")
        return Choice(tuple(names), together=self.explore)

    async def transform(self, codec: str, out_length: int, payload_fd: int, base_fd: int | None) -> int:
        self.transforms.append(codec)
        fault = self.faults.get(("transform", codec))
        if fault is not None:
            raise fault
        payload = b"".join(memfd.chunks(payload_fd))
        base = None if base_fd is None else b"".join(memfd.chunks(base_fd))
        return memfd.write_sealed("decoded", out_length, lambda view: delta.apply(codec, payload, base, view))

    def exclusive(self, candidate: Candidate) -> Sequence[str]:
        return self.accelerators

    async def self_test(self, candidate: Candidate) -> Tested:
        await self._step("self_test", candidate)
        golden = read_and_close(await candidate.open(candidate.release.golden.name)).decode().splitlines()
        for component in reversed(candidate.components):
            model = read_and_close(await candidate.open(component.name))
            if hashlib.sha256(model).hexdigest() in golden:
                return Tested(component.name, "fake:bytes", 1.0, 2.0, 3.0, len(model))
        raise Rejected(Reason.GOLDEN_MISMATCH, f"{candidate.component.name} answers otherwise")

    async def activate(self, candidate: Candidate, tested: Tested) -> None:
        assert tested.component == candidate.component.name
        await self._step("activate", candidate)
        await self._serve(candidate)

    async def probation(self, candidate: Candidate) -> Probation:
        assert self.serving[candidate.line][0] == candidate.version
        await self._step("probation", candidate)
        return Probation(10, 0.1, 2.0, False)

    async def revert(self, line: str, previous: Candidate | None) -> None:
        if previous is None:
            self.calls.append(("revert", line, "", ""))
            self.serving.pop(line, None)
            return
        await self._step("revert", previous)
        await self._serve(previous)

    async def start(self, candidate: Candidate | None) -> None:
        """What a daemon does at boot with `Updater.active(line)`."""
        if candidate is not None:
            await self._serve(candidate)

    async def _serve(self, candidate: Candidate) -> None:
        model = read_and_close(await candidate.open(candidate.component.name))
        self.serving[candidate.line] = (candidate.version, model)

    async def _step(self, step: str, candidate: Candidate) -> None:
        self.calls.append((step, candidate.line, candidate.version, candidate.component.name))
        held = self.hold.get((step, candidate.version))
        if held is not None:
            await held.wait()
        fault = self.faults.get((step, candidate.version))
        if fault is not None:
            raise fault
