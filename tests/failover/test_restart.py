"""PostgreSQL crashes and comes back under load: what is open stays open."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mailgrpc.db.engine import Database
from mailgrpc.db.migrate import migrate
from mailgrpc.embedded.postgres import EmbeddedPostgres
from tests.failover.programs import Load, Watcher, installation
from tests.failover.test_failover import sent
from tests.feed.reading import faults, table


@pytest.fixture
def postgres() -> Iterator[EmbeddedPostgres]:
    """A server of its own, to be crashed."""
    with EmbeddedPostgres(durable=False) as running:
        migrate(running.url)
        yield running


def crash_and_restart(postgres: EmbeddedPostgres) -> None:
    assert postgres.process is not None
    postgres.process.send(signal.SIGQUIT)
    assert postgres.process.ended.wait(20)
    postgres.start()


async def test_a_stream_and_its_callers_live_through_a_restart(
    postgres: EmbeddedPostgres, redis_url: str, tmp_path: Path
) -> None:
    async with installation(tmp_path, postgres.url, redis_url, "capture:") as stub:
        watcher = Watcher(stub)
        await watcher.until_begun()
        load = Load(stub, callers=4)
        for _ in range(2):
            await load.until(len(load.acknowledged) + 50)
            await asyncio.to_thread(crash_and_restart, postgres)
        await load.until(len(load.acknowledged) + 50)
        await load.stop()
        for request_id, message_id in load.acknowledged.items():
            assert (await sent(stub, request_id=request_id)).message_id == message_id
        database = Database(postgres.url, pool_size=1)
        happened = await table(database)
        await database.close()
        await watcher.until(caught_up_at=len(happened))
        await watcher.stop()
        assert faults(watcher.events, happened) == []
        assert watcher.breaks == 0
