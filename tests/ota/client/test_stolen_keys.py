"""One stolen key at a time: what its thief can do to a device, and what is left to the other keys."""

from __future__ import annotations

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import MetaFile, TargetFile, Targets

from ota.errors import Reason
from tests.fakes.host import golden_for
from tests.ota.client.conftest import DEVICE, LINE, Device, model, run
from tests.ota.client.simulator import Built

ROLE = f"release-{LINE}"


def _evil(device: Device, version: str = "6.6.6", counter: int = 99) -> Built:
    """A release that no role has signed, with its payloads at the source."""
    data = model(666)
    listed = dict(device.repository.roles[ROLE].signed.targets)
    before = device.repository.frozen()
    built = device.repository.build(LINE, version, {"int8": data}, golden_for(data), counter=counter)
    device.repository.roles[ROLE].signed.targets = listed
    device.repository.documents = before.documents
    device.repository.versions = dict(before.versions)
    return built


@pytest.fixture
def two(committed: Device) -> Device:
    """A device that went from 1.0.0 to 1.1.0."""
    committed.release("1.1.0")
    assert committed.check().outcome == "committed"
    return committed


# -- timestamp ---------------------------------------------------------------------------------------------------------


def test_the_timestamp_key_alone_brings_no_older_view_back(two: Device) -> None:
    simulator = two.repository
    simulator.timestamp.signed.snapshot_meta = MetaFile(1)
    simulator.sign_timestamp()
    assert two.check().reason is Reason.METADATA_ROLLBACK
    assert two.serving == "1.1.0"


def test_the_timestamp_key_alone_makes_no_snapshot(two: Device) -> None:
    simulator = two.repository
    simulator.signers["snapshot"] = CryptoSigner.generate_ed25519()
    simulator.sign_snapshot()
    assert two.check().reason is Reason.BAD_SIGNATURE
    assert two.serving == "1.1.0"


def test_the_timestamp_key_withholds_a_release_for_as_long_as_its_thief_signs(two: Device) -> None:
    """The freeze that it allows: nothing expires, nothing new arrives, and nothing is reported."""
    simulator = two.repository
    frozen = simulator.timestamp.signed.snapshot_meta
    two.release("1.2.0")
    simulator.timestamp.signed.snapshot_meta = frozen
    simulator.timestamp.signed.version += 5
    simulator.versions["timestamp"] += 5
    simulator.sign_timestamp()
    assert two.check().outcome != "committed"
    assert two.serving == "1.1.0"


# -- snapshot ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["targets", ROLE])
def test_the_snapshot_key_lists_no_older_document_and_drops_none(two: Device, role: str) -> None:
    simulator = two.repository
    listed = simulator.snapshot.signed.meta
    now = listed[f"{role}.json"]
    listed[f"{role}.json"] = MetaFile(now.version - 1)
    simulator.sign_snapshot()
    assert two.check().reason is Reason.METADATA_ROLLBACK
    del listed[f"{role}.json"]
    simulator.sign_snapshot()
    assert two.check().reason in (Reason.METADATA_MISMATCH, Reason.METADATA_ROLLBACK)
    assert two.serving == "1.1.0"


def test_the_snapshot_and_timestamp_keys_together_sign_no_release(two: Device) -> None:
    simulator = two.repository
    evil = _evil(two)
    simulator.signers[ROLE] = CryptoSigner.generate_ed25519()
    simulator.list_release(evil)
    two.grant(evil)
    event = two.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.BAD_SIGNATURE)
    assert two.serving == "1.1.0"


# -- director ----------------------------------------------------------------------------------------------------------


def test_the_directors_key_installs_nothing_that_the_release_role_did_not_list(two: Device) -> None:
    evil = _evil(two)
    two.grant(evil)
    event = two.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.METADATA_MISMATCH)
    assert two.serving == "1.1.0"


def test_the_directors_key_takes_no_device_back(two: Device) -> None:
    older = two.repository.built[LINE, "1.0.0"]
    two.grant(older, edit=lambda desired: desired.unrecognized_fields.update(allow_rollback_to=1))
    event = two.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.COUNTER_ROLLBACK)
    assert two.serving == "1.1.0"


def test_the_directors_key_stops_updates_and_leaves_the_release_serving(two: Device) -> None:
    two.release("1.2.0", grant=False)

    def nothing(desired: Targets) -> None:
        desired.targets = {}

    two.grant(two.repository.built[LINE, "1.2.0"], edit=nothing)
    assert run(two.reboot().check()) == []
    assert two.serving == "1.1.0"


# -- release role ------------------------------------------------------------------------------------------------------


def test_a_release_key_alone_reaches_no_device(two: Device) -> None:
    """Its document counts only as the snapshot lists it."""
    simulator = two.repository
    evil = _evil(two)
    document = simulator.roles[ROLE]
    document.signed.targets[evil.path] = TargetFile.from_data(evil.path, evil.data, ["sha256"])
    document.sign(simulator.signers[ROLE])
    simulator.documents[ROLE, document.signed.version] = document.to_bytes()
    two.grant(evil)
    event = two.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.METADATA_MISMATCH)
    assert two.serving == "1.1.0"


def test_a_release_key_with_the_online_keys_still_has_to_pass_the_devices_own_trial(two: Device) -> None:
    """All keys but root and targets: the golden vectors are the thief's too, so a release that merely fails is all that
    is stopped here. One that works runs without keys, state and network."""
    data = model(667)
    evil = two.repository.build(LINE, "6.6.6", {"int8": data}, golden_for(model(668)), counter=99)
    two.grant(evil)
    event = two.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.GOLDEN_MISMATCH)
    assert two.serving == "1.1.0"


def test_a_release_key_of_one_line_says_nothing_about_another(two: Device) -> None:
    simulator = two.repository
    data = model(669)
    meter = simulator.build("meter", "1.0.0", {"int8": data}, golden_for(data))
    simulator.roles["release-meter"].signed.targets[f"{LINE}/6.6.6/release.json"] = TargetFile.from_data(
        "x", meter.data, ["sha256"]
    )
    simulator.publish()

    def assign(desired: Targets) -> None:
        desired.targets = {f"{LINE}/6.6.6/release.json": TargetFile.from_data("x", meter.data, ["sha256"])}

    two.grant(meter, edit=assign)
    event = two.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.METADATA_MISMATCH)
    assert two.serving == "1.1.0"


# -- root --------------------------------------------------------------------------------------------------------------


def test_one_of_three_root_keys_makes_no_root(two: Device) -> None:
    simulator = two.repository
    one = simulator.root_signers[0]
    stranger = CryptoSigner.generate_ed25519()
    simulator.root.signed.add_key(stranger.public_key, "timestamp")
    simulator.root.signed.version += 1
    simulator.root.signatures.clear()
    simulator.root.sign(one, append=True)
    simulator.root.sign(stranger, append=True)
    simulator.documents["root", simulator.root.signed.version] = simulator.root.to_bytes()
    assert two.check().reason is Reason.BAD_SIGNATURE
    assert two.serving == "1.1.0"


def test_after_the_rotation_of_a_stolen_key_its_signatures_are_worth_nothing(two: Device) -> None:
    simulator = two.repository
    stolen = simulator.signers["timestamp"]
    simulator.rotate("timestamp")
    simulator.sign_timestamp()
    assert two.check().outcome == "up_to_date"
    simulator.signers["timestamp"] = stolen
    simulator.sign_timestamp()
    assert two.check().reason is Reason.BAD_SIGNATURE
    assert two.repository.desired[DEVICE]
