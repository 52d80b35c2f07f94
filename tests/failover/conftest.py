"""A pair of servers a test: after its fail-over it is spent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mailgrpc.db.migrate import migrate
from tests.failover.pair import ReplicatedPair


@pytest.fixture
def pair() -> Iterator[ReplicatedPair]:
    """A primary and its standby, asynchronous, with our schema."""
    with ReplicatedPair() as running:
        migrate(running.url)
        running.catch_up()
        yield running
