"""A real Mosquitto as a child process on a loopback port, with the shipped configuration and ACL, and a CA for it.

Needs `mosquitto`, the standard library and cryptography. Nothing here is a simulation: the configuration is
packaging/mosquitto/mosquitto.conf with ports and paths replaced.
"""

from __future__ import annotations

import datetime
import getpass
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.fakes.ports import free_port

_SHIPPED = Path(__file__).resolve().parents[2] / "packaging" / "mosquitto"
_START_S = 10.0


@dataclass(frozen=True)
class Identity:
    """PEM files of one certificate: the authority that signed it, itself, its key."""

    name: str
    ca: str
    certificate: str
    key: str


class Authority:
    """A certificate authority in a directory; every identity it issues is three files there."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _common_name(name)
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            _builder(self._subject, self._subject, self._key, now - datetime.timedelta(days=400), 3650)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.ca = _write(directory / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        hosts: Sequence[str] = (),
        starts: datetime.datetime | None = None,
        days: float = 30,
    ) -> Identity:
        """A certificate for `name`: a client's, or a server's when `hosts` names DNS names or addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        starts = starts or datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
        builder = _builder(_common_name(name), self._subject, key, starts, days).add_extension(
            x509.BasicConstraints(ca=False, path_length=None), critical=True
        )
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = builder.add_extension(issuer, critical=False).sign(self._key, hashes.SHA256())
        stem = f"{name}-{certificate.serial_number:x}"
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Identity(
            name,
            self.ca,
            _write(self.directory / f"{stem}.pem", certificate.public_bytes(serialization.Encoding.PEM)),
            _write(self.directory / f"{stem}.key", pem, mode=0o600),
        )


class Broker:
    """One Mosquitto. `start`, `stop` (SIGTERM: persists), `kill` (SIGKILL), `restart` on the same port.

    Args:
        directory: for its configuration, its database and `broker.log`.
        server: the broker's own certificate; `server.ca` is what clients are checked against.
        port: loopback port; 0 picks a free one, which restarts keep.
        crl: list of revoked certificates of `server.ca`; None for a broker that is told of none.
        options: lines of mosquitto.conf to replace or, where the shipped file has none, to add; a None removes.
    """

    def __init__(
        self,
        directory: Path,
        server: Identity,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        options: Mapping[str, str | None] | None = None,
        crl: str | None = None,
    ) -> None:
        self.directory = directory
        self.host = host
        self.port = port
        self._server = server
        self._options = dict(options or {})
        self._crl = crl
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def available() -> bool:
        """Whether mosquitto is installed."""
        return _mosquitto() is not None

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until the port answers.

        Raises:
            RuntimeError: mosquitto is missing, or ended at once; the text holds its log.
        """
        program = _mosquitto()
        if program is None:
            raise RuntimeError("mosquitto is not installed (Debian package mosquitto)")
        fixed = bool(self.port)
        for _ in range(1 if fixed else 5):
            if not fixed:
                self.port = free_port(self.host)
            configuration = self.directory / "mosquitto.conf"
            configuration.write_text(self._configuration())
            with (self.directory / "broker.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [program, "-c", str(configuration)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            if self._wait_until_up():
                return
            self.kill()
        raise RuntimeError(f"mosquitto did not come up on {self.host}:{self.port}:\n{self.log()[-2000:]}")

    def stop(self) -> None:
        """End it as systemd would: it writes its database first."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it without notice."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop, and start again on the same port."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop answering without closing anything (SIGSTOP)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None else self._process.pid

    def log(self) -> str:
        """What mosquitto wrote so far."""
        path = self.directory / "broker.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_until_up(self) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((self.host, self.port)) == 0:
                    # the port may be somebody else's: ours must still be running a moment later
                    time.sleep(0.02)
                    return self._process.poll() is None
            time.sleep(0.01)
        return False

    def _configuration(self) -> str:
        replaced: dict[str, str | None] = {
            "listener": f"{self.port} {self.host}",
            "cafile": self._server.ca,
            "certfile": self._server.certificate,
            "keyfile": self._server.key,
            "crlfile": self._crl,
            "acl_file": str(_SHIPPED / "acl"),
            "persistence_location": f"{self.directory}/",
            # started as root it would change to a user that cannot read the files above
            "user": getpass.getuser() if os.geteuid() == 0 else None,
            **self._options,
        }
        lines = []
        for line in (_SHIPPED / "mosquitto.conf").read_text().splitlines():
            key = line.split(" ", 1)[0]
            if key in replaced and not line.startswith("#"):
                value = replaced.pop(key)
                if value is not None:
                    lines.append(f"{key} {value}")
            else:
                lines.append(line)
        # settings of the whole broker stand before its listener
        head = [f"{key} {value}" for key, value in replaced.items() if value is not None]
        return "\n".join(head + lines) + "\n"


def _mosquitto() -> str | None:
    return shutil.which("mosquitto", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, starts: datetime.datetime, days: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(starts + datetime.timedelta(days=days))
    )


def _usage(*, key_cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, content: bytes, mode: int = 0o644) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)
