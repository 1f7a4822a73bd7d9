"""A repository in a temporary directory, a clock that tests move, a recorder that runs nothing, and devices."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import NameOID
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

from ota.publisher import spec as spec_format
from ota.publisher.build import build_release
from ota.publisher.create import create
from ota.publisher.enroll import Enrolled, enroll
from ota.publisher.recorder import ModelFacts, Recording
from ota.publisher.repository import Repository
from ota.publisher.spec import Spec
from ota.release import Release

FACTS = ModelFacts(
    "tflite",
    ("litert:xnnpack",),
    ({"name": "image", "dtype": "int8", "shape": [1, 96, 96, 3], "scale": 1 / 255, "zero_point": -128},),
    ({"name": "scores", "dtype": "int8", "shape": [1, 2], "scale": 1 / 256, "zero_point": -128},),
)


class ManualClock:
    """Real time, moved by hand."""

    def __init__(self) -> None:
        self.offset = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.offset

    def advance(self, days: float) -> None:
        self.offset += timedelta(days=days)


class FakeRecorder:
    """Answers what it is told without running a model; notes what it was asked."""

    def __init__(self, facts: ModelFacts = FACTS) -> None:
        self.facts = facts
        self.described: list[tuple[str, tuple[str, ...]]] = []
        self.recorded: list[tuple[list[str], list[bytes]]] = []

    def describe(self, model: Path, outputs: Sequence[str]) -> ModelFacts:
        self.described.append((model.name, tuple(outputs)))
        return self.facts

    def record(
        self,
        models: Mapping[str, Path],
        facts: Mapping[str, ModelFacts],
        graph: Mapping[str, Any],
        images: Sequence[bytes],
    ) -> Recording:
        assert models.keys() == facts.keys()
        self.recorded.append((list(models), list(images)))
        return Recording(b"golden of " + b"".join(images), {"atol": {name: [0.01] for name in models}, "margin": 0.1})


@dataclass
class FakeDevice:
    """A device's own side of an enrolment."""

    name: str
    hpke: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def csr(self, *names: str) -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names or (self.name,)])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self.key, hashes.SHA256())
        return request.public_bytes(serialization.Encoding.PEM).decode()

    def key_pem(self) -> str:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def request(self, **changes: Any) -> bytes:
        record = {
            "version": 1,
            "device": self.name,
            "csr": self.csr(),
            "hpke_public": base64.b64encode(self.hpke.public_key().public_bytes_raw()).decode(),
        }
        return json.dumps(record | changes).encode()

    def enroll(self, repository: Repository) -> Enrolled:
        return enroll(repository, self.request(), host="localhost", port=8883)


class FileFetcher(FetcherInterface):
    """Gives a stock TUF client the files of a directory."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = Path(urlparse(url).path)
        self.fetched.append(path.name)
        if not path.is_file():
            raise DownloadHTTPError("absent", 404)
        yield path.read_bytes()


class StockClient:
    """python-tuf's own client, started from root 1, with its own trusted state."""

    def __init__(self, served: Path, state: Path) -> None:
        self.served, self.state = served, state
        self.fetcher = FileFetcher()

    def updater(self) -> Updater:
        for name in ("metadata", "targets"):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        return Updater(
            str(self.state / "metadata"),
            f"file://{self.served}/metadata/",
            str(self.state / "targets"),
            f"file://{self.served}/targets/",
            self.fetcher,
            bootstrap=(self.served / "metadata/1.root.json").read_bytes(),
        )

    def fetch(self, target: str) -> bytes | None:
        """Refresh, verify, and return the target's bytes; None when no trusted role lists it."""
        updater = self.updater()
        updater.refresh()
        described = updater.get_targetinfo(target)
        return None if described is None else Path(updater.download_target(described)).read_bytes()


MakeSpec = Callable[..., Spec]
Build = Callable[..., Release]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new repository, made once: each test gets a copy, because syncing forty files for each would cost more than the
    tests."""
    return create(tmp_path_factory.mktemp("fresh") / "repository").path


@pytest.fixture
def repository(fresh: Path, tmp_path: Path, clock: ManualClock) -> Repository:
    return Repository.open(shutil.copytree(fresh, tmp_path / "repository"), now=clock)


@pytest.fixture
def client(repository: Repository, tmp_path: Path) -> StockClient:
    return StockClient(repository.path, tmp_path / "client")


@pytest.fixture
def device(repository: Repository) -> FakeDevice:
    device = FakeDevice("cam-1")
    device.enroll(repository)
    return device


def model_bytes(seed: int, length: int = 40_000) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(length)


def spec_table(**changes: Any) -> dict[str, Any]:
    """The smallest table that a spec may be; a value of None takes the key out."""
    table: dict[str, Any] = {
        "line": "person",
        "version": "1.0.0",
        "task": "classification",
        "labels": ["no person", "person"],
        "licence": "Apache-2.0",
        "preprocess": {"mean": [0], "std": [255]},
        "golden": {"images": ["image.png"]},
    }
    table.update(changes)
    return {key: value for key, value in table.items() if value is not None}


@pytest.fixture
def make_spec(tmp_path: Path) -> MakeSpec:
    def make(version: str = "1.0.0", data: bytes | None = None, **changes: Any) -> Spec:
        model = tmp_path / "int8.tflite"
        model.write_bytes(model_bytes(1) if data is None else data)
        (tmp_path / "image.png").write_bytes(b"an encoded picture")
        return spec_format.parse(spec_table(version=version, **changes), tmp_path, model=model)

    return make


@pytest.fixture
def build(repository: Repository, make_spec: MakeSpec) -> Build:
    """Build a release of one model file without running it."""

    def make(
        version: str = "1.0.0", data: bytes | None = None, *, golden: bytes = b"golden vectors", **changes: Any
    ) -> Release:
        counter = changes.pop("counter", None)
        return build_release(
            repository,
            make_spec(version, data, **changes),
            facts=[FACTS],
            golden=golden,
            tolerance={"atol": {"int8.tflite": [0.01]}, "margin": 0.1},
            counter=counter,
        )

    return make
