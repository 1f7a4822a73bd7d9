"""What a verified desired.json may say beside assignments: that the device is expelled, and how it is to be set up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ota.client.desired import MAX_SETTINGS_BYTES, Desired
from ota.client.repository import Repository
from ota.errors import OtaError, Reason
from tests.ota.client.conftest import DEVICE, LINE, Device


def _desired(device: Device, **members: Any) -> Desired:
    """What the device makes of a document that its director signed with `members`."""
    built = device.repository.built[LINE, "1.0.0"]
    device.grant(built, edit=lambda signed: signed.unrecognized_fields.update(members))
    updater = device.boot()
    repository = Repository(updater._fs, updater._journal, "main", device.pinned_root, device.limits)
    return asyncio.run(repository.refresh(device.transports, DEVICE, device.now)).desired


def test_a_document_without_them_revokes_nothing_and_wants_no_settings(committed: Device) -> None:
    desired = _desired(committed)
    assert (desired.revoked, desired.settings) == (False, None)
    assert list(desired.assignments) == [LINE]


def test_a_revoked_device_is_assigned_and_granted_nothing(committed: Device) -> None:
    assert _desired(committed, revoked=True) == Desired(revoked=True)


def test_a_revocation_needs_no_document_of_a_release_role(committed: Device) -> None:
    committed.release("1.1.0")
    documents = committed.repository.documents
    for role, version in list(documents):
        if role == f"release-{LINE}":
            del documents[role, version]
    assert _desired(committed, revoked=True).revoked


def test_settings_come_as_the_text_that_was_signed(committed: Device) -> None:
    text = '[link]\nhost = "b\u00fcro"\n'
    assert _desired(committed, settings=text).settings == text


@pytest.mark.parametrize(
    "members",
    [
        {"revoked": 1},
        {"revoked": "false"},
        {"revoked": None},
        {"settings": {"link": {}}},
        {"settings": "\u00fc" * (MAX_SETTINGS_BYTES // 2 + 1)},
    ],
)
def test_members_of_another_kind_are_refused_and_move_no_floor(committed: Device, members: dict[str, Any]) -> None:
    assert _desired(committed).assignments
    floor = committed.boot().record.floors["main"]["director"]
    with pytest.raises(OtaError) as refused:
        _desired(committed, **members)
    assert refused.value.reason is Reason.METADATA_MISMATCH
    assert committed.boot().record.floors["main"]["director"] == floor
    assert _desired(committed).assignments


def test_settings_of_the_largest_size_are_taken(committed: Device) -> None:
    text = "#" * MAX_SETTINGS_BYTES
    assert _desired(committed, settings=text).settings == text
