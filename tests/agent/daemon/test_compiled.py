"""What runtimes compiled, as the daemon keeps it: sealed, bounded, and never a reason for a line to stay down."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import memfd, protocol
from agent.daemon.compiled import DIRECTORY, WORTH_MS, CompiledModels, keeping_nothing
from agent.daemon.selection import Verdict
from agent.daemon.supervisor import Supervisor
from agent.daemon.trials import TrialRunner, load_message, subject_of
from agent.errors import AgentError, Reason, WorkerError
from ota.client.fsops import Disk, Fs
from ota.client.ports import Candidate
from tests.agent.daemon.rig import LIMITS, Rig
from tests.agent.daemon.rig import run as run_rig
from tests.contract.delegates import PAIRS, model
from tests.workerpython import host_command

KEY, OLD_KEY = bytes(range(32)), bytes(32)
MODEL, OTHER = "a" * 64, "b" * 64
EXPORT = b"weights of a model, as a runtime packed them " * 2000
SLOW_MS = WORTH_MS + 1


class FakeWorker:
    """Answers as a model worker; `lent` is what it was handed beside the model at each load."""

    def __init__(self, compiled: str = "fresh", load_ms: float = SLOW_MS, export: bytes = EXPORT) -> None:
        self.compiled, self.load_ms, self.export_bytes = compiled, load_ms, export
        self.lent: list[bytes | None] = []
        self.exports = 0
        self.over_it: AgentError | None = None
        self.dies_exporting = False
        self.exporting: Callable[[], None] = lambda: None
        self.unsealed = False

    async def request(self, message: Any, expect: type[Any], *, fds: tuple[int, ...] = (), timeout_s: float) -> Any:
        if isinstance(message, protocol.LoadModel):
            return self._load(fds)
        assert isinstance(message, protocol.ExportCompiled)
        self.exports += 1
        self.exporting()
        if self.dies_exporting:
            raise WorkerError(Reason.WORKER_OUT_OF_MEMORY, "the model worker died with SIGKILL")
        fd = memfd.create("x", len(self.export_bytes)) if self.unsealed else memfd.of_bytes("x", self.export_bytes)
        return protocol.Packet(protocol.Exported(len(self.export_bytes)), [fd])

    def _load(self, fds: tuple[int, ...]) -> protocol.Packet:
        blob = os.pread(fds[1], 1 << 20, 0) if len(fds) == 2 else None
        assert blob is None or memfd.is_sealed(fds[1])
        self.lent.append(blob)
        if blob is not None and self.over_it is not None:
            raise self.over_it
        how = self.compiled if blob is None or self.compiled != "fresh" else "imported"
        loaded = protocol.ModelLoaded("openvino:cpu", 1.0, self.load_ms, 0, "openvino 1", "cpu", how, [], [])
        return protocol.Packet(loaded)


def message(model: str = MODEL, **changes: Any) -> protocol.LoadModel:
    fields = {"delegate": "openvino:cpu", "threads": 1, "options": {"model": model, "bf16": False}, "graph": {}}
    return protocol.LoadModel("line", "1.0.0", "c", "onnx", inputs=[], outputs=[], **{**fields, **changes})


class Place:
    """A state directory and its store of compiled models, made anew as at each start of the daemon."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keys = [KEY]
        self.max_bytes = 1 << 20
        self.reserve_bytes = 0
        self.disk: Disk | None = None

    def store(self) -> CompiledModels:
        return CompiledModels(
            Fs(self.disk or self.root), lambda: self.keys, reserve_bytes=self.reserve_bytes, max_bytes=self.max_bytes
        )

    def files(self) -> list[Path]:
        return sorted((self.root / DIRECTORY).glob("*")) if (self.root / DIRECTORY).exists() else []

    def kept(self, worker: FakeWorker | None = None, wanted: protocol.LoadModel | None = None) -> bool:
        return run(load_and_keep(self.store(), worker or FakeWorker(), wanted or message()))[1]

    def lent(self, wanted: protocol.LoadModel | None = None) -> bytes | None:
        worker = FakeWorker()
        run(load_and_keep(self.store(), worker, wanted or message()))
        return worker.lent[-1]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def load_and_keep(store: CompiledModels, worker: Any, wanted: protocol.LoadModel) -> tuple[Any, bool]:
    model = memfd.of_bytes("model", b"model")
    try:
        packet = await store.load(worker, wanted, model, timeout_s=1)
    finally:
        os.close(model)
    return packet.message, await store.keep(worker, wanted, packet.message, timeout_s=1)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_took_long_to_compile_is_lent_at_the_next_start(place: Place) -> None:
    assert place.kept()
    assert place.lent() == EXPORT
    assert len(place.files()) == 1


@pytest.mark.parametrize(("compiled", "load_ms"), [("fresh", WORTH_MS - 1), ("imported", SLOW_MS), ("", SLOW_MS)])
def test_what_loads_fast_or_cannot_be_exported_is_not_kept(place: Place, compiled: str, load_ms: float) -> None:
    worker = FakeWorker(compiled, load_ms)
    assert not place.kept(worker)
    assert worker.exports == 0
    assert place.files() == []


def test_no_byte_of_it_lies_in_clear_and_nobody_else_may_read_the_file(place: Place) -> None:
    place.kept()
    (path,) = place.files()
    data = path.read_bytes()
    assert all(EXPORT[i : i + 16] not in data for i in range(0, 4096, 64))
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "wanted",
    [
        message(OTHER),
        message(delegate="openvino:gpu"),
        message(threads=2),
        message(options={"model": MODEL, "bf16": True}),
        message(options={}),
        message(options={"model": "../../etc/passwd"}),
    ],
    ids=["another model", "another delegate", "other threads", "other precision", "no model", "a path for a model"],
)
def test_it_is_lent_for_nothing_else(place: Place, wanted: protocol.LoadModel) -> None:
    place.kept()
    assert place.lent(wanted) is None


@pytest.mark.fault("F77")
@pytest.mark.parametrize("position", [0, 8, 20, 33, 41, 50, 90, 5000, -1])
def test_a_tampered_file_is_removed_with_its_reason_and_the_model_compiled_anew(
    place: Place, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    place.kept()
    (path,) = place.files()
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    worker = FakeWorker()
    with caplog.at_level(logging.WARNING):
        loaded, kept = run(load_and_keep(place.store(), worker, message()))
    assert worker.lent == [None]
    assert (loaded.compiled, kept) == ("fresh", True)
    reasons = {record.__dict__.get("reason") for record in caplog.records}
    assert reasons & {"payload_corrupt", "payload_truncated", "unsupported"}
    assert place.lent() == EXPORT


@pytest.mark.fault("F77")
@pytest.mark.parametrize("length", [0, 10, 48, 60, 5000])
def test_a_file_that_was_cut_is_compiled_anew(place: Place, length: int) -> None:
    place.kept()
    os.truncate(place.files()[0], length)
    assert place.lent() is None
    assert place.lent() == EXPORT


@pytest.mark.fault("F77")
def test_a_file_under_another_name_opens_for_nobody(place: Place) -> None:
    place.kept()
    (mine,) = place.files()
    place.kept(FakeWorker(export=b"of another model"), message(OTHER))
    (theirs,) = [path for path in place.files() if path != mine]
    os.replace(theirs, mine)
    assert place.lent() is None


def test_a_file_under_a_key_that_was_rotated_away_is_compiled_anew(place: Place) -> None:
    place.keys = [OLD_KEY]
    place.kept()
    place.keys = [KEY, OLD_KEY]
    assert place.lent() == EXPORT
    place.keys = [KEY]
    assert place.lent() is None
    assert place.lent() == EXPORT


def test_without_a_key_nothing_is_kept_and_nothing_is_judged(place: Place) -> None:
    place.kept()
    place.keys = []
    assert place.lent() is None
    assert not place.kept(wanted=message(OTHER))
    place.keys = [KEY]
    assert place.lent() == EXPORT


@pytest.mark.fault("F77")
def test_one_of_another_runtime_is_removed_once_the_worker_says_so(place: Place) -> None:
    place.kept()
    newer = FakeWorker(export=b"by the newer runtime")
    newer.compiled = "fresh"
    newer._load = lambda fds: _fresh(newer, fds)  # type: ignore[method-assign]
    run(load_and_keep(place.store(), newer, message()))
    assert newer.lent == [EXPORT]
    assert place.lent() == b"by the newer runtime"


def _fresh(worker: FakeWorker, fds: tuple[int, ...]) -> protocol.Packet:
    worker.lent.append(os.pread(fds[1], 1 << 20, 0))
    return protocol.Packet(protocol.ModelLoaded("openvino:cpu", 1.0, SLOW_MS, 0, "openvino 2", "cpu", "fresh", [], []))


CRASHED = WorkerError(Reason.WORKER_CRASHED, "the model worker died with SIGSEGV")


@pytest.mark.parametrize(
    "error",
    [CRASHED, AgentError(Reason.WORKER_OUT_OF_MEMORY, "out of memory"), AgentError(Reason.MODEL_UNLOADABLE, "no")],
    ids=["it crashes", "it says that it has no memory", "it refuses the model"],
)
def test_a_file_over_which_a_worker_fails_is_gone_before_the_next_one_and_accuses_no_model(
    place: Place, error: AgentError
) -> None:
    place.kept()
    worker = FakeWorker()
    worker.over_it = error
    with pytest.raises(AgentError) as caught:
        run(load_and_keep(place.store(), worker, message()))
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    assert place.files() == []
    assert place.lent() is None


def test_a_file_is_not_blamed_for_a_host_that_went_away(place: Place) -> None:
    place.kept()
    worker = FakeWorker()
    worker.over_it = WorkerError(Reason.WORKER_UNAVAILABLE, "the model worker went down with its host")
    with pytest.raises(AgentError):
        run(load_and_keep(place.store(), worker, message()))
    assert place.lent() == EXPORT


def test_a_file_whose_worker_fails_before_its_first_frame_is_gone(
    place: Place, parts: Candidate, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was imported loads, and its first run crashes: the next worker compiles, and the model is not accused."""
    wanted = load_message(parts, parts.component.name, "litert:xnnpack", 1)
    place.kept(wanted=wanted)

    async def attach(*_: Any, **__: Any) -> tuple[int, float]:
        raise CRASHED

    async def body(rig: Rig) -> None:
        rig.line._starts._compiled = Importing(place)
        rig.source.attach = attach  # type: ignore[method-assign]
        for reason in (Reason.WORKER_UNAVAILABLE, Reason.WORKER_CRASHED):
            with pytest.raises(AgentError) as caught:
                await rig.serve(parts)
            assert caught.value.reason is reason
            assert place.files() == []

    run_rig(body, clip)


class Importing(CompiledModels):
    """Its workers say that they imported what they were lent, or that nobody lent them."""

    def __init__(self, place: Place) -> None:
        super().__init__(Fs(place.root), lambda: place.keys, reserve_bytes=0)

    async def load(self, worker: Any, message: protocol.LoadModel, model: int, *, timeout_s: float) -> Any:
        fake = await super().load(FakeWorker("imported"), message, model, timeout_s=timeout_s)
        packet = await worker.request(message, protocol.ModelLoaded, fds=(model,), timeout_s=timeout_s)
        return protocol.Packet(replace(packet.message, compiled=fake.message.compiled))


def test_a_worker_that_dies_without_it_keeps_its_own_reason(place: Place) -> None:
    class Dying(FakeWorker):
        def _load(self, fds: tuple[int, ...]) -> protocol.Packet:
            raise WorkerError(Reason.WORKER_CRASHED, "the model worker died with SIGSEGV")

    with pytest.raises(WorkerError) as caught:
        run(load_and_keep(place.store(), Dying(), message()))
    assert caught.value.reason is Reason.WORKER_CRASHED


def test_an_export_that_kills_its_worker_is_not_asked_for_again(place: Place) -> None:
    worker = FakeWorker()
    worker.dies_exporting = True

    async def twice() -> list[bool]:
        store = place.store()
        return [(await load_and_keep(store, worker, message()))[1] for _ in range(2)]

    assert run(twice()) == [False, False]
    assert worker.exports == 1


def test_an_export_that_could_still_change_is_not_kept(place: Place) -> None:
    worker = FakeWorker()
    worker.unsealed = True
    assert not place.kept(worker)
    assert place.files() == []


def test_all_of_them_together_stay_within_their_bound_and_the_least_used_goes_first(place: Place) -> None:
    names = ["1" * 64, "2" * 64, "3" * 64]
    place.max_bytes = 2 * (len(EXPORT) + 1000)

    async def work() -> None:
        store = place.store()
        for name in names[:2]:
            await load_and_keep(store, FakeWorker(), message(name))
        await load_and_keep(store, FakeWorker(), message(names[0]))  # used again
        await load_and_keep(store, FakeWorker(), message(names[2]))

    run(work())
    assert [path.name[:64] for path in place.files()] == [names[0], names[2]]
    assert sum(path.stat().st_size for path in place.files()) <= place.max_bytes


def test_one_that_is_too_large_alone_drives_no_other_out(place: Place) -> None:
    place.kept()
    place.max_bytes = len(EXPORT) + 3000
    assert not place.kept(FakeWorker(export=2 * EXPORT), message(OTHER))
    assert place.lent() == EXPORT


def test_a_full_disk_costs_the_next_compilation_and_no_more(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.reserve_bytes = 1 << 60
    with caplog.at_level(logging.WARNING):
        assert not place.kept()
    assert [record.__dict__.get("reason") for record in caplog.records] == ["no_space"]
    assert place.files() == []


def test_what_found_no_room_is_kept_once_there_is_some(place: Place) -> None:
    async def work() -> list[bool]:
        store = place.store()
        store._reserve_bytes = 1 << 60
        first = (await load_and_keep(store, FakeWorker(), message()))[1]
        store._reserve_bytes = 0
        return [first, (await load_and_keep(store, FakeWorker(), message()))[1]]

    assert run(work()) == [False, True]


def test_keys_that_are_destroyed_during_an_export_cost_the_next_compilation_and_no_more(place: Place) -> None:
    worker = FakeWorker()
    worker.exporting = place.keys.clear
    assert not place.kept(worker)
    assert worker.exports == 1
    assert place.files() == []


def test_they_go_with_their_models(place: Place) -> None:
    place.kept()
    place.kept(wanted=message(OTHER))
    run(place.store().collect(lambda sha256: sha256 == OTHER))
    assert [path.name[:64] for path in place.files()] == [OTHER]


@pytest.mark.parametrize("keeping", [True, False], ids=["at the next keeping", "at the next look"])
def test_what_a_power_cut_left_half_written_goes(place: Place, keeping: bool) -> None:
    place.kept()
    half = place.root / DIRECTORY / f"{OTHER}-0.cmp.tmp"
    half.write_bytes(b"half")
    if keeping:
        place.kept(wanted=message("c" * 64))
    else:
        run(place.store().collect(lambda _: True))
    assert not half.exists()
    assert place.lent() == EXPORT


def test_a_workbench_keeps_nothing() -> None:
    worker = FakeWorker()
    assert run(load_and_keep(keeping_nothing(), worker, message()))[1] is False
    assert (worker.lent, worker.exports) == ([None], 0)


def test_a_real_worker_compiles_once_and_the_next_one_imports(
    place: Place, digits_onnx: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.daemon.compiled.WORTH_MS", 0.0)  # the model is small
    wanted = message(graph={"task": "raw"})

    async def starts() -> list[str]:
        supervisor = Supervisor(listen=None, host_command=host_command(), on_lost=lambda: None)
        await supervisor.start()
        store, told = place.store(), []
        try:
            for _ in range(2):
                worker = await supervisor.spawn("model")
                model = memfd.of_bytes("model", digits_onnx)
                packet = await store.load(worker, wanted, model, timeout_s=60)
                os.close(model)
                told.append(packet.message.compiled)
                await store.keep(worker, wanted, packet.message, timeout_s=60)
                await worker.stop()
        finally:
            await supervisor.stop()
        return told

    assert run(starts()) == ["fresh", "imported"]


@pytest.fixture
def digits_onnx() -> bytes:
    if not any(name == "openvino:cpu" for name, _ in PAIRS):
        pytest.skip("OpenVINO is not installed, whose compilations are kept")
    return model("onnx")


class Watched(CompiledModels):
    """Writes down what was asked of it, and when."""

    def __init__(self) -> None:
        super().__init__(Fs(Path(os.devnull)), tuple, reserve_bytes=0)
        self.asked: list[str] = []

    async def load(self, worker: Any, message: protocol.LoadModel, model: int, *, timeout_s: float) -> Any:
        self.asked.append(f"load {message.options['model'][:4]} {message.delegate}")
        return await super().load(worker, message, model, timeout_s=timeout_s)

    async def keep(self, worker: Any, message: Any, loaded: Any, *, timeout_s: float) -> bool:
        self.asked.append("keep")
        return await super().keep(worker, message, loaded, timeout_s=timeout_s)


def test_a_serving_worker_is_offered_what_was_compiled_and_asked_for_its_own(parts: Candidate, clip: Path) -> None:
    store = Watched()

    async def body(rig: Rig) -> None:
        rig.line._starts._compiled = store
        await rig.serve(parts)
        await rig.frames()

    run_rig(body, clip)
    assert store.asked == [f"load {parts.component.plain_sha256[:4]} litert:xnnpack", "keep"]


def test_a_trial_offers_what_it_compiled_once_it_has_passed(parts: Candidate) -> None:
    store = Watched()

    async def trial() -> list[Verdict]:
        supervisor = Supervisor(listen=None, host_command=host_command(), on_lost=lambda: None)
        await supervisor.start()
        try:
            pairs = [(parts.component.name, "litert:xnnpack"), (parts.component.name, "nowhere")]
            return await TrialRunner(supervisor, LIMITS).run(subject_of(parts, compiled=store), pairs)
        finally:
            await supervisor.stop()

    assert [verdict.passed for verdict in run(trial())] == [True, False]
    assert store.asked == ["keep"]
