"""`[[source]]` tables: the options of every kind, passwords and the files that hold them, what settings may bring."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import config
from agent.configtable import Table
from agent.errors import AgentError, ConfigError, Reason, SourceError
from agent.sourceaddress import check_address, shown, with_credentials
from agent.sourceconfig import SourceConfig, parse_options, parse_source
from agent.sourcesecret import with_secrets
from agent.worker.sources import SOURCES

LEAST: dict[str, dict[str, Any]] = {
    "video": {"path": "/a.mp4"},
    "folder": {"path": "/a"},
    "camera": {"device": "/dev/video0"},
    "rtsp": {"url": "rtsp://cam/1"},
    "http": {"url": "http://cam/1"},
    "pipe": {"command": ["rpicam-vid"], "format": "mjpeg"},
}


def parse(**keys: Any) -> SourceConfig:
    return parse_source(Table({"name": "cam", **keys}, "agent.toml: [[source]] 1", Path("/etc/edge-agent")))


def refusal(**keys: Any) -> AgentError:
    with pytest.raises(ConfigError) as caught:
        parse(**keys)
    assert caught.value.reason is Reason.BAD_CONFIG
    return caught.value


@pytest.mark.parametrize("kind", LEAST)
def test_each_kind_needs_little_and_its_options_pass_the_second_check_as_they_are(kind: str) -> None:
    parsed = parse(kind=kind, **LEAST[kind])
    assert parsed.kind in SOURCES
    assert parse_options(kind, Table(dict(parsed.options), "again", Path("/"))) == parsed.options


@pytest.mark.parametrize("kind", LEAST)
def test_unknown_keys_are_refused_and_the_nearest_is_named(kind: str) -> None:
    error = refusal(kind=kind, **LEAST[kind], queue_frame=3)
    assert "queue_frame" in error.message
    assert "queue_frames" in error.hint


@pytest.mark.parametrize(
    ("kind", "keys", "words"),
    [
        ("camera", {"size": "640*480"}, "640x480"),
        ("camera", {"size": "640x0"}, "size"),
        ("camera", {"size": "99999x2"}, "size"),
        ("camera", {"fourcc": "H264"}, "MJPG"),
        ("camera", {"stale_s": 0}, "stale_s"),
        ("rtsp", {"transport": "sctp"}, "tcp"),
        ("rtsp", {"url": "http://cam/1"}, "rtsp://"),
        ("http", {"url": "file:///etc/passwd"}, "http://"),
        ("http", {"url": "http://"}, "host"),
        ("http", {"url": "http://cam:99999/"}, "port"),
        ("http", {"url_file": "/etc/url"}, "only one"),
        ("pipe", {"command": []}, "command"),
        ("pipe", {"command": ["sh", ""]}, "command"),
        ("pipe", {"format": "raw"}, "size"),
        ("pipe", {"format": "raw", "size": "641x480", "pixels": "nv12"}, "odd"),
        ("pipe", {"format": "raw", "size": "640x480", "pixels": "rgb"}, "bgr24"),
        ("folder", {"size": "x"}, "size"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(kind: str, keys: dict[str, Any], words: str) -> None:
    error = refusal(kind=kind, **{**LEAST[kind], **keys})
    assert words in f"{error.message} {error.hint}"


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://viewer:s3cret@cam:99999/x",
        "rtsp://viewer:s3cret@[cam/x",
        "rtspp://viewer:s3cret@cam/x",
        "rtsp://viewer:s3cret@/x",
        "rtsp://viewer:s3cret word@cam/x",
    ],
)
def test_a_refused_address_is_not_quoted(url: str) -> None:
    error = refusal(kind="rtsp", url=url)
    assert "s3cret" not in f"{error.message} {error.hint}"


@pytest.mark.parametrize(
    "keys",
    [
        {"url": ["rtsp://viewer:s3cret@cam/x"]},
        {"url": {"of": "rtsp://viewer:s3cret@cam/x"}},
        {"url": "rtsp://cam/x", "credentials_file": "viewer:s3cret"},
        {"url_file": "rtsp://viewer:s3cret@cam/x"},
    ],
)
def test_a_password_in_the_wrong_place_is_refused_and_not_quoted(keys: dict[str, Any]) -> None:
    error = refusal(kind="rtsp", **keys)
    assert error.reason is Reason.BAD_CONFIG
    assert "s3cret" not in f"{error.message} {error.hint}"


def test_a_password_in_the_path_as_some_cameras_want_it_is_not_shown() -> None:
    url = "rtsp://192.168.1.10:554/live/user=admin&password=s3cret&channel=1/0.sdp?real_stream"
    assert shown(url) == "rtsp://192.168.1.10:554/live/…/0.sdp"


@pytest.mark.parametrize(("kind", "key"), [("camera", "device"), ("folder", "path"), ("rtsp", "credentials_file")])
def test_a_name_with_a_nul_character_is_refused_before_anything_is_opened(kind: str, key: str) -> None:
    assert "NUL" in refusal(kind=kind, **{**LEAST[kind], key: "a\0b"}).message


word = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=20)


@given(word.filter(lambda t: ":" not in t and t.isprintable()), word.filter(str.isprintable))
def test_any_user_and_password_survive_the_address_and_never_show(user: str, password: str) -> None:
    url = with_credentials("rtsp://old:one@cam.example:8554/stream/1?channel=2", f"{user}:{password}")
    parts = check_address(url, ("rtsp",))
    from urllib.parse import unquote

    assert (unquote(parts.username or ""), unquote(parts.password or "")) == (user, password)
    assert (parts.hostname, parts.port, parts.path, parts.query) == ("cam.example", 8554, "/stream/1", "channel=2")
    assert shown(url) == "rtsp://cam.example:8554/stream/1"


def secret_file(tmp_path: Path, text: bytes = b"viewer:s3cret\n", mode: int = 0o600) -> Path:
    path = tmp_path / "cam.secret"
    path.write_bytes(text)
    path.chmod(mode)
    return path


def test_files_are_read_when_the_source_is_opened_and_their_names_are_gone(tmp_path: Path) -> None:
    secret_file(tmp_path)
    source = parse(kind="rtsp", url="rtsp://cam/1", credentials_file="cam.secret")
    assert source.options["credentials_file"] == "cam.secret"
    assert with_secrets(source, tmp_path, {})["credentials_file"] == "viewer:s3cret"
    (tmp_path / "cam.secret").write_bytes(b"viewer:an0ther\n")
    assert with_secrets(source, tmp_path, {})["credentials_file"] == "viewer:an0ther"
    secret_file(tmp_path, b"rtsp://u:p@cam/2")
    source = parse(kind="rtsp", url_file=str(tmp_path / "cam.secret"))
    options = with_secrets(source, Path("/"), {})
    assert (options["url"], options["url_file"]) == ("rtsp://u:p@cam/2", "")


def test_a_credential_of_the_service_is_found_by_its_name(tmp_path: Path) -> None:
    secret_file(tmp_path, mode=0o440)
    source = parse(kind="http", url="http://cam/1", credentials_file="credential:cam.secret")
    assert (
        with_secrets(source, Path("/"), {"CREDENTIALS_DIRECTORY": str(tmp_path)})["credentials_file"] == "viewer:s3cret"
    )
    for name, environment in (("cam.secret", {}), ("../cam.secret", {"CREDENTIALS_DIRECTORY": str(tmp_path)})):
        source = parse(kind="http", url="http://cam/1", credentials_file=f"credential:{name}")
        with pytest.raises(SourceError) as caught:
            with_secrets(source, Path("/"), environment)
        assert caught.value.reason is Reason.SOURCE_MISSING


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        (b"viewer:s3cret", 0o604, Reason.BAD_CONFIG),
        (b"viewer:s3cret", 0o620, Reason.BAD_CONFIG),
        (b"viewer:s3cret\nand more", 0o600, Reason.BAD_CONFIG),
        (b"viewer:s3cret\xff", 0o600, Reason.BAD_CONFIG),
        (b"s3cret" * 2000, 0o600, Reason.BAD_CONFIG),
        (b"", 0o600, Reason.BAD_CONFIG),
    ],
)
def test_a_file_that_others_can_read_or_that_is_no_line_is_refused_unquoted(
    tmp_path: Path, text: bytes, mode: int, reason: Reason
) -> None:
    secret_file(tmp_path, text, mode)
    source = parse(kind="rtsp", url="rtsp://cam/1", credentials_file="cam.secret")
    with pytest.raises(AgentError) as caught:
        with_secrets(source, tmp_path, {})
    assert caught.value.reason is reason
    assert "s3cret" not in f"{caught.value.message} {caught.value.hint}".replace("cam.secret", "")


def test_a_folder_in_the_place_of_a_secrets_file_is_refused_and_leaves_nothing_open(tmp_path: Path) -> None:
    source = parse(kind="rtsp", url="rtsp://cam/1", credentials_file="secrets")
    (tmp_path / "secrets").mkdir(mode=0o700)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="is not a file"):
        with_secrets(source, tmp_path, {})
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_file_of_root_may_be_readable_by_the_daemons_group(tmp_path: Path) -> None:
    secret_file(tmp_path, mode=0o640)
    source = parse(kind="rtsp", url="rtsp://cam/1", credentials_file="cam.secret")
    assert with_secrets(source, tmp_path, {})["credentials_file"] == "viewer:s3cret"
    os.chown(tmp_path / "cam.secret", 65534, 65534)
    with pytest.raises(ConfigError):
        with_secrets(source, tmp_path, {})


# --- settings of the fleet -------------------------------------------------------------------------------------------

OWN = """
[[source]]
name = "gate"
kind = "rtsp"
url = "rtsp://cam/1"
credentials_file = "gate.secret"

[[source]]
name = "csi"
kind = "pipe"
command = ["rpicam-vid", "-t", "0"]
format = "mjpeg"
"""


@pytest.fixture
def own(tmp_path: Path) -> config.Config:
    path = tmp_path / "agent.toml"
    path.write_text(OWN)
    return config.load(path)


def test_settings_may_change_how_a_known_camera_is_read_and_drop_it(own: config.Config) -> None:
    changed = OWN.replace('"gate"', '"yard"').replace("[[source]]", "[[source]]\nstale_s = 9", 1)
    assert [source.name for source in config.parse_settings(changed, own).sources] == ["yard", "csi"]
    assert config.parse_settings("", own).sources == ()


@pytest.mark.fault("F71")
@pytest.mark.parametrize(
    "change",
    [
        ("rtsp://cam/1", "rtsp://cam/2"),
        ("rtsp://cam/1", "rtsp://attacker.example/1"),
        ("gate.secret", "/var/lib/edge-agent/keys/device.key"),
        ('"-t", "0"', '"-t", "0", "-o", "/etc/passwd"'),
        ('"rpicam-vid"', '"curl"'),
    ],
)
def test_settings_bring_no_command_and_no_address_that_the_device_does_not_have(
    own: config.Config, change: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse_settings(OWN.replace(*change), own)
    assert caught.value.reason is Reason.BAD_CONFIG
    assert "does not have" in caught.value.message
    assert "attacker" not in caught.value.message
