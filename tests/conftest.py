"""What the tests stand on: a real PostgreSQL and a real Valkey for the run, a database a test.

The database is a copy of a migrated template, so a test pays some tens of milliseconds for it and
shares no row with another. `MAILGRPC_TEST_DATABASE_URL` names a server to use instead of the
embedded one (a superuser's URL); its template is made anew.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
import uvloop

from mailgrpc.config import HostPort, Settings
from mailgrpc.db.engine import Database
from mailgrpc.db.migrate import migrate
from mailgrpc.embedded.postgres import EmbeddedPostgres
from mailgrpc.embedded.valkey import EmbeddedValkey
from tests.gateway import Gateway
from tests.machines import register_profiles

register_profiles()


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that `serve` and `work` run on: it differs where connections break."""
    return {"uvloop": uvloop.new_event_loop}


TEMPLATE = "mailgrpc_template"
_numbers = itertools.count(1)


class Cluster:
    """A PostgreSQL server on which databases are made and dropped."""

    def __init__(self, url_of: Callable[[str], str], superuser_url: str) -> None:
        self.url_of = url_of
        self._superuser_url = superuser_url

    def run(self, sql: str, *, as_superuser: bool = False) -> None:
        url = self._superuser_url if as_superuser else self.url_of("postgres")

        async def main() -> None:
            connection = await asyncpg.connect(url)
            try:
                await connection.execute(sql)
            finally:
                await connection.close()

        asyncio.run(main())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The server, with the migrated template."""
    if given := os.environ.get("MAILGRPC_TEST_DATABASE_URL"):
        base = given.rpartition("/")[0]
        yield _with_template(Cluster(lambda name: f"{base}/{name}", given))
        return
    with EmbeddedPostgres(durable=False) as postgres:
        superuser_url = postgres.url_of("postgres", user="postgres")
        yield _with_template(Cluster(postgres.url_of, superuser_url))


def _with_template(cluster: Cluster) -> Cluster:
    cluster.run(f"DROP DATABASE IF EXISTS {TEMPLATE}")
    cluster.run(f"CREATE DATABASE {TEMPLATE}")
    migrate(cluster.url_of(TEMPLATE))
    return cluster


@pytest.fixture
def empty_database_url(cluster: Cluster) -> Iterator[str]:
    """A database without anything in it."""
    yield from _made(cluster, "template1")


@pytest.fixture
def database_url(cluster: Cluster) -> Iterator[str]:
    """A migrated database, for one test."""
    yield from _made(cluster, TEMPLATE)


def _made(cluster: Cluster, template: str) -> Iterator[str]:
    name = f"mailgrpc_test_{os.getpid()}_{next(_numbers)}"
    cluster.run(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield cluster.url_of(name)
    # Autovacuum may be at work in it, and only a superuser may end that.
    cluster.run(f"DROP DATABASE {name} WITH (FORCE)", as_superuser=True)


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedValkey]:
    """The server for the run."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> str:
    """A URL of it. Its content is hints only, so nothing is cleaned."""
    return valkey.url


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Settings of a gateway on free ports, with a capture channel and two categories."""
    return Settings(
        listen=HostPort("127.0.0.1", 0),
        database_url=database_url,
        redis_url=redis_url,
        data_dir=tmp_path,
        categories={"receipts": 1, "newsletter": 2},
        channels={"default": "capture:", "bulk": "capture:"},
        lease_s=5.0,
        grace_s=5.0,
    )


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """The test's database, open."""
    database = Database(database_url, pool_size=4)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """A server and a worker in this process, over a capture channel, with a stub to call."""
    async with Gateway(settings) as running:
        yield running


@pytest.fixture
async def server_only(settings: Settings) -> AsyncIterator[Gateway]:
    """The same without a worker: what is enqueued stays queued."""
    async with Gateway(replace(settings), worker=False) as running:
        yield running
