"""Events as fast as one live subscriber of everything can take them.

    python -m bench.load.live TARGET DATABASE_URL REDIS_URL SECONDS   → one JSON line

Appends events by the function that every change of a delivery ends in (`append_events`: the lane's
lock, the sequence, the join with the last attempt), for deliveries that exist, so that the server
has their messages to look up; twice in a row, as a drain tells of a message twice. It keeps `_WINDOW` events ahead of the subscriber at most, as a
stream's own flow control does with the counterpart: what comes out is the rate at which the lag
stays bounded. The server is told to look (over Redis) after each append, as workers do.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import asyncpg
import uvloop

from bench.load.watcher import Watcher
from mailgrpc.doorbell import Doorbell

_BATCH = 500
_WINDOW = 4000  # half of the ring that a server keeps in memory
_COLUMNS = """SELECT attname FROM pg_attribute WHERE attrelid = 'deliveries'::regclass
    AND attnum > 0 AND NOT attisdropped ORDER BY attnum"""
_DELIVERIES = "SELECT id FROM deliveries WHERE state = 4 ORDER BY id LIMIT 20000"


def _append(columns: list[str]) -> str:
    """A statement that tells once more that these deliveries were sent, now."""
    now = {"state_since": "clock_timestamp()", "version": "d.version + $2"}
    row = ", ".join(now.get(name, f"d.{name}") for name in columns)
    return f"""SELECT append_events(0, array_agg(r.row), array_agg(2::smallint), '')
        FROM (SELECT ROW({row})::deliveries AS row FROM deliveries d
            WHERE d.id = ANY ($1::uuid[])) AS r"""


class Producer:
    """Appends what `watcher` reads."""

    def __init__(self, connection: asyncpg.Connection, doorbell: Doorbell) -> None:
        self._connection = connection
        self._doorbell = doorbell
        self.appended = 0

    async def run(self, watcher: Watcher, seconds: float) -> None:
        columns = [row["attname"] for row in await self._connection.fetch(_COLUMNS)]
        append = await self._connection.prepare(_append(columns))
        ids = [row["id"] for row in await self._connection.fetch(_DELIVERIES)]
        stop_at = time.perf_counter() + seconds
        while time.perf_counter() < stop_at:
            if self.appended - len(watcher) > _WINDOW - _BATCH:
                await asyncio.sleep(0.001)
                continue
            batch = self.appended // _BATCH // 2 % (len(ids) // _BATCH)
            mine = ids[batch * _BATCH : (batch + 1) * _BATCH]
            await append.fetch(mine, self.appended // _BATCH + 1)
            self.appended += _BATCH
            self._doorbell.hint_feed()


async def main(target: str, url: str, redis_url: str, seconds: float) -> None:
    connection = await asyncpg.connect(url, server_settings={"search_path": "mailgrpc"})
    doorbell = Doorbell(redis_url)
    watcher, producer = Watcher(), Producer(connection, doorbell)
    following = asyncio.create_task(watcher.follow(target, float("inf")))
    await watcher.live.wait()
    await producer.run(watcher, seconds)
    async with asyncio.timeout(30):
        while len(watcher) < producer.appended:
            await asyncio.sleep(0.01)
    following.cancel()
    print(json.dumps(watcher.found() | {"appended": producer.appended}))
    await doorbell.close()
    await connection.close()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:4], float(sys.argv[4])))
