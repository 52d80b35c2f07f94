"""Inserts that overlap without an end, in the name of one session: nobody who ends it waits for ever."""

from __future__ import annotations

import asyncio

from mailgrpc.db.engine import Database
from mailgrpc.db.workers import beat, begin_epoch, end_session, open_session

SHARERS = 3
_HELD_S = 0.2


async def test_beat_epoch_and_end_come_through(db: Database, database_url: str) -> None:
    session_id = await open_session(db, "test", ["default"])
    over = False

    async def share(after_s: float) -> None:
        """One insert after the other, each holding the session until it is committed."""
        await asyncio.sleep(after_s)
        own = Database(database_url, pool_size=1)
        while not over:
            await own.fetch("SELECT lock_session($1, false), pg_sleep($2)", session_id, _HELD_S)
        await own.close()

    sharing = [asyncio.create_task(share(n * _HELD_S / SHARERS)) for n in range(SHARERS)]
    await asyncio.sleep(_HELD_S)
    async with asyncio.timeout(10):
        assert await beat(db, session_id)
        assert await begin_epoch(db, session_id, "default", 1)
        assert await end_session(db, session_id)
    over = True
    await asyncio.gather(*sharing)
