"""Whatever the writers and the reader do: every event once, each delivery's in order."""

from __future__ import annotations

import asyncio
import random
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from google.protobuf.duration_pb2 import Duration

from mailgrpc.db.engine import Database
from tests.feed.reading import Stream, all_after, faults, nudge, table, watching
from tests.feed.writing import enqueue, message
from tests.gateway import PATIENCE_S, Gateway

EVENTS = 20_000
RECONNECTS = 50
A_SECOND = Duration(seconds=1)
WRITERS = ("0,1", "0,2", "1,2")  # the lanes of each process: two writers meet in every lane


async def test_writers_that_overtake_each_other_and_a_reader_that_moves_lose_nothing(
    server: Gateway, other_server: Gateway, database_url: str, redis_url: str, db: Database
) -> None:
    rng = random.Random(4711)
    async with watching(server.stub) as first:
        token = first.token
    writers = [
        await _start_writers(database_url, redis_url, lanes, EVENTS // 6 + 1, seed)
        for seed, lanes in enumerate(WRITERS)
    ]
    ended = asyncio.gather(*(w.wait() for w in writers))
    seen: list[Any] = []
    reconnects = 0
    while reconnects < RECONNECTS or not ended.done():
        stub = (server, other_server)[reconnects % 2].stub
        stream = Stream(stub, resume_token=token, heartbeat=A_SECOND)
        wanted = rng.randint(1, EVENTS // RECONNECTS)
        await stream.until(lambda s, n=wanted: len(s.events) >= n or (ended.done() and s.caught_up))
        stream.call.cancel()  # whatever is on its way was not handed over
        seen += stream.events
        token = stream.token
        reconnects += 1
    assert await ended == [0, 0, 0]
    seen += await all_after(other_server.stub, token)

    rows = await table(db)
    assert len(rows) >= EVENTS
    assert len({row["lane"] for row in rows}) == 3
    assert faults(seen, rows) == []


async def _start_writers(*arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.feed.writing", *map(str, arguments)
    )


class OpenTransaction:
    """A connection whose transaction has run a function and not committed yet."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> OpenTransaction:
        self.connection = await asyncpg.connect(
            self._url, server_settings={"search_path": "mailgrpc"}
        )
        self.transaction = self.connection.transaction()
        await self.transaction.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.connection.close()

    async def append(self, lane: int) -> None:
        """Tell of a new message, as every writing function does: last."""
        m = message()
        await self.connection.execute(
            """INSERT INTO deliveries (id, project_id, recipient, role, channel, priority, mode,
                   flags, state, state_since, version)
               VALUES ($1, 1, 'ada@example.test', 1, 'default', 20, 1, 0, 1, now(), 1)""",
            m.message_id,
        )
        await self.connection.execute(
            """SELECT append_events($1, ARRAY(SELECT d FROM deliveries d WHERE id = $2),
                   ARRAY[0]::smallint[], '')""",
            lane,
            m.message_id,
        )

    async def commit(self) -> None:
        await self.transaction.commit()


@pytest.fixture
async def early(database_url: str) -> AsyncIterator[OpenTransaction]:
    async with OpenTransaction(database_url) as transaction:
        yield transaction


@pytest.fixture
async def late(database_url: str) -> AsyncIterator[OpenTransaction]:
    async with OpenTransaction(database_url) as transaction:
        yield transaction


async def test_without_the_lock_of_the_lane_the_event_that_commits_late_is_lost(
    server: Gateway, db: Database, early: OpenTransaction, late: OpenTransaction
) -> None:
    """What the lock is for, and that the check above can fail."""
    [row] = await db.fetch("SELECT pg_get_functiondef('append_events'::regproc) AS source")
    source, count = re.subn(r"PERFORM pg_advisory_xact_lock\([^;]*;", "", row["source"])
    assert count == 1
    await db.write(source)

    async with watching(server.stub) as stream:
        await early.append(lane=3)  # takes its seq, and is in no hurry
        await late.append(lane=3)
        await late.commit()
        nudge(server)
        await stream.until_events(1)
        await early.commit()
        await enqueue(db, message())  # in another lane: when this is read, the lost one was due
        nudge(server)
        await stream.until_events(2)
        rows = await table(db)
    assert len(rows) == 3
    assert len(faults(stream.events, rows)) == 1
    assert "was lost" in faults(stream.events, rows)[0]


async def test_with_the_lock_of_the_lane_commits_come_in_the_order_of_seq(
    server: Gateway, db: Database, early: OpenTransaction, late: OpenTransaction
) -> None:
    async with watching(server.stub) as stream:
        await early.append(lane=3)
        waiting = asyncio.create_task(late.append(lane=3))
        async with asyncio.timeout(PATIENCE_S):
            while not await db.fetch("SELECT 1 FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.005)
        await early.commit()
        await waiting
        await late.commit()
        nudge(server)
        await stream.until_events(2)
        assert faults(stream.events, await table(db)) == []


async def test_lanes_commit_past_each_other_and_nothing_is_lost(
    server: Gateway,
    other_server: Gateway,
    db: Database,
    early: OpenTransaction,
    late: OpenTransaction,
) -> None:
    """A token between both commits stands behind the later seq, in its own lane only."""
    async with watching(server.stub) as stream:
        await early.append(lane=3)
        await late.append(lane=4)
        await late.commit()
        nudge(server)
        await stream.until_events(1)
    await early.commit()
    seen = stream.events + await all_after(other_server.stub, stream.token)
    assert faults(seen, await table(db)) == []
