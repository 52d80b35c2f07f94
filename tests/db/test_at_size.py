"""What is read does not grow with what is stored; what is removed leaves nothing behind."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime
from typing import Any

import asyncpg

from mailgrpc.core.delivery import Outcome, Result, State, Step
from mailgrpc.db.deliveries import Recorded, promote_scheduled, record_outcomes, started_of
from mailgrpc.db.engine import Database
from mailgrpc.db.handover import read_handed, read_running
from mailgrpc.db.messages import STATUSES, bounds

MESSAGES = 30_000
FILL = """
INSERT INTO messages SELECT ('01900000-0000-7000-8000-' || lpad(to_hex(i), 8, '0') || '0000')::uuid,
    1, now(), '', '', 's', '[]', '{}', '{}', 0, '' FROM generate_series(1, $1::integer) i;
"""
FILL_DELIVERIES = """
INSERT INTO deliveries (id, project_id, recipient, role, channel, priority, mode, flags, state,
    state_since, version, attempt_count)
SELECT ('01900000-0000-7000-8000-' || lpad(to_hex(i), 8, '0') || '0001')::uuid, 1,
    'u' || i || '@example.test', 1, 'default', 20, 1, 0, 4, now(), 3, 1
FROM generate_series(1, $1::integer) i
"""
FILL_ATTEMPTS = """
INSERT INTO attempts SELECT id, 1, id, id, 'default', 'smtp', now(), now(), 1, 0, 250, '', '', '',
    NULL FROM deliveries
"""


async def test_reading_200_statuses_touches_the_rows_of_200_messages(db: Database) -> None:
    await db.write(FILL, MESSAGES)
    await db.write(FILL_DELIVERIES, MESSAGES)
    await db.write(FILL_ATTEMPTS)
    await db.write("ANALYZE messages")
    await db.write("ANALYZE deliveries")
    await db.write("ANALYZE attempts")
    ids = [uuid.UUID(f"01900000-0000-7000-8000-{i * 100:08x}0000") for i in range(1, 201)]
    [row] = await db.fetch(
        f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {STATUSES}", ids, 1, *bounds(ids)
    )
    plan = row[0][0]["Plan"]
    assert plan["Actual Rows"] == 200
    # Three look-ups a message, each a few pages deep; the whole is some thousands of pages.
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 200 * 15


class Explained(Database):
    """Says what each write has read."""

    blocks = 0

    async def write(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        self._note(await super().write(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", *args))
        return []

    async def fetch(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        self._note(await super().fetch(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", *args))
        return []

    def _note(self, rows: list[asyncpg.Record]) -> None:
        plan = rows[0][0][0]["Plan"]
        self.blocks = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


async def test_recording_an_old_and_a_new_result_reads_nothing_of_what_lies_between(
    db: Database, database_url: str
) -> None:
    await db.write(FILL_DELIVERIES, MESSAGES)
    await db.write(FILL_ATTEMPTS)
    await db.write(
        """UPDATE deliveries SET state = 2, attempt_count = 2, attempt_id = gen_random_uuid(),
               call_id = gen_random_uuid(), attempt_started_at = now()
           WHERE recipient ~ '^u([12]|29999|30000)@'"""
    )
    await db.write("ANALYZE deliveries")
    await db.write("ANALYZE attempts")
    explained = Explained(database_url, pool_size=1)
    now = datetime.now(UTC)
    result = Result(Outcome.DEFERRED)
    step = Step(State.DEFERRED, False, now)
    started = [
        started_of(row)
        for row in await db.fetch("SELECT * FROM deliveries WHERE state = 2 ORDER BY id")
    ]
    first, second, last_but_one, last = (Recorded.of(s, "smtp", now, result, step) for s in started)
    await record_outcomes(explained, 0, [first, last])  # reads the catalogue too
    await record_outcomes(explained, 0, [second, last_but_one])
    await explained.close()
    assert 0 < explained.blocks < 250  # the attempts alone are some 500


async def test_reading_what_was_handed_over_touches_nothing_else(
    db: Database, database_url: str
) -> None:
    await db.write(FILL, MESSAGES)
    await db.write(FILL_DELIVERIES, MESSAGES)
    await db.write(
        """UPDATE deliveries SET state = 2, attempt_id = id, call_id = id, attempt_started_at = now()
           WHERE recipient ~ '^u.?00@'"""
    )
    await db.write(
        """INSERT INTO due SELECT id, channel, 1, priority, now(), 7, 1, 0 FROM deliveries
           WHERE state = 2"""
    )
    for table in ("messages", "deliveries", "due"):
        await db.write(f"ANALYZE {table}")
    running = [
        (r["id"], r["id"]) for r in await db.fetch("SELECT id FROM deliveries WHERE state = 2")
    ]
    assert len(await read_handed(db, 7, running)) == len(running) == 9
    assert len(await read_running(db, 7, "default", 0.0)) == 9
    explained = Explained(database_url, pool_size=1)
    await read_handed(explained, 7, running)  # reads the catalogue too
    await read_handed(explained, 7, running)
    assert 0 < explained.blocks < 9 * 15
    await read_running(explained, 7, "default", 0.0)
    await read_running(explained, 7, "default", 0.0)
    assert 0 < explained.blocks < 9 * 15
    await explained.close()


async def test_clear_beside_the_sweeper_leaves_no_row_in_the_queue(
    db: Database, database_url: str
) -> None:
    await db.write(FILL, 1)
    await db.write(FILL_DELIVERIES, 1)
    await db.write("UPDATE deliveries SET state = 1, due_at = now()")
    await db.write("INSERT INTO scheduled SELECT id, channel, 1, priority, now() FROM deliveries")
    sweeper = await asyncpg.connect(database_url, server_settings={"search_path": "mailgrpc"})
    moving = sweeper.transaction()
    await moving.start()
    await sweeper.execute(
        """WITH soon AS (DELETE FROM scheduled RETURNING *)
           INSERT INTO due (delivery_id, channel, project_id, priority, due_at)
           SELECT delivery_id, channel, project_id, priority, due_at FROM soon"""
    )
    clearing = asyncio.create_task(
        db.write(
            "SELECT * FROM clear_messages(0, '', 1, (SELECT array_agg(id) FROM messages), true, '{}')"
        )
    )

    async def waits() -> bool:
        return bool(await sweeper.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    async with asyncio.timeout(5):
        while not await waits():
            await asyncio.sleep(0.005)
    await moving.commit()
    await clearing
    await sweeper.close()
    assert not await db.fetch("SELECT FROM due")
    assert not await db.fetch("SELECT FROM deliveries")
    assert await promote_scheduled(db) == 0
