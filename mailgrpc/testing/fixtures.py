"""The fixtures; see the package for what they are. Nothing of mailgrpc is loaded before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import grpc

    from mailgrpc.client import MailClient
    from mailgrpc.testing.gateway import TestGateway
    from mailgrpc.testing.outbox import Outbox


@pytest.fixture(scope="session")
def mailgrpc_options() -> dict[str, Any]:
    """The arguments of `run_mailgrpc`; override it to set categories or channels."""
    return {}


@pytest.fixture(scope="session")
def mailgrpc_server(mailgrpc_options: dict[str, Any]) -> Iterator[TestGateway]:
    """A gateway for the run."""
    from mailgrpc.testing import run_mailgrpc  # noqa: PLC0415

    with run_mailgrpc(**mailgrpc_options) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def mailgrpc_target(mailgrpc_server: TestGateway) -> str:
    """Where the gateway listens, as HOST:PORT."""
    return mailgrpc_server.target


@pytest.fixture(scope="session")
def mailgrpc_channel(mailgrpc_target: str) -> Iterator[grpc.Channel]:
    """A blocking channel to the gateway, for generated stubs."""
    import grpc  # noqa: PLC0415

    with grpc.insecure_channel(mailgrpc_target) as channel:
        yield channel


@pytest.fixture(scope="session")
def mailgrpc_client(mailgrpc_target: str) -> Iterator[MailClient]:
    """A blocking client of the gateway."""
    from mailgrpc.client import MailClient  # noqa: PLC0415

    with MailClient(mailgrpc_target) as client:
        yield client


@pytest.fixture
def mailgrpc_outbox(mailgrpc_server: TestGateway) -> Outbox:
    """The mails that are enqueued from now on, as they are sent."""
    return mailgrpc_server.new_outbox()
