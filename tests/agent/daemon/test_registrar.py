"""Whom a device tells its secret, and what it makes of every wrong answer."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent import cli
from agent.daemon import enroll, registrar
from agent.daemon.keys import FileKeys
from agent.daemon.registrar import Server
from agent.errors import ConfigError
from ota import enrolment
from ota.enrolment import Token
from ota.errors import OtaError
from ota.publisher import tokens
from ota.publisher.certificates import certificate_pem
from ota.publisher.create import create
from ota.publisher.enroll import Places
from ota.publisher.listener import Listener, Registrar, tls_context
from ota.publisher.repository import Repository
from tests.fakes.broker import Authority, Identity


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return create(tmp_path_factory.mktemp("publisher") / "repo")


@pytest.fixture
def server(repository: Repository) -> Iterator[Server]:
    places = Places("127.0.0.1", 8883, "https://127.0.0.1:1")
    registered = Registrar(repository, places, clock=time.monotonic)
    context = tls_context(repository, ("127.0.0.1",))
    listener = Listener(registered, ("127.0.0.1", 0), context, lambda _: None)
    yield Server("127.0.0.1", listener.start(), "")
    listener.close()


class Impostor:
    """A TLS server that answers every request with the same bytes and notes what it was told."""

    def __init__(self, identity: Identity, answer: bytes) -> None:
        self.told = b""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(identity.certificate, identity.key)
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.where = Server("127.0.0.1", self._socket.getsockname()[1], "")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
                with self._context.wrap_socket(sock, server_side=True) as secured:
                    self.told += secured.recv(65536)
                    secured.sendall(self._answer)
                    # closing on bytes that were not read would reset the connection, and the answer be lost
                    secured.settimeout(0.3)
                    with contextlib.suppress(TimeoutError):
                        while more := secured.recv(65536):
                            self.told += more
            except ssl.SSLError:
                continue
            except OSError:
                return

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


Impersonate = Callable[..., Impostor]


@pytest.fixture
def impostor(authority: Authority) -> Iterator[Impersonate]:
    made: list[Impostor] = []

    def make(answer: bytes, identity: Identity | None = None) -> Impostor:
        made.append(Impostor(identity or authority.issue("server", hosts=["127.0.0.1"]), answer))
        return made[-1]

    yield make
    for one in made:
        one.close()


def http(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.0 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def reason(call: Callable[[], object]) -> str:
    with pytest.raises((OtaError, ConfigError)) as caught:
        call()
    assert caught.value.hint
    return caught.value.reason.value


def test_a_device_enrols_with_nothing_but_an_address_and_a_token(
    server: Server, repository: Repository, tmp_path: Path
) -> None:
    made = tokens.make(repository, "cam-1")
    keys = FileKeys(tmp_path / "keys").create()
    done = enroll.by_token(server.url, f" {made.text}\n", keys, tmp_path)
    assert (done.device, done.host, done.renewal) == ("cam-1", "127.0.0.1", "https://127.0.0.1:1")
    again = enroll.by_token(server.url, made.text, FileKeys(tmp_path / "keys").create(), tmp_path)
    assert again == done
    assert enroll.load(tmp_path) == done


def test_a_token_is_read_from_standard_input_where_others_could_read_the_command_line(
    server: Server, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "agent.toml").write_text('state_dir = "state"\n')
    monkeypatch.setattr("sys.stdin", io.StringIO(tokens.make(repository, "cam-9").text + "\n"))
    command = ["enroll", "--config", str(tmp_path / "agent.toml"), "--server", server.url, "--token", "-"]
    assert cli.main(command) == 0
    done = enroll.load(tmp_path / "state")
    assert done is not None
    assert done.device == "cam-9"


def test_the_files_beside_a_bundle_are_made_again_after_a_cut(
    server: Server, repository: Repository, tmp_path: Path
) -> None:
    made = tokens.make(repository, "cam-2")
    done = enroll.by_token(server.url, made.text, FileKeys(tmp_path / "keys").create(), tmp_path)
    certificate = done.certificate.read_bytes()
    done.certificate.write_bytes(b"half a cert")
    done.ca.unlink()
    assert enroll.load(tmp_path) == done
    assert done.certificate.read_bytes() == certificate
    assert done.ca.read_bytes().startswith(b"-----BEGIN")


def test_an_impostor_hears_no_secret(impostor: Impersonate, repository: Repository, tmp_path: Path) -> None:
    made = tokens.make(repository, "cam-3")
    pem = (repository.path / "keys" / "ca.pem").read_text()
    # it may show the right authority's certificate, which is public; it cannot be vouched for by it
    for shown in ("no certificate", pem):
        liar = impostor(http(json.dumps({"version": 1, "ca": shown}).encode()))
        keys = FileKeys(tmp_path / "keys").create()
        call = lambda liar=liar, keys=keys: enroll.by_token(liar.where.url, made.text, keys, tmp_path)  # noqa: E731
        assert reason(call) == "server_untrusted"
        assert made.text.split(".")[2].encode() not in liar.told
    assert not (tmp_path / "enrolment").exists()


def test_no_word_of_a_server_that_proved_nothing_reaches_a_person(impostor: Impersonate) -> None:
    lie = {"error": "device_revoked", "message": "your board is broken", "hint": "sudo rm -r /", "retry": False}
    liar = impostor(http(json.dumps(lie).encode(), "403 No"))
    with pytest.raises(OtaError) as caught:
        registrar.fetch_ca(liar.where, Token("cam-1", bytes(24), bytes(32)))
    told = caught.value
    assert (told.reason.value, "HTTP 403" in told.message) == ("server_unreachable", True)
    assert not any(word in told.message + told.hint for word in ("broken", "sudo"))


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        ({"starts": 1, "days": 10}, "server_not_yet_valid"),
        ({"starts": -30, "days": 10}, "server_untrusted"),
        ({"hosts": ["other.example"]}, "server_untrusted"),
    ],
)
def test_a_server_whose_certificate_does_not_hold_is_told_apart(
    impostor: Impersonate, authority: Authority, identity: dict[str, object], expected: str
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    starts = now + datetime.timedelta(days=float(identity.get("starts", -1)))  # type: ignore[arg-type]
    hosts = identity.get("hosts", ["127.0.0.1"])
    made = authority.issue("server", hosts=hosts, starts=starts, days=float(identity.get("days", 30)))  # type: ignore[arg-type]
    liar = impostor(http(b"{}"), made)
    ca = Path(authority.ca).read_text()
    assert reason(lambda: registrar.enroll(liar.where, ca, "t", {})) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (http(b"<html>a login page</html>"), "server_unreachable"),
        (http(b"[1, 2]"), "server_unreachable"),
        (http(b'{"version": 1}'), "server_unreachable"),
        (http(b'{"error": "made_up", "message": "m"}', "500 No"), "server_unreachable"),
        (http(b'{"error": "token_used", "message": "m", "hint": "h"}', "403 No"), "token_used"),
        (
            http(b'{"error": "device_revoked", "message": "m", "hint": "h", "evidence": [1]}', "403 No"),
            "device_revoked",
        ),
        (b"no HTTP at all\r\n\r\n", "server_unreachable"),
        (b"", "server_unreachable"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b" " * (enrolment.MAX_ANSWER_BYTES + 10), "server_unreachable"),
    ],
)
def test_every_wrong_answer_is_one_reason_and_a_hint(
    impostor: Impersonate, authority: Authority, answer: bytes, expected: str
) -> None:
    liar = impostor(answer)
    ca = Path(authority.ca).read_text()
    assert reason(lambda: registrar.enroll(liar.where, ca, "t", {})) == expected


@pytest.mark.parametrize("start", [b"HTTP/1.0 200 OK\r\nX: ", b"HTTP/1.0 200 OK\r\nContent-Length: 9999\r\n\r\n"])
def test_a_server_that_drips_its_answer_is_left(
    start: bytes, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registrar, "ANSWER_S", 0.5)
    identity = authority.issue("server", hosts=["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    gone = threading.Event()

    def drip(listening: socket.socket) -> None:
        sock, _ = listening.accept()
        with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as secured:
            secured.sendall(start)
            for _ in range(6000):
                secured.sendall(b"x")
                time.sleep(0.01)
        gone.set()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=(listening,), daemon=True).start()
        where = Server("127.0.0.1", listening.getsockname()[1], "")
        ca = Path(authority.ca).read_text()
        with pytest.raises(OtaError) as caught:
            registrar.enroll(where, ca, "t", {})
        assert (caught.value.reason.value, "no answer in time" in caught.value.message) == ("server_unreachable", True)
        assert gone.wait(60)


@pytest.mark.parametrize("url", ["https://" + "a" * 70 + ":1", "https://a..b:1", "https://127.0.0.1:1/\u00fc"])
def test_an_address_that_cannot_be_asked_is_a_reason_and_no_crash(url: str) -> None:
    where = registrar.parse_server(url)
    assert reason(lambda: registrar.fetch_ca(where, Token("cam-1", bytes(24), bytes(32)))) == "server_unreachable"


@pytest.mark.parametrize("damage", ["empty", "cut", "folder"])
def test_a_damaged_enrolment_says_which_file_and_the_way_out_of_it_works(
    damage: str, server: Server, repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = f"broken-{damage}"
    (tmp_path / "agent.toml").write_text('state_dir = "state"\n')
    config = ["--config", str(tmp_path / "agent.toml")]
    enrol = ["enroll", *config, "--server", server.url, "--token"]
    assert cli.main([*enrol, tokens.make(repository, device).text]) == 0
    kept = tmp_path / "state" / "enrolment" / "bundle.json"
    whole = kept.read_bytes()
    kept.write_bytes(b"" if damage == "empty" else whole[:500])
    if damage == "folder":
        kept.unlink()
        kept.mkdir()
    (tmp_path / "again.json").write_bytes(whole)
    assert reason(lambda: enroll.load(tmp_path / "state")) == "bad_bundle"
    capsys.readouterr()
    assert cli.main(["enroll", "--bundle", str(tmp_path / "again.json"), *config]) == 65
    said = capsys.readouterr().err
    assert (str(kept) in said, "edge-agent reset" in said, "[bad_bundle]" in said) == (True, True, True)
    assert cli.main(["reset", "--yes", *config]) == 0
    assert cli.main([*enrol, tokens.make(repository, device, replace=True).text]) == 0


def test_a_later_certificate_of_the_authority_is_kept_and_a_token_of_it_is_good_for_an_enrolled_device(
    server: Server, repository: Repository, tmp_path: Path
) -> None:
    made = tokens.make(repository, "cam-ca")
    keys = FileKeys(tmp_path / "keys").create()
    done = enroll.by_token(server.url, made.text, keys, tmp_path)
    later = certificate_pem(repository.authority.renew(repository.now().replace(microsecond=0), 8000))
    # of a length with which the bundle could not be read again
    assert reason(lambda: enroll.keep_authority(later + "\n" * 300_000, tmp_path)) == "bad_bundle"
    assert enroll.load(tmp_path) == done
    assert enroll.keep_authority(later, tmp_path)
    assert not enroll.keep_authority(later, tmp_path)
    assert enroll.load(tmp_path) == done
    assert done.ca.read_text() == later
    again = tokens.make(repository, "cam-ca", replace=True)
    assert enroll.by_token(server.url, again.text, keys, tmp_path) == done
    # under either of the two what was issued before holds
    assert registrar.fetch_ca(server, enrolment.parse_token(made.text)) == later


@pytest.mark.parametrize("kind", ["key", "name", "earlier", "not itself", "two", "none"])
def test_nothing_but_a_later_certificate_of_the_same_authority_is_kept(
    kind: str, server: Server, repository: Repository, tmp_path: Path
) -> None:
    made = tokens.make(repository, f"cam-{kind[:4].strip()}")
    done = enroll.by_token(server.url, made.text, FileKeys(tmp_path / "keys").create(), tmp_path)
    before = done.ca.read_text()
    signer = serialization.load_pem_private_key((repository.path / "keys" / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    stranger = ec.generate_private_key(ec.SECP256R1())
    name = x509.load_pem_x509_certificate(before.encode()).subject
    other = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edge-ota other")])
    issuer = other if kind == "name" else name
    key = stranger if kind == "key" else signer
    builder = x509.CertificateBuilder().subject_name(issuer).issuer_name(issuer).public_key(key.public_key())
    now = datetime.datetime.now(datetime.UTC)
    builder = builder.serial_number(7).not_valid_before(now)
    builder = builder.not_valid_after(now + datetime.timedelta(days=10 if kind == "earlier" else 9000))
    signed = builder.sign(stranger if kind == "not itself" else key, hashes.SHA256())
    pem = "nothing" if kind == "none" else certificate_pem(signed) * (2 if kind == "two" else 1)
    assert reason(lambda: enroll.keep_authority(pem, tmp_path)) == "bad_bundle"
    assert done.ca.read_text() == before
    assert enroll.load(tmp_path) == done


def test_a_request_that_cannot_be_written_says_where_it_was_to_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agent.toml").write_text('state_dir = "state"\n')
    out = tmp_path / "absent" / "request.json"
    assert cli.main(["enroll", "--config", str(tmp_path / "agent.toml"), "--device", "cam-1", "--out", str(out)]) == 64
    said = capsys.readouterr().err
    assert (f"cannot write {out}" in said, "without --out" in said) == (True, True)


def test_a_device_under_another_id_is_reset_before_it_is_enrolled(
    server: Server, repository: Repository, tmp_path: Path
) -> None:
    """Its floors are those of the former id's documents: those of the new one would be refused for good."""
    keys = FileKeys(tmp_path / "keys").create()
    enroll.by_token(server.url, tokens.make(repository, "cam-6").text, keys, tmp_path)
    other = tokens.make(repository, "cam-61")
    assert reason(lambda: enroll.by_token(server.url, other.text, keys, tmp_path)) == "already_enrolled"
    known = enroll.load(tmp_path)
    assert known is not None
    assert known.device == "cam-6"
    # the token was not spent on it
    (tmp_path / "fresh").mkdir()
    fresh = FileKeys(tmp_path / "fresh" / "keys").create()
    assert enroll.by_token(server.url, other.text, fresh, tmp_path / "fresh").device == "cam-61"


def test_nobody_at_the_address_is_told(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = Server("127.0.0.1", port, "")
    assert reason(lambda: registrar.fetch_ca(where, Token("cam-1", bytes(24), bytes(32)))) == "server_unreachable"


@pytest.mark.parametrize(
    "text", ["http://a:1", "a:1", "https://", "https://u:p@a:1", "https://a:99999", "https://a:1?x", "https://a\n:1"]
)
def test_what_is_no_address_of_a_listener_is_refused(text: str) -> None:
    assert reason(lambda: registrar.parse_server(text)) == "bad_usage"


def test_an_address_without_a_port_has_the_listeners() -> None:
    assert registrar.parse_server("https://enrol.example").url == f"https://enrol.example:{enrolment.DEFAULT_PORT}"
    assert registrar.parse_server("https://[::1]:9/x/").url == "https://[::1]:9/x"


def test_a_bundle_for_other_keys_is_not_installed(server: Server, repository: Repository, tmp_path: Path) -> None:
    made = tokens.make(repository, "cam-4")
    first = FileKeys(tmp_path / "a" / "keys")
    (tmp_path / "a").mkdir()
    enroll.by_token(server.url, made.text, first.create(), tmp_path / "a")
    (tmp_path / "b").mkdir()
    other = FileKeys(tmp_path / "b" / "keys").create()
    stolen = (tmp_path / "a" / "enrolment" / "bundle.json").read_bytes()
    assert reason(lambda: enroll.install(stolen, other, tmp_path / "b")) == "bad_bundle"


def test_a_certificate_behind_that_of_the_authority_is_not_trusted_with_it(
    impostor: Impersonate, authority: Authority, repository: Repository, tmp_path: Path
) -> None:
    """The TLS library would trust both, and the one in between could read the token and exchange the bundle."""
    stranger = Path(authority.ca).read_text()
    # a lenient decoder stops where the first one is padded; whether it is depends on its length
    made = (Authority(tmp_path / "fleet", "f" * length) for length in range(1, 40))
    pem = next(pem for one in made if (pem := Path(one.ca).read_text()).split("\n")[-3].endswith("="))
    token = Token("cam-5", bytes(range(24)), enrolment.ca_fingerprint(pem))
    liar = impostor(http(json.dumps({"version": 1, "ca": pem + stranger}).encode()))
    keys = FileKeys(tmp_path / "keys").create()
    call = lambda: enroll.by_token(liar.where.url, enrolment.token_text(token), keys, tmp_path)  # noqa: E731
    assert reason(call) == "server_untrusted"
    assert enrolment.token_text(token).split(".")[2].encode() not in liar.told
    with pytest.raises(ValueError):
        enrolment.ca_fingerprint(pem + stranger)
