"""What the tests of the delegates share."""

from __future__ import annotations

import pytest

from agent.worker.delegates import DELEGATES, Delegate


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> tuple[Delegate, str]:
    """A delegate and one of its formats; see `tests.contract.delegates.over`."""
    name, format = request.param
    return DELEGATES[name](), format
