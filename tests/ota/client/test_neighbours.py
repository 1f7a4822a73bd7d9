"""Cases that only one of several neighbouring guards can stop: what remains when the others have nothing to object."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import TargetFile

from ota import release
from ota.client.limits import Limits
from ota.client.repository import raised_floor
from ota.errors import OtaError, Reason
from tests.ota.client.conftest import DEVICE, LINE, Device
from tests.ota.client.simulator import LATER, NOW, SimulatedTransport


@pytest.mark.fault("F31")
@pytest.mark.parametrize("role", ["snapshot", "targets", f"release-{LINE}"])
def test_a_document_of_the_listed_version_and_the_right_key_but_with_another_content_is_refused(
    committed: Device, role: str
) -> None:
    """Whoever holds the role's key alone signs twice under one version: the document above it tells them apart."""
    simulator = committed.repository
    committed.release("1.1.0")
    document = {"snapshot": simulator.snapshot, "targets": simulator.top, **simulator.roles}[role]
    document.signed.unrecognized_fields["note"] = "of the thief"
    document.sign(simulator.signers[role])
    simulator.documents[role, document.signed.version] = document.to_bytes()
    event = committed.check()
    assert event.reason is Reason.METADATA_MISMATCH
    assert committed.serving == "1.0.0"


@pytest.mark.fault("F35")
def test_a_root_that_only_its_own_new_keys_signed_is_refused(committed: Device) -> None:
    simulator = committed.repository
    for signer in simulator.root_signers:
        simulator.root.signed.revoke_key(signer.public_key.keyid, "root")
    simulator.root_signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
    for signer in simulator.root_signers:
        simulator.root.signed.add_key(signer.public_key, "root")
    simulator.next_root()
    event = committed.check()
    assert event.reason is Reason.BAD_SIGNATURE
    assert committed.serving == "1.0.0"


@pytest.mark.fault("F35")
def test_a_root_that_only_the_former_keys_signed_is_refused(committed: Device) -> None:
    simulator = committed.repository
    former = list(simulator.root_signers)
    for signer in former:
        simulator.root.signed.revoke_key(signer.public_key.keyid, "root")
    simulator.root_signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
    for signer in simulator.root_signers:
        simulator.root.signed.add_key(signer.public_key, "root")
    simulator.root_signers, simulator.root.signed.version = former, simulator.root.signed.version + 1
    simulator.sign_root()
    event = committed.check()
    assert event.reason is Reason.BAD_SIGNATURE
    assert committed.serving == "1.0.0"


@pytest.mark.fault("F40")
@pytest.mark.parametrize(
    ("issued", "expires"),
    [
        ("2050-01-01T00:00:00+00:00", datetime.datetime(2060, 1, 1, tzinfo=datetime.UTC)),
        ("2026-07-02T00:00:00+00:00", LATER),
        ("2026-06-01T00:00:00", LATER),
        ("0001-01-01T00:00:00+14:00", LATER),
        ("9999-12-31T23:59:59-14:00", LATER),
        ("tomorrow", LATER),
        ("", LATER),
    ],
    ids=[
        "behind the ceiling",
        "behind the expiry",
        "no zone",
        "before all time",
        "after all time",
        "no date",
        "nothing",
    ],
)
def test_a_date_that_cannot_be_right_leaves_the_clock_floor_where_it_is(
    issued: str, expires: datetime.datetime
) -> None:
    ceiling = Limits().clock_ceiling
    assert raised_floor("", issued, expires, ceiling) == ""
    floor = "2026-01-01T00:00:00+00:00"
    assert raised_floor(floor, issued, expires, ceiling) == floor
    assert raised_floor(floor, "2026-05-01T00:00:00+00:00", expires, ceiling) == "2026-05-01T00:00:00+00:00"


@pytest.mark.fault("F40")
def test_a_release_with_an_impossible_date_is_committed_and_moves_no_floor(device: Device) -> None:
    """The first commit of a device, whose floor is still empty."""
    device.release("1.0.0", edit=lambda document: document.update(issued="0001-01-01T00:00:00+14:00"))
    assert device.check().outcome == "committed"
    assert device.boot().record.clock_floor == ""


@pytest.mark.fault("F45")
@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (("full",), "codec", "lzma"),
        (("full",), "codec", "zstd-patch"),
        (("full",), "codec", ""),
        (("full",), "enc", "none"),
        (("full",), "enc", "cobblestone-128"),
        (("deltas", 0, "payload"), "codec", "zstd"),
        (("deltas", 0, "payload"), "enc", "none"),
    ],
)
def test_a_weaker_or_unknown_way_to_open_a_payload_is_refused_when_the_release_is_read(
    device: Device, place: tuple[Any, ...], key: str, value: str
) -> None:
    old = device.release("1.0.0")
    document = json.loads(device.release("1.1.0", bases=[old]).data)
    payload = document["components"][0]
    for step in place:
        payload = payload[step]
    payload[key] = value
    with pytest.raises(OtaError) as refusal:
        release.parse(json.dumps(document).encode())
    assert refusal.value.reason is Reason.UNSUPPORTED


@pytest.mark.fault("F43")
def test_two_releases_of_one_line_in_one_assignment_are_refused(committed: Device) -> None:
    first, second = committed.release("1.1.0", grant=False), committed.release("1.2.0", grant=False)
    committed.grant(first, second)
    assert committed.check().reason is Reason.METADATA_MISMATCH
    assert committed.serving == "1.0.0"


@pytest.mark.fault("F43")
def test_a_release_role_lists_another_lines_path_in_vain_although_the_director_and_the_keys_agree(
    committed: Device,
) -> None:
    """Only the paths that targets delegate to the role stand between."""
    simulator = committed.repository
    built = committed.release("1.1.0", grant=False)
    delegations = simulator.top.signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    delegations.roles[f"release-{LINE}"].paths = ["meter/*/release.json"]
    simulator.roles[f"release-{LINE}"].signed.targets[built.path] = TargetFile.from_data("x", built.data, ["sha256"])
    simulator.publish()
    committed.grant(built)
    event = committed.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.METADATA_MISMATCH)
    assert committed.serving == "1.0.0"


@pytest.mark.fault("F47")
def test_a_document_that_names_another_device_is_refused_although_the_director_signed_it(committed: Device) -> None:
    built = committed.release("1.1.0", grant=False)
    committed.grant(built, named="cam-2")
    assert committed.check().reason is Reason.NOT_FOR_THIS_DEVICE
    assert committed.serving == "1.0.0"


@pytest.mark.fault("F39")
def test_a_clock_that_shows_2099_stops_updates_and_not_the_release(committed: Device) -> None:
    committed.release("1.1.0")
    committed.now = datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC)
    assert committed.check().reason is Reason.ROOT_EXPIRED
    assert committed.serving == "1.0.0"
    committed.now = NOW
    assert committed.check().outcome == "committed"


@pytest.mark.fault("F39")
@pytest.mark.parametrize("jump", [datetime.timedelta(days=400), datetime.timedelta(days=-20_000)])
def test_one_check_is_judged_at_one_time_whatever_the_clock_does_meanwhile(
    committed: Device, jump: datetime.timedelta
) -> None:
    committed.release("1.1.0")
    committed.transports = (_Jumping(committed.repository, DEVICE, owner=committed, jump=jump),)
    assert committed.check().outcome == "committed"
    assert committed.now == NOW + jump


@dataclass
class _Jumping(SimulatedTransport):
    """Moves the device's clock while the timestamp is on its way."""

    owner: Device | None = None
    jump: datetime.timedelta = datetime.timedelta()

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        assert self.owner is not None
        if role == "timestamp":
            self.owner.now = NOW + self.jump
        return await super().metadata(role, version, max_bytes)
