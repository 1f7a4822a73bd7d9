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

from agent import cli
from agent.daemon import enroll, registrar
from agent.daemon.keys import FileKeys
from agent.daemon.registrar import Server
from agent.errors import ConfigError
from ota import enrolment
from ota.enrolment import Token
from ota.errors import OtaError
from ota.publisher import tokens
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


@pytest.mark.parametrize("url", ["https://" + "a" * 70 + ":1", "https://a..b:1", "https://127.0.0.1:1/\u00fc"])
def test_an_address_that_cannot_be_asked_is_a_reason_and_no_crash(url: str) -> None:
    where = registrar.parse_server(url)
    assert reason(lambda: registrar.fetch_ca(where, Token("cam-1", bytes(24), bytes(32)))) == "server_unreachable"


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
