"""The command's search and download: delegation graphs, hash bins, names that need quoting, and files on disk."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

import pytest
from securesystemslib.signer import CryptoSigner

from ota.errors import Reason
from tests.conformance.conftest import MakeCommand
from tests.conformance.served import Commands, Site

# edges as "delegator role [pattern…] [!]" (`!` terminates), and the order in which an absent file is looked for
GRAPHS: list[tuple[str, list[str], str]] = [
    ("nothing is delegated", [], ""),
    ("siblings in their order", ["targets B", "targets A"], "BA"),
    ("children before siblings", ["targets A", "targets B", "A C", "C D", "A E"], "ACDEB"),
    ("a terminating role ends the search behind its children", ["targets A !", "targets B", "A C"], "AC"),
    ("a terminating grandchild ends it everywhere", ["targets A", "targets B", "A C !", "A D", "C E"], "ACE"),
    ("a terminating role for other paths ends nothing", ["targets A x/* !", "targets B"], "B"),
    ("a branch for other paths is not entered", ["targets A x/*", "A C", "targets B"], "B"),
    ("a cycle is entered once", ["targets A", "A B", "B C", "C A"], "ABC"),
    ("a role that delegates to itself", ["targets A", "A A"], "A"),
    ("a role of two delegators is visited where it comes first", ["targets A", "targets B", "B C", "A C"], "ACB"),
    ("a pattern's star does not reach over a slash", ["targets A *", "targets B", "targets C d/*"], "AB"),
]


@pytest.mark.parametrize(("name", "edges", "order"), GRAPHS, ids=[row[0] for row in GRAPHS])
def test_delegations_are_searched_depth_first_in_their_order(
    command: Commands, site: Site, name: str, edges: list[str], order: str
) -> None:
    for edge in edges:
        delegator, role, *rest = edge.split()
        patterns = [word for word in rest if word != "!"]
        site.delegate(delegator, role, patterns, terminating="!" in rest)
    site.publish()
    command.refresh()
    site.metadata_asked()
    assert command.download("absent") == 1
    assert site.metadata_asked()[2:] == [f"1.{role}.json" for role in order]


def test_the_first_role_that_lists_a_file_decides_what_it_is(command: Commands, site: Site) -> None:
    for role in "AB":
        site.delegate("targets", role)
    site.add("B", "file", b"of B")
    site.add("A", "file", b"of A")
    site.publish()
    assert command.download("file") == 0
    assert command.contents() == [b"of A"]
    assert set(command.kept()) == {"root", "timestamp", "snapshot", "targets", "A"}


@pytest.mark.fault("F43")
def test_a_role_is_not_asked_about_paths_outside_its_own(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.delegate("targets", "A", ["a/*"])
    site.add("A", "b/file", b"bytes")
    site.publish()
    assert command.download("b/file") == 1
    assert f"[{Reason.NOT_FOUND.value}]" in capsys.readouterr().err
    assert command.contents() == []


def test_each_delegator_vouches_for_a_shared_role_itself(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.delegate("targets", "A", ["a/*"])
    site.delegate("targets", "B", ["b/*"])
    site.delegate("A", "shared", ["*/*"])
    site.delegate("B", "shared", ["*/*"], key=CryptoSigner.generate_ed25519())
    site.add("shared", "a/file", b"one")
    site.add("shared", "b/file", b"two")
    site.publish()
    assert command.download("a/file") == 0
    assert command.download("b/file") == 1
    assert f"[{Reason.BAD_SIGNATURE.value}]" in capsys.readouterr().err
    assert command.contents() == [b"one"]


@pytest.mark.fault("F37")
def test_a_chain_of_delegations_is_followed_so_far_and_no_further(
    command: Commands, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    delegator = "targets"
    for number in range(33):
        site.delegate(delegator, f"role-{number}")
        delegator = f"role-{number}"
    site.add("role-31", "near", b"near")
    site.add("role-32", "far", b"far")
    site.publish()
    assert command.download("near") == 0
    assert command.download("far") == 1
    assert f"[{Reason.METADATA_MISMATCH.value}]" in capsys.readouterr().err
    assert command.contents() == [b"near"]


def test_hash_prefixes_choose_among_roles(command: Commands, site: Site) -> None:
    digit = hashlib.sha256(b"file").hexdigest()[0]
    other = "0" if digit != "0" else "1"
    site.delegate("targets", "other", prefixes=[other])
    site.delegate("targets", "right", prefixes=[digit])
    site.add("right", "file", b"bytes")
    site.publish()
    assert command.download("file") == 0
    assert "other" not in command.kept()


@pytest.mark.parametrize("bits", [1, 4, 9])
def test_hash_bins_lead_to_one_role(command: Commands, site: Site, bits: int) -> None:
    bins = site.delegate_bins(bits, "bin")
    role = bins.get_role_for_target("some/file")
    site.add(role, "some/file", b"bytes")
    site.publish()
    assert command.download("some/file") == 0
    assert set(command.kept()) == {"root", "timestamp", "snapshot", "targets", role}


@pytest.mark.parametrize("role", ["?", "#", "a b", "/top", "../up", ".", "..", "%2e%2e", "\u00e4/\u00f6", "x.json"])
def test_a_role_name_is_quoted_in_the_url_and_on_disk(command: Commands, site: Site, role: str) -> None:
    site.delegate("targets", role)
    site.publish()
    before = {path for path in command.metadata.parent.rglob("*") if path.is_file()}
    assert command.download("absent") == 1
    assert f"metadata/1.{quote(role, safe='')}.json" in site.asked
    new = {path for path in command.metadata.parent.rglob("*") if path.is_file()} - before
    assert {path.parent for path in new} <= {command.metadata, command.metadata / "state"}
    assert len(list(command.metadata.glob("*.json"))) == 5
    site.metadata_asked()
    assert command.download("absent") == 1
    assert site.metadata_asked() == ["2.root.json", "timestamp.json"]


@pytest.mark.parametrize(
    "path", ["plain", "deep/er/file.txt", "with blank", "100%", "?x=1#y", "..", "a/../../b", "\u00e4"]
)
def test_a_target_name_is_quoted_in_the_url_and_on_disk(command: Commands, site: Site, path: str) -> None:
    site.add("targets", path, b"bytes of it")
    site.publish()
    assert command.download(path) == 0
    assert command.contents() == [b"bytes of it"]
    assert command.download(path) == 0
    assert len([asked for asked in site.asked if asked.startswith("targets/")]) == 1


@pytest.mark.parametrize("algorithms", [["sha256"], ["sha512"], ["sha256", "sha512"]])
def test_any_known_hash_names_and_proves_a_file(command: Commands, site: Site, algorithms: list[str]) -> None:
    site.add("targets", "file", b"bytes", algorithms)
    site.publish()
    assert command.download("file") == 0
    assert command.contents() == [b"bytes"]


def test_a_file_that_only_an_unknown_hash_proves_is_not_taken(command: Commands, site: Site) -> None:
    target = site.add("targets", "file", b"bytes")
    target.hashes = {"crc": target.hashes["sha256"]}
    site.publish()
    assert command.download("file") == 1
    assert command.contents() == []


@pytest.mark.parametrize("lie", [b"bytez", b"byte", b"bytes and more", b""])
def test_other_bytes_than_listed_are_not_stored(command: Commands, site: Site, lie: bytes) -> None:
    target = site.add("targets", "file", b"bytes")
    site.publish()
    site.files[f"targets/{target.hashes['sha256']}.file"] = lie
    assert command.download("file") == 1
    assert command.contents() == []


def test_a_newer_file_takes_the_place_of_the_older_one(command: Commands, site: Site) -> None:
    for content in (b"one", b"two", b"three"):
        site.add("targets", "file", content)
        site.publish()
        assert command.download("file") == 0
        assert command.contents() == [content]


def test_a_delegated_role_that_expired_lists_nothing(
    command_for: MakeCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site()
    command = command_for(site)
    site.delegate("targets", "team")
    site.add("team", "file", b"bytes")
    expires = site.targets["team"].signed.expires
    site.targets["team"].signed.expires = expires.replace(year=expires.year - 2)
    site.publish()
    assert command.refresh() == 0
    assert command.download("file") == 1
    assert f"[{Reason.DELEGATED_EXPIRED.value}]" in capsys.readouterr().err
    assert "team" not in command.kept()
