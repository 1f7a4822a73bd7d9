"""Every fsync of the updater is needed: the disk answers it and does not do it, and some scene must fail."""

from __future__ import annotations

from pathlib import Path

from tests.crash.mutations import durable_calls, missed

BOUND = 6


def test_each_fsync_that_is_left_out_is_missed_by_some_scene(tmp_path: Path) -> None:
    """Prints the table: durable call, how often the scenes make it, the scene that fails without it."""
    calls = durable_calls(tmp_path / "counted")
    assert {kind.partition("/")[0] for _, kind in calls} >= {"state", "store", "releases", "inbox", "trust"}
    results = [missed(lies, count, makers, BOUND, tmp_path) for lies, (count, makers) in calls.items()]
    print("\n" + "\n".join(result.row() for result in results))
    assert not [result.lies for result in results if not result.complaint]
