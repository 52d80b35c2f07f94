"""One server for a whole file, where its tests leave nothing behind."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from mailgrpc.config import HostPort, Settings
from mailgrpc.embedded.valkey import EmbeddedValkey
from tests.conftest import TEMPLATE, Cluster
from tests.gateway import Gateway

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def module_database_url(cluster: Cluster) -> Iterator[str]:
    """A migrated database, for the tests of one file."""
    name = f"mailgrpc_file_{os.getpid()}_{next(_numbers)}"
    cluster.run(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield cluster.url_of(name)
    cluster.run(f"DROP DATABASE {name} WITH (FORCE)")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(module_database_url: str, valkey: EmbeddedValkey) -> AsyncIterator[Gateway]:
    """A server without a worker; its tests run with `loop_scope="module"`."""
    settings = Settings(
        listen=HostPort("127.0.0.1", 0),
        database_url=module_database_url,
        redis_url=valkey.url,
        categories={"receipts": 1, "newsletter": 2},
        channels={"default": "capture:"},
    )
    async with Gateway(settings, worker=False) as running:
        yield running
