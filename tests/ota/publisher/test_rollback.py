"""The order to go back is signed by the line's release role alone, and ends by itself."""

from __future__ import annotations

import io
import json

import pytest

from ota.errors import OtaError, Reason
from ota.publisher import cli
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.publisher.rollback import allow_rollback
from tests.ota.publisher.conftest import Build, ManualClock, StockClient, model_bytes

ROLE = "release-person"


@pytest.fixture
def line(repository: Repository, build: Build) -> Repository:
    """Three published releases, with counters 1 to 3."""
    for number in range(3):
        build(f"1.{number}.0", model_bytes(number))
    publish(repository)
    return repository


def _allowed(repository: Repository) -> object:
    return repository.targets(ROLE).signed.unrecognized_fields.get("allow_rollback_to")


def test_the_order_stands_in_the_release_roles_document_and_clients_verify_it(
    line: Repository, client: StockClient
) -> None:
    before = line.targets(ROLE).signed.version
    order = allow_rollback(line, "person", "1.1.0")
    assert order.oldest is not None
    assert (order.oldest.counter, order.role_version) == (2, before + 1)
    assert _allowed(line) == 2
    assert client.fetch("person/1.1.0/release.json") is not None


def test_the_order_outlives_a_renewal_and_ends_with_the_next_release(
    line: Repository, build: Build, clock: ManualClock
) -> None:
    allow_rollback(line, "person", "1.0.0")
    version = line.targets(ROLE).signed.version
    clock.advance(line.settings.release_days * 0.6)
    publish(line)
    assert line.targets(ROLE).signed.version > version
    assert _allowed(line) == 1
    build("1.3.0", model_bytes(9))
    publish(line)
    assert _allowed(line) is None


def test_naming_the_newest_release_withdraws_the_order(line: Repository) -> None:
    allow_rollback(line, "person", "1.0.0")
    assert allow_rollback(line, "person", "1.2.0").oldest is None
    assert _allowed(line) is None


def test_without_the_release_roles_key_there_is_no_order(line: Repository) -> None:
    (line.keys.directory / f"{ROLE}.pem").unlink()
    with pytest.raises(OtaError) as refused:
        allow_rollback(line, "person", "1.0.0")
    assert refused.value.reason is Reason.KEY_MISSING
    assert _allowed(line) is None


def test_the_verb_says_what_it_allowed(line: Repository) -> None:
    out = io.StringIO()
    assert cli.main(["allow-rollback", str(line.path), "person", "1.1.0", "--json"], out=out, now=line.now) == 0
    answer = json.loads(out.getvalue())
    assert answer["allow_rollback_to"] == {"version": "1.1.0", "counter": 2}
    out = io.StringIO()
    assert cli.main(["allow-rollback", str(line.path), "person", "1.2.0"], out=out, now=line.now) == 0
    assert "no longer" in out.getvalue()


def test_the_verb_refuses_a_release_that_was_never_published(line: Repository) -> None:
    err = io.StringIO()
    assert cli.main(["allow-rollback", str(line.path), "person", "3.0.0"], err=err, now=line.now) == 66
    assert "unknown_release" in err.getvalue()
