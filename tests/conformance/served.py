"""A TUF repository behind a real HTTP server, and a client of it that runs the conformance command."""

from __future__ import annotations

import datetime
import hashlib
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

from ota.client.conformance import Client, main
from ota.client.limits import Limits

TOP = ("root", "targets", "snapshot", "timestamp")


def soon() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(days=20)


class Site:
    """What a publisher signed, as bytes by file name. `asked` notes every path that was asked for, still quoted."""

    def __init__(self, *, consistent: bool = True, hashes: bool = True) -> None:
        self.hashes = hashes
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.signers: dict[str, list[CryptoSigner]] = {role: [CryptoSigner.generate_ed25519()] for role in TOP}
        self.root = Metadata(Root(expires=soon(), consistent_snapshot=consistent))
        self.targets: dict[str, Metadata[Targets]] = {"targets": Metadata(Targets(expires=soon()))}
        self.snapshot = Metadata(Snapshot(expires=soon()))
        self.timestamp = Metadata(Timestamp(expires=soon()))
        for role in TOP:
            self.root.signed.add_key(self.signers[role][0].public_key, role)
        self.sign_root()
        self._first = True
        self.publish()

    # -- signing -------------------------------------------------------------------------------------------------------

    def sign_root(self, *also: CryptoSigner) -> None:
        self._sign(self.root, "root", also)
        self._put("root", self.root.signed.version, self.root)

    def next_root(self, *also: CryptoSigner) -> None:
        self.root.signed.version += 1
        self.sign_root(*also)

    def rotate(self, *roles: str, key: CryptoSigner | None = None) -> None:
        """New keys for `roles`, announced by one new root that the old root keys sign too."""
        before = self.signers["root"]
        for role in roles:
            for old in self.signers[role]:
                self.root.signed.revoke_key(old.public_key.keyid, role)
            self.signers[role] = [key or CryptoSigner.generate_ed25519()]
            self.root.signed.add_key(self.signers[role][0].public_key, role)
        self.next_root(*(signer for signer in before if signer not in self.signers["root"]))

    def publish(self, *roles: str) -> None:
        """Sign `roles` (all targets roles without any), snapshot and timestamp, each one version higher."""
        for role in roles or tuple(self.targets):
            self.sign_targets(role)
        self.sign_snapshot()
        self.sign_timestamp()
        self._first = False

    def sign_targets(self, role: str) -> None:
        document = self.targets[role]
        self._raise_version(document, role in self._listed)
        self._sign(document, role)
        data = self._put(role, document.signed.version, document)
        self.snapshot.signed.meta[f"{role}.json"] = self.meta(document.signed.version, data)

    def sign_snapshot(self) -> None:
        self._raise_version(self.snapshot, not self._first)
        self._sign(self.snapshot, "snapshot")
        data = self._put("snapshot", self.snapshot.signed.version, self.snapshot)
        self.timestamp.signed.snapshot_meta = self.meta(self.snapshot.signed.version, data)

    def sign_timestamp(self) -> None:
        self._raise_version(self.timestamp, not self._first)
        self._sign(self.timestamp, "timestamp")
        self.files["metadata/timestamp.json"] = self.timestamp.to_bytes()

    # -- content -------------------------------------------------------------------------------------------------------

    def add(self, role: str, path: str, data: bytes, algorithms: Iterable[str] = ("sha256",)) -> TargetFile:
        target = TargetFile.from_data(path, data, list(algorithms))
        self.targets[role].signed.targets[path] = target
        folder, slash, name = path.rpartition("/")
        for digest in target.hashes.values():
            self.files[f"targets/{folder}{slash}{digest}.{name}"] = data
        self.files[f"targets/{path}"] = data
        return target

    def delegate(
        self,
        delegator: str,
        role: str,
        paths: list[str] | None = None,
        *,
        terminating: bool = False,
        prefixes: list[str] | None = None,
        key: CryptoSigner | None = None,
    ) -> None:
        """Entrust `role` with `paths` (everything in one folder without any)."""
        signed = self.targets[delegator].signed
        if signed.delegations is None:
            signed.delegations = Delegations({}, {})
        assert signed.delegations.roles is not None
        patterns = None if prefixes else paths or ["*"]
        signed.delegations.roles[role] = DelegatedRole(role, [], 1, terminating, patterns, prefixes)
        signers = self.signers.setdefault(role, [key or CryptoSigner.generate_ed25519()])
        signed.add_key((key or signers[0]).public_key, role)
        self.targets.setdefault(role, Metadata(Targets(expires=soon())))

    def delegate_bins(self, bits: int, prefix: str) -> SuccinctRoles:
        """Hash bins with one key for all."""
        signer = CryptoSigner.generate_ed25519()
        bins = SuccinctRoles([], 1, bits, prefix)
        signed = self.targets["targets"].signed
        signed.delegations = Delegations({}, None, bins)
        signed.add_key(signer.public_key)
        for name in bins.get_roles():
            self.signers[name] = [signer]
            self.targets[name] = Metadata(Targets(expires=soon()))
        return bins

    def metadata_asked(self) -> list[str]:
        """File names of the metadata that was asked for, and forget them."""
        names = [path.removeprefix("metadata/") for path in self.asked if path.startswith("metadata/")]
        self.asked.clear()
        return names

    @property
    def _listed(self) -> set[str]:
        return {name.removesuffix(".json") for name in self.snapshot.signed.meta} if not self._first else set()

    def _sign(self, document: Metadata, role: str, also: Iterable[CryptoSigner] = ()) -> None:
        document.signatures.clear()
        for signer in (*self.signers[role], *also):
            document.sign(signer, append=True)

    @staticmethod
    def _raise_version(document: Metadata, raised: bool) -> None:
        document.signed.version += raised

    def _put(self, role: str, version: int, document: Metadata) -> bytes:
        data: bytes = document.to_bytes()
        self.files[f"metadata/{version}.{role}.json"] = data
        self.files[f"metadata/{role}.json"] = data
        return data

    def meta(self, version: int, data: bytes) -> MetaFile:
        if not self.hashes:
            return MetaFile(version)
        return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


class Server(ThreadingHTTPServer):
    """Serves one site at a time on loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.site: Site | None = None
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Request(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        site = self.server.site
        assert site is not None
        path = self.path.removeprefix("/")
        site.asked.append(path)
        data = site.files.get(unquote(path))
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Commands:
    """The command with one client's folders: exit statuses as answers."""

    def __init__(self, folder: Path, server: Server, site: Site) -> None:
        self.metadata, self.downloads = folder / "metadata", folder / "downloads"
        self.metadata.mkdir(parents=True)
        self.downloads.mkdir()
        self.root = folder / "root.json"
        self.url = server.url
        server.site = self.site = site

    def init(self, root: bytes | None = None) -> int:
        self.root.write_bytes(root or self.site.files["metadata/1.root.json"])
        return main(["--metadata-dir", str(self.metadata), "init", str(self.root)])

    def refresh(self) -> int:
        return main([*self._where(), "refresh"])

    def download(self, name: str) -> int:
        where = ["--target-name", name, "--target-base-url", f"{self.url}/targets/"]
        return main([*self._where(), *where, "--target-dir", str(self.downloads), "download"])

    def later(self, days: int) -> Client:
        """The same client with a clock that is `days` ahead."""
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        return Client(self.metadata, f"{self.url}/metadata", lambda: now, Limits())

    def kept(self) -> dict[str, int]:
        """Versions on disk by file name."""
        return {
            path.name.removesuffix(".json"): Metadata.from_file(str(path)).signed.version
            for path in self.metadata.glob("*.json")
        }

    def contents(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self.downloads.iterdir())]

    def _where(self) -> list[str]:
        return ["--metadata-url", f"{self.url}/metadata/", "--metadata-dir", str(self.metadata)]
