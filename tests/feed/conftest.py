"""Servers on the test's database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mailgrpc.config import Settings
from tests.gateway import Gateway


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Gateway]:
    async with Gateway(settings, worker=False) as running:
        yield running


@pytest.fixture
async def other_server(settings: Settings) -> AsyncIterator[Gateway]:
    """A second one, with nothing in common but the database."""
    async with Gateway(settings, worker=False) as running:
        yield running
