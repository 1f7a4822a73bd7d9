"""Topics: built from checked ids, read back into checked ids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.daemon.topics import SUFFIXES, Origin, Topics, parse
from agent.errors import ConfigError, Reason


def test_every_topic_has_the_device_at_the_fourth_level_and_at_most_seven_levels() -> None:
    topics = Topics("edge", "cam-1")
    for suffix in SUFFIXES:
        levels = topics.of(suffix).split("/")
        assert levels[:4] == ["edge", "v1", "edge", "cam-1"]
        assert len(levels) <= 7
        assert "$" not in topics.of(suffix)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_topic_is_read_back_as_it_was_built(suffix: str) -> None:
    topics = Topics("acme", "cam-1")
    topic = topics.of(suffix)
    assert topics.suffix(topic) == suffix
    assert parse(topic) == Origin("acme", "cam-1", suffix)
    assert topics.purpose(topic) in ("state", "commands", "telemetry", "updates")


def test_topics_of_others_are_not_taken_for_ours() -> None:
    topics = Topics("edge", "cam-1")
    for topic in (
        "edge/v1/edge/cam-2/cmd",
        "edge/v1/acme/cam-1/cmd",
        "edge/v1/edge/cam-1/cmd/more",
        "edge/v1/edge/cam-1/",
        "edge/v1/edge/cam-10/cmd",
        "edge/v1/edge/fleet/hint/x",
        "",
    ):
        assert topics.suffix(topic) is None
        assert topics.purpose(topic) == "other"
    assert topics.suffix("edge/v1/edge/fleet/hint") == "hint"
    assert topics.suffix("edge/v1/acme/fleet/hint") is None


@pytest.mark.fault("F94")
@pytest.mark.parametrize(
    "bad",
    ["", "CAM", "cam/1", "cam+", "#", "+", "cam 1", "cam\n1", "\x1b[31m", "-cam", "a" * 49, "câm", "$SYS", "a\0b"],
)
def test_an_id_outside_the_grammar_never_becomes_part_of_a_topic(bad: str) -> None:
    for tenant, device in ((bad, "cam-1"), ("edge", bad)):
        with pytest.raises(ConfigError) as caught:
            Topics(tenant, device)
        assert caught.value.reason is Reason.BAD_CONFIG
        assert "\n" not in caught.value.message
        assert "\x1b" not in caught.value.message
    assert parse(f"edge/v1/edge/{bad}/cmd") is None


def test_no_device_may_be_called_like_the_fleet() -> None:
    with pytest.raises(ConfigError):
        Topics("edge", "fleet")
    assert parse("edge/v1/edge/fleet/status") is None


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused_without_harm(topic: str) -> None:
    origin = parse(topic)
    if origin is not None:
        assert Topics(origin.tenant, origin.device).of(origin.suffix) == topic


def test_an_unknown_suffix_is_the_callers_mistake() -> None:
    with pytest.raises(KeyError):
        Topics("edge", "cam-1").of("cmd/../../cam-2/cmd")
