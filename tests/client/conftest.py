"""The client against the real gateway of `mailgrpc.testing`, through a transport that breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mailgrpc.client import MailClient
from tests.client.breaking import BreakingTransport


@pytest.fixture(scope="session")
def mailgrpc_options() -> dict[str, Any]:
    return {"categories": {"receipts": 1, "newsletter": 2}}


@pytest.fixture
def transport(mailgrpc_target: str) -> BreakingTransport:
    return BreakingTransport(mailgrpc_target)


@pytest.fixture
def client(transport: BreakingTransport) -> Iterator[MailClient]:
    """A client whose connection breaks where the test says so, and whose time is moved."""
    with MailClient(transport=transport) as client:
        yield client
